"""The elastic checkpoint: an ordinary Hugging Face folder plus `elastic_config` (docs/format.md).

`Checkpoint.open` reads configs and headers only, and refuses a folder that lies. Nothing here needs
torch: what a checkpoint holds, and how to cut it, are questions about bytes.
"""

import fnmatch
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_elastic import card, configs, hub
from star_elastic.dtypes import STORED, STORED_ITEMSIZE, dtype_of
from star_elastic.folder import (
    CheckpointError,
    Reader,
    Stored,
    check_links,
    copy_file,
    digest,
    one_line,
    read_json,
    replace_file,
    replace_json,
    stored_tensors,
)
from star_elastic.layout import Layout, Weight
from star_elastic.packed import SHAPE, is_quantized, packed_weights, shape_told
from star_elastic.shapes import Sizes, narrow
from star_elastic.submodel import ElasticSpace, Submodel, read_declaration

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZATION = "hf_quant_config.json"
MAX_CONFIG = 8 * 2**20  # bytes: the longest list a quantization by name, of each expert's module
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
    "LICENSE*",
)


@dataclass(frozen=True)
class Checkpoint:
    """A verified folder: its parent's config and layout, its sizes, where and what each tensor is.

    `weights` are `layout.stored`, or their codes and scales where the folder is quantized. A plain
    model folder (no `elastic_config`) opens too; its only size is the parent, `full`.
    """

    path: Path
    config: Any
    layout: Layout
    space: ElasticSpace
    stored: Mapping[str, Stored]
    weights: Mapping[str, Weight]
    is_elastic: bool

    @classmethod
    def open(cls, path: str | Path, check_digests: bool = True) -> "Checkpoint":
        """Verify names, shapes, dtypes and elastic metadata; read no weights but to digest them.

        Args:
            path: a folder, or a repository id of the Hugging Face hub.

        Raises:
            CheckpointError: one line naming file, and tensor or field.
        """
        folder = hub.local(path)
        check_links(folder)
        opened = cls.of(folder, lambda: stored_tensors(folder))
        if check_digests:
            check_digests_of(folder, opened.space)
        return opened

    @classmethod
    def of(cls, folder: Path, tensors: Callable[[], Mapping[str, Stored]]) -> "Checkpoint":
        """The checkpoint of a `config.json` and of headers, wherever the weights themselves are.

        Args:
            tensors: asked once the config is found to be sound.

        Raises:
            CheckpointError: see `open`.
        """
        raw = read_json(folder / "config.json", MAX_CONFIG)
        layout, space = _declared(folder / "config.json", raw)
        stored = tensors()
        try:
            weights = packed_weights(layout, stored)
        except ValueError as error:
            raise CheckpointError(f"{folder}/{error}") from None
        _check_tensors(folder, layout, stored, weights)
        return cls(folder, layout.config, layout, space, stored, weights, "elastic_config" in raw)

    def size(self, name: str) -> Submodel:
        """A named size.

        Raises:
            CheckpointError: no such name; lists those there are.
        """
        try:
            return self.space.sizes[name]
        except KeyError:
            names = ", ".join(self.space.sizes)
            raise CheckpointError(f"{self.path}: no size {name!r}; there are {names}") from None

    def tensors(self, child: Sizes | None = None) -> Iterator[tuple[str, "Tensor"]]:
        """The tensors of a submodel, one at a time, read from the parent's files."""
        import torch

        child = child or self.layout.sizes
        kept = list(self.layout.kept(child, self.weights))
        wholes = self.read(weight.name for _, weight in kept)
        for (name, weight), whole in zip(kept, wholes, strict=True):
            if name.endswith(SHAPE):  # whose values, not extent, are the size's own
                codes = self.weights[weight.name.replace(SHAPE, "weight_packed")]
                yield name, torch.tensor(shape_told(codes, child), dtype=whole.dtype)
            else:
                yield name, narrow(whole, weight.cuts(self.layout.sizes, child))

    def read(self, names: Iterable[str]) -> Iterator["Tensor"]:
        """Whole tensors by their names on disk, one at a time and in this order.

        Raises:
            CheckpointError: a file that is not the one opened, or cannot be read.
        """
        import torch

        wanted = list(names)
        files = {self.stored[name].file for name in wanted}
        held = {name: each for name, each in self.stored.items() if each.file in files}
        with Reader(self.path, held) as reader:
            for name in wanted:
                dtype = getattr(torch, STORED[self.stored[name].dtype])
                tensor = torch.empty(self.stored[name].shape, dtype=dtype)
                if tensor.numel():
                    reader.fill(name, 0, tensor.reshape(-1).view(torch.uint8).numpy().data)
                yield tensor

    def cache_bytes_per_token(self, child: Sizes | None = None) -> int:
        """KV cache bytes of one token, in the dtype of the weights."""
        return self.layout.cache_bytes_per_token(child, dtype_of(self.config))

    def resident_bytes(self, child: Sizes | None = None) -> int:
        """Bytes of weights in memory to run this size alone, in the dtypes stored.

        A view of a loaded parent adds nothing to the parent's own (`ElasticModel.copied_bytes`).
        """
        return self.disk_bytes(child)

    def disk_bytes(self, child: Sizes | None = None) -> int:
        """Bytes of weights that a folder of this size takes on disk."""
        child = child or self.layout.sizes
        return sum(
            math.prod(weight.shape(child)) * STORED_ITEMSIZE[self.stored[weight.name].dtype]
            for _, weight in self.layout.kept(child, self.weights)
        )

    @property
    def is_quantized(self) -> bool:
        """Does any weight stand here as codes and scales?"""
        return is_quantized(self.weights, self.layout)


def declare(checkpoint: Checkpoint, space: ElasticSpace) -> None:
    """Replace a checkpoint's declaration (say, with measured quality); its weights stay.

    Raises:
        ValueError: a declaration that this parent does not bear out, or a folder of a hub cache.
    """
    if hub.repository(checkpoint.path) is not None:
        raise ValueError(f"{checkpoint.path}: a hub cache stays as it is; copy or adopt it first")
    space.check(checkpoint.layout)
    space = space.model_copy(update={"digests": checkpoint.space.digests})
    values = read_json(checkpoint.path / "config.json")
    values["elastic_config"] = space.model_dump()
    replace_json(checkpoint.path / "config.json", values)
    write_card(checkpoint.path, checkpoint.layout, space)


def write_card(folder: Path, layout: Layout, space: ElasticSpace) -> None:
    """The card of a checkpoint; a publisher's own stays as it is."""
    path = folder / card.CARD
    if not os.path.lexists(path) or card.is_ours(path.read_text("utf-8", "replace")):
        replace_file(path, card.of_checkpoint(layout, space, card.licence_of(folder)).encode())


def _declared(path: Path, values: Mapping[str, Any]) -> tuple[Layout, ElasticSpace]:
    """The layout and the sizes that a `config.json` tells."""
    try:
        config = configs.read_config(values)
        layout = Layout(config)  # sizes that divide
        layout.stored  # noqa: B018  (values that are no numbers show here)
    except Exception as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None
    if "elastic_config" not in values:
        return layout, ElasticSpace.of(layout, {"full": {}}, trained=True)
    try:
        return read_declaration(config, values["elastic_config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def _check_tensors(
    folder: Path, layout: Layout, stored: Mapping[str, Stored], weights: Mapping[str, Weight]
) -> None:
    """Every tensor there, of the shape and dtype the config says, and no other."""
    allowed = {"float32", dtype_of(layout.config)}
    quantized = weights.keys() != layout.stored.keys()
    if quantized and not declares_quantization(folder, layout.config):
        name = min(weights.keys() - layout.stored.keys())
        raise CheckpointError(f"{folder}: {name}: config.json declares no quantization_config")
    for name, weight in weights.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: {name}: missing")
        file, dtype, shape, *_ = stored[name]
        if shape != (expected := weight.shape(layout.sizes)):
            raise CheckpointError(f"{folder / file}: {name}: shape {shape}, expected {expected}")
        plain = weight is layout.stored.get(name)
        if plain and STORED[dtype] not in allowed:
            raise CheckpointError(
                f"{folder / file}: {name}: dtype {dtype}, expected {' or '.join(sorted(allowed))}"
            )
    spare = {*layout.family.tied} if getattr(layout.config, "tie_word_embeddings", False) else set()
    for name in sorted(stored.keys() - weights.keys() - spare):
        if not name.startswith(layout.family.ignored or ("\0",)):
            raise CheckpointError(f"{folder / stored[name].file}: {name}: not in the model")


def declares_quantization(folder: Path, config: Any) -> bool:
    """Does a folder say that its weights are quantized?"""
    return bool(getattr(config, "quantization_config", None)) or (folder / QUANTIZATION).is_file()


def check_digests_of(
    folder: Path, space: ElasticSpace, progress: Callable[[int], None] | None = None
) -> None:
    """Hold every file that has a digest against it.

    Raises:
        CheckpointError: a file that is not there, or not the one that was written.
    """
    for file, expected in space.digests.items():
        if Path(file).name != file or not os.path.lexists(folder / file):
            where = f"{folder / 'config.json'}: elastic_config.digests"
            raise CheckpointError(f"{where}: {file[:80]!r}")
        if digest(folder / file, progress) != expected:
            raise CheckpointError(f"{folder / file}: digest differs from elastic_config.digests")


def companions(folder: Path) -> list[str]:
    """The files that go along with the weights: tokenizer, generation config, licence."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in _COMPANIONS)]


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, generation config and licence go along with the weights."""
    for name in companions(source):
        copy_file(source, name, target / name)
