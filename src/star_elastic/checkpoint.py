"""The elastic checkpoint: an ordinary Hugging Face folder plus `elastic_config` (docs/format.md).

`Checkpoint.open` reads configs and headers only, and refuses a folder that lies; `write` makes a
checkpoint out of a parent in memory.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from star_elastic import card, stock
from star_elastic.folder import (
    CheckpointError,
    Stored,
    atomic_folder,
    digest,
    one_line,
    read_json,
    replace_json,
    stored_tensors,
    write_json,
    write_tensors,
)
from star_elastic.layout import Layout, Weight
from star_elastic.shapes import Sizes, at, take
from star_elastic.submodel import (
    FORMAT_VERSION,
    ElasticSpace,
    Submodel,
)

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_KEPT = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.*", "merges.txt")
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified folder: its parent's config and layout, its sizes, and where each tensor is.

    A plain model folder (no `elastic_config`) opens too; its only size is the parent, `full`.
    """

    path: Path
    config: Any
    layout: Layout
    space: ElasticSpace
    stored: Mapping[str, Stored]
    is_elastic: bool

    @classmethod
    def open(cls, path: str | Path, check_digests: bool = True) -> "Checkpoint":
        """Verify names, shapes, dtypes and elastic metadata; read no weights but to digest them.

        Args:
            path: a folder, or a repository id of the Hugging Face hub.

        Raises:
            CheckpointError: one line naming file, and tensor or field.
        """
        folder = _local(path)
        config_path = folder / "config.json"
        raw = read_json(config_path)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            Layout(config)  # a family we know, sizes that divide
        except Exception as error:
            raise CheckpointError(f"{config_path}: {one_line(error)}") from None
        layout, space = _declared(config_path, raw.get("elastic_config"), config)
        stored = stored_tensors(folder)
        _check_tensors(folder, config, layout, stored)
        if check_digests:
            _check_digests(folder, space)
        return cls(folder, config, layout, space, stored, "elastic_config" in raw)

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

    def tensors(self, child: Sizes | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a submodel, one at a time, read from the parent's files."""
        child = child or self.layout.sizes
        kept = list(self.layout.kept(child))
        wholes = self.read(weight.name for _, weight in kept)
        for (name, weight), whole in zip(kept, wholes, strict=True):
            yield name, take(whole, weight.dims, self.layout.sizes, at(child, weight.layer))

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Whole tensors by their names on disk, one at a time and in this order."""
        opened: dict[str, Any] = {}
        for name in names:
            file = self.stored[name].file
            if file not in opened:
                opened[file] = safe_open(self.path / file, framework="pt")
            yield opened[file].get_tensor(name)

    def in_memory(self, weights: Iterable[Weight]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors under their in-memory names, one at a time; fused ones are put together."""
        for weight in weights:
            shape = weight.shape(self.layout.sizes)
            whole = torch.empty(shape, dtype=self.dtype_of(weight))
            stored = self.layout.pieces[weight.name]
            for piece, tensor in zip(stored, self.read(p.name for p in stored), strict=True):
                self.layout.view({weight.name: whole}, piece).copy_(tensor)
            yield weight.name, whole

    def dtype_of(self, weight: Weight) -> torch.dtype:
        """The dtype in which an in-memory tensor is stored."""
        first = self.layout.pieces[weight.name][0]
        return getattr(torch, _DTYPES[self.stored[first.name].dtype])

    def cache_bytes_per_token(self, child: Sizes | None = None) -> int:
        """KV cache bytes of one token, in the dtype of the weights."""
        dtype = getattr(torch, str(self.config.dtype or "float32").removeprefix("torch."))
        return self.layout.cache_bytes_per_token(child, dtype)

    def resident_bytes(self, child: Sizes | None = None) -> int:
        """Bytes of weights in memory to run this size alone, in the dtypes stored.

        A view of a loaded parent adds nothing to the parent's own (`ElasticModel.copied_bytes`).
        """
        return self.disk_bytes(child)

    def disk_bytes(self, child: Sizes | None = None) -> int:
        """Bytes of weights that a folder of this size takes on disk."""
        child = child or self.layout.sizes
        return sum(
            math.prod(weight.shape(child)) * _itemsize(self.stored[weight.name])
            for _, weight in self.layout.kept(child)
        )


def write(
    target: str | Path,
    state: Mapping[str, Tensor],
    layout: Layout,
    space: ElasticSpace | None,
    source: Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    beside: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write a parent in memory as a checkpoint, atomically.

    Args:
        state: the parent's state dict, in nested order.
        space: its sizes; None writes a plain model folder.
        source: the folder whose tokenizer, generation config and licence go along.
        tokenizer: goes along, with a default generation config, where there is no such folder.
        beside: files that go beside the weights (a router), by name, each with its writer.

    Raises:
        FileExistsError: the target exists and `overwrite` is false.
    """
    tensors = ((name, layout.view(state, weight)) for name, weight in layout.stored.items())
    dtype = next(iter(state.values())).dtype
    shard = max_shard_size
    write_stored(target, tensors, layout, space, dtype, source, tokenizer, overwrite, shard, beside)


def write_stored(
    target: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    layout: Layout,
    space: ElasticSpace | None,
    dtype: torch.dtype,
    source: Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    beside: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """`write` for a parent that comes tensor by tensor, under its names on disk; see there."""
    with atomic_folder(Path(target), overwrite) as folder:
        digests = write_tensors(folder, tensors, max_shard_size)
        for name, put in (beside or {}).items():
            put(folder / name)
            digests[name] = digest(folder / name)
        values = stock.config_json(layout.config)
        values.pop("elastic_config", None)
        values["dtype"] = str(dtype).removeprefix("torch.")
        if space is not None:
            space = space.model_copy(update={"digests": digests})
            values["elastic_config"] = space.model_dump()
            (folder / "README.md").write_text(card.of_checkpoint(layout, space), "utf-8")
        write_json(folder / "config.json", values)
        if source is not None:
            copy_companions(source, folder)
        elif tokenizer is not None:
            tokenizer.save_pretrained(folder)
            GenerationConfig.from_model_config(layout.config).save_pretrained(folder)


def declare(checkpoint: Checkpoint, space: ElasticSpace) -> None:
    """Replace a checkpoint's declaration (say, with measured quality); its weights stay.

    Raises:
        ValueError: a declaration that this parent does not bear out.
    """
    space.check(checkpoint.layout)
    space = space.model_copy(update={"digests": checkpoint.space.digests})
    values = read_json(checkpoint.path / "config.json")
    values["elastic_config"] = space.model_dump()
    replace_json(checkpoint.path / "config.json", values)
    (checkpoint.path / "README.md").write_text(
        card.of_checkpoint(checkpoint.layout, space), "utf-8"
    )


def _local(path: str | Path) -> Path:
    if Path(path).exists():
        return Path(path)
    try:
        wanted = ["*.json", "*.safetensors", *_KEPT]
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:
        raise CheckpointError(
            f"{path}: neither a folder nor a reachable repository ({one_line(error)})"
        ) from None


def _declared(path: Path, declared: Any, config: Any) -> tuple[Layout, ElasticSpace]:
    if declared is None:
        layout = Layout(config)
        return layout, ElasticSpace.of(layout, {"full": {}}, trained=True)
    try:
        if isinstance(declared, dict) and declared.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version: unknown version {declared.get('format_version')!r}")
        space = ElasticSpace.model_validate(declared)
        layout = Layout(config, space.layer_order)
        space.check(layout)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: elastic_config.{field}: {first['msg']}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: elastic_config: {error}") from None
    return layout, space


def _check_tensors(folder: Path, config: Any, layout: Layout, stored: Mapping[str, Stored]) -> None:
    allowed = {"float32", str(getattr(config, "dtype", None)).removeprefix("torch.")}
    for name, weight in layout.stored.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: {name}: missing")
        file, dtype, shape = stored[name]
        if shape != (expected := weight.shape(layout.sizes)):
            raise CheckpointError(f"{folder / file}: {name}: shape {shape}, expected {expected}")
        if _DTYPES.get(dtype) not in allowed:
            raise CheckpointError(
                f"{folder / file}: {name}: dtype {dtype}, expected {' or '.join(sorted(allowed))}"
            )
    spare = {*layout.family.tied} if getattr(config, "tie_word_embeddings", False) else set()
    for name in stored.keys() - layout.stored.keys() - spare:
        if not name.startswith(layout.family.ignored or ("\0",)):
            raise CheckpointError(f"{folder / stored[name].file}: {name}: not in the model")


def _check_digests(folder: Path, space: ElasticSpace) -> None:
    for file, expected in space.digests.items():
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise CheckpointError(f"{folder / 'config.json'}: elastic_config.digests: {file!r}")
        if digest(path) != expected:
            raise CheckpointError(f"{path}: digest differs from elastic_config.digests")


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, generation config and licence go along with the weights."""
    for pattern in (*_KEPT, _GENERATION, "LICENSE*"):
        for path in source.glob(pattern):
            shutil.copy(path, target / path.name)


def _itemsize(stored: Stored) -> int:
    return getattr(torch, _DTYPES[stored.dtype]).itemsize
