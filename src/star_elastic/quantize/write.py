"""The pass from a checkpoint's files to quantized ones: no model is built, memory is bounded.

A matrix goes by in blocks of rows. A format with a scale of the whole matrix looks at it twice: it
is held meanwhile if it is small, and read twice if not.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from star_elastic import card, configs
from star_elastic.checkpoint import QUANTIZATION, copy_companions
from star_elastic.corner import Corner, corner_of
from star_elastic.dtypes import STORED, STORED_ITEMSIZE
from star_elastic.folder import (
    CheckpointError,
    Reader,
    Shards,
    Stored,
    atomic_folder,
    check_room,
    copy_file,
    digest,
    write_file,
    write_json,
)
from star_elastic.precision import Format, computed_in, largest_of
from star_elastic.quantize.declare import beside, config_of
from star_elastic.quantize.plan import Plan, surviving
from star_elastic.slicing import refuse_source
from star_elastic.submodel import ElasticSpace
from star_elastic.transfer import BLOCK, Wanted, transfer_each

HELD = 128 * 2**20  # bytes of a matrix that is held, rather than read twice
_AT_ONCE = 2**20  # bytes of a matrix that are computed at once: they and temporaries fit in caches
_METADATA = 2**20  # bytes of configs, tokenizer and card, about
_ROUTER = "router.safetensors"
Progress = Callable[[int], None]  # hears of every bunch of bytes read


def quantize_checkpoint(
    planned: Plan,
    target: str | Path,
    drop: bool = False,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
    held: int = HELD,
    block: int = BLOCK,
) -> None:
    """Write a quantized checkpoint, atomically.

    Args:
        drop: leave out the sizes that do not survive, rather than refuse.
        held: bytes of a matrix that may be held in memory.
        block: bytes that are read at once, and the most that are computed at once.

    Raises:
        ValueError: a size that does not survive, a matrix with a value that is no number, a target
            that is the checkpoint itself.
        OSError: the disk is full, or another process is writing the target.
    """
    path, checkpoint = Path(target), planned.checkpoint
    refuse_source(checkpoint, [path], "quantize")
    space = surviving(planned, drop)
    check_room(path, planned.bytes + _METADATA)
    routed = (checkpoint.path / _ROUTER).exists()
    with atomic_folder(path, overwrite) as folder:
        with (
            Reader(checkpoint.path, checkpoint.stored) as reader,
            Shards(folder, planned.specs, max_shard_size, True, indexed=routed) as shards,
        ):
            wanted = _wanted(planned, shards, held, min(block, _AT_ONCE))
            transfer_each(reader, wanted, progress, block)
        _write_beside(planned, space, folder, shards.digests)


def bytes_to_read(planned: Plan, held: int = HELD) -> int:
    """Bytes of the parent that are read; those of large matrices may count twice."""
    stored = planned.checkpoint.stored
    return sum(
        _size(stored[name]) * (1 + _is_read_twice(planned, name, held)) for name in planned.tensors
    )


def _is_read_twice(planned: Plan, name: str, held: int) -> bool:
    is_large = _size(planned.checkpoint.stored[name]) > held
    return planned.format.has_whole and name in planned.chosen and is_large


def _wanted(planned: Plan, shards: Shards, held: int, at_once: int) -> Iterator[tuple[str, Wanted]]:
    """Every tensor of the parent, with what takes its bytes: in the order of its files."""
    checkpoint, buffer = planned.checkpoint, bytearray()
    parent = checkpoint.layout.sizes
    for name in planned.tensors:
        stored = checkpoint.stored[name]
        corner = corner_of(checkpoint.weights[name], STORED_ITEMSIZE[stored.dtype], parent, parent)
        if name not in planned.chosen:
            yield name, [(corner, shards.write)]
            continue
        matrix = _Matrix(planned.format, name, stored, shards, at_once)
        if _is_read_twice(planned, name, held):
            yield name, [(corner, matrix.look)]
            yield name, [(corner, matrix.encode)]
        elif planned.format.has_whole:
            if len(buffer) < _size(stored):
                buffer = bytearray(_size(stored))
            whole = memoryview(buffer)[: _size(stored)]
            yield name, [(corner, _Held(matrix, whole, corner).take)]
        else:
            yield name, [(corner, matrix.encode)]


class _Matrix:
    """One matrix on its way: looked at for its largest magnitude, then encoded and written."""

    def __init__(self, form: Format, name: str, stored: Stored, shards: Shards, at_once: int):
        self._form, self._name, self._shards = form, name, shards
        self._dtype = getattr(torch, STORED[stored.dtype])
        self._height, self._width = stored.shape
        self._bytes = _size(stored)
        self._part = max(1, at_once // (self._width * self._dtype.itemsize))  # rows
        self._largest = torch.zeros((), dtype=computed_in(self._dtype))
        self._whole: dict[str, Tensor] | None = None
        self._rows: list[dict[str, Tensor]] = []
        self._done = 0

    def look(self, data: memoryview) -> None:
        """Take note of the largest magnitude."""
        for weight in self._parts(data):
            self._largest = torch.maximum(self._largest, largest_of(weight.flatten()))

    def encode(self, data: memoryview) -> None:
        """Write the codes of some rows, and the scales after the last of them."""
        if self._whole is None:
            self._check(self._largest)
            self._whole = self._form.whole(self._largest)
        for weight in self._parts(data):
            rows = self._form.rows(weight, self._whole)
            for scale in rows.values():
                self._check(scale)
            self._rows.append(rows)
            self._shards.write(_bytes(self._form.encode(weight, {**self._whole, **rows})))
        self._done += len(data)
        if self._done == self._bytes:
            self._finish()

    def _finish(self) -> None:
        assert self._whole is not None
        module, (first, *_) = self._name.rpartition(".")[0], self._rows
        scales = {leaf: torch.cat([each[leaf] for each in self._rows]) for leaf in first}
        shape = torch.tensor([self._height, self._width])
        scales |= self._whole | {"weight_shape": shape}
        for spec in self._form.specs(module, self._height, self._width, self._dtype)[1:]:
            self._shards.write(_bytes(scales[spec.name.rpartition(".")[2]]))

    def _parts(self, data: memoryview) -> Iterator[Tensor]:
        weight = torch.frombuffer(data, dtype=self._dtype).view(-1, self._width)
        for part in weight.split(self._part):
            yield part.to(computed_in(self._dtype))

    def _check(self, values: Tensor) -> None:
        if not values.float().isfinite().all():
            raise CheckpointError(f"{self._name}: it has values that are no numbers")


class _Held:
    """Collects a matrix, and hands it on when it is whole."""

    def __init__(self, matrix: _Matrix, whole: memoryview, corner: Corner):
        self._matrix, self._whole = matrix, whole
        self._done = 0

    def take(self, data: memoryview) -> None:
        """Some more of its bytes."""
        self._whole[self._done : self._done + len(data)] = data
        self._done += len(data)
        if self._done == len(self._whole):
            self._matrix.look(self._whole)
            self._matrix.encode(self._whole)


def _write_beside(
    planned: Plan, space: ElasticSpace, folder: Path, digests: Mapping[str, str]
) -> None:
    """All files but the weights: config, declaration, card, router and the parent's companions."""
    checkpoint = planned.checkpoint
    values = configs.config_json(checkpoint.config)
    values["quantization_config"] = config_of(planned.format, planned.ignore)
    if told := beside(planned.format, planned.ignore):
        write_json(folder / QUANTIZATION, told)
    copy_companions(checkpoint.path, folder)
    licence, told = card.licence_of(checkpoint.path), values["quantization_config"]
    if checkpoint.is_elastic:
        digests = dict(digests)
        if (checkpoint.path / _ROUTER).exists():
            copy_file(checkpoint.path, _ROUTER, folder / _ROUTER)
            digests[_ROUTER] = digest(folder / _ROUTER)
        space = space.model_copy(update={"digests": digests})
        space.check(checkpoint.layout)
        values["elastic_config"] = space.model_dump()
        text = card.of_checkpoint(checkpoint.layout, space, licence, told)
    else:
        name, (size,) = checkpoint.path.resolve().name, space.submodels
        text = card.of_quantized(name, size, checkpoint.layout, licence, told)
    write_file(folder / card.CARD, text.encode())
    write_json(folder / "config.json", values)


def _size(stored: Stored) -> int:
    return stored.end - stored.start


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
