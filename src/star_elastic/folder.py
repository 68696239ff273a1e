"""Model folders on disk: read with suspicion, written whole or not at all.

A folder appears under its name only when every file in it is complete and on the disk: files go
to a temporary sibling, each is fsynced, then one rename shows them all.
"""

import hashlib
import json
import math
import os
import shutil
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format


class CheckpointError(ValueError):
    """A folder that cannot be trusted: one line naming the file, and the tensor or field."""


class Stored(NamedTuple):
    """A tensor as a safetensors header declares it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def one_line(error: Exception) -> str:
    """What another library had to say, short enough to stand behind a file's name."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; duplicate keys are refused.

    Raises:
        CheckpointError: missing, unreadable, not an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in a folder's safetensors files, from their headers alone.

    Raises:
        CheckpointError: no weights, a malformed header or index, an index that disagrees with the
            files, one tensor in two files.
    """
    index_path = folder / INDEX
    if not index_path.exists():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder}: holds neither {WEIGHTS} nor {INDEX} (only safetensors are read)"
            )
        return _headers(folder, [WEIGHTS])
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map: not a map from tensor to file name")
    for name, file in weight_map.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index_path}: {name}: {file!r} is not a file of this folder")
    tensors = _headers(folder, sorted(set(weight_map.values())))
    for name in sorted(weight_map.keys() ^ tensors.keys()):
        there = "index" if name in weight_map else "files"
        raise CheckpointError(f"{index_path}: {name}: only in the {there}")
    for name, stored in tensors.items():
        if weight_map[name] != stored.file:
            raise CheckpointError(f"{index_path}: {name}: is in {stored.file}")
    return tensors


def digest(path: Path) -> str:
    """`sha256:...` of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that takes `target`'s name once the block ends without an error.

    Raises:
        FileExistsError: `target` is there already and `overwrite` is false.
    """
    target = target.resolve()
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; remove it or choose another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _fsync(path)
        _fsync(temporary)
        _swap(temporary, target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON as Hugging Face writes it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step: readers see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    write_json(temporary, value)
    _fsync(temporary)
    temporary.replace(path)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: int = 5 * 10**9
) -> dict[str, str]:
    """Sharded safetensors with an index, one shard in memory at a time; returns file digests."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held = total = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > max_shard_size:
            _write_shard(folder, shards, shard)
            shard, held = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        held, total = held + size, total + size
    _write_shard(folder, shards, shard)
    files = _name_shards(folder, len(shards))
    if len(files) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {file: digest(folder / file) for file in files}


def _write_shard(folder: Path, shards: list[list[str]], shard: dict[str, Tensor]) -> None:
    shards.append(list(shard))
    path = folder / f"part-{len(shards)}"
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for its owner only


def _name_shards(folder: Path, count: int) -> list[str]:
    files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    files = [WEIGHTS] if count == 1 else files
    for number, file in enumerate(files, 1):
        (folder / f"part-{number}").rename(folder / file)
    return files


def _headers(folder: Path, files: Iterable[str]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, entry in _header(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder / file}: {name}: also in {tensors[name].file}")
            tensors[name] = Stored(file, entry["dtype"], tuple(entry["shape"]))
    return tensors


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            text = file.read(length).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        _check_header(header, size - 8 - length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, struct.error, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{path}: bad safetensors header: {error}") from None
    return header


def _check_header(header: dict[str, Any], data_bytes: int) -> None:
    """Every entry well formed, and the data covered exactly: no hole, no overlap, no tail."""
    spans = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
                if not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError(f"{name}: shape {shape}")
                if dtype in _ITEMSIZE and end - start != math.prod(shape) * _ITEMSIZE[dtype]:
                    raise ValueError(f"{name}: {end - start} bytes for shape {shape} of {dtype}")
                spans.append((start, end, name))
            case _:
                raise ValueError(f"{name}: malformed entry")
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached or end < start:
            raise ValueError(f"{name}: data_offsets [{start}, {end}] leave a hole or overlap")
        reached = end
    if reached != data_bytes:
        raise ValueError(f"tensors end at byte {reached} of {data_bytes}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {twice!r}")
    return found


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = temporary.with_suffix(".old")
    target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
