"""An elastic checkpoint as a core and rings: every size for the bytes of the largest.

The core is the smallest size, an ordinary slice. A ring holds, of every tensor of the parent, the
bytes that the next size adds, as one flat tensor under the parent's name. The parent's own headers
are kept as they are, so that its folder is rebuilt byte for byte.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from star_elastic import slicing
from star_elastic.checkpoint import QUANTIZATION, Checkpoint, companions
from star_elastic.folder import (
    INDEX,
    CheckpointError,
    Reader,
    Shards,
    Spec,
    atomic_folder,
    check_room,
    copy_file,
    digest,
    open_inside,
    write_file,
)
from star_elastic.rings.chain import Part, chain_of, extents, partition
from star_elastic.rings.manifest import (
    CORE,
    MANIFEST,
    PARENT,
    Held,
    Manifest,
    Original,
    Ring,
    check_name,
    manifest_bytes,
)
from star_elastic.submodel import Submodel
from star_elastic.transfer import Wanted, transfer_each

Progress = Callable[[int], None]
_BESIDE = ("config.json", INDEX, QUANTIZATION, "README.md")  # and the two of format.md, section 1
_OPTIONAL = ("router.safetensors", "scores.safetensors")
_METADATA = 2**22  # bytes of manifest, headers and cards, about


def pack(
    checkpoint: Checkpoint,
    target: str | Path,
    sizes: Sequence[str] | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Manifest:
    """Write a core and one ring for every larger size; the parent must be among the sizes.

    Args:
        sizes: names, in any order; all that the checkpoint declares, if none are given.
        progress: hears of every bunch of bytes read (`bytes_to_read` of them).

    Raises:
        CheckpointError: no such size; a parent that cannot be read, or changes meanwhile.
        ValueError: sizes that do not include one another, or that stock classes cannot express.
        FileExistsError: the target exists and `overwrite` is false.
        OSError: the disk is full, or another process is writing the target.
    """
    target, chain = Path(target), chain_of(checkpoint, sizes)
    slicing.refuse_source(checkpoint, [target], "pack")
    names = {name: check_name(checkpoint.path, name) for name in _files_beside(checkpoint.path)}
    parts = partition(checkpoint, [checkpoint.layout.sizes_of(size.config) for size in chain])
    plans = [slicing.plan(checkpoint, size) for size in chain]  # refuses before the first byte
    folders = [CORE] + [f"ring-{n}-{size.name}" for n, size in enumerate(chain) if n]
    check_room(target, checkpoint.disk_bytes() + _METADATA)
    with atomic_folder(target, overwrite) as temporary:
        core = {temporary / CORE: chain[0]}
        slicing.slice_all(checkpoint, core, False, max_shard_size, progress)
        for number, folder in enumerate(folders[1:], 1):
            (temporary / folder).mkdir()
            _write_ring(checkpoint, parts, number, temporary / folder, max_shard_size, progress)
        weights = [_weights(temporary, folder) for folder in folders]
        for planned, folder in zip(plans[1:-1], folders[1:-1], strict=True):
            slicing.write_beside(checkpoint, planned, temporary / folder)
        parent = _write_parent(checkpoint, temporary / PARENT, names)
        beside = [_beside(temporary, folder) for folder in folders[:-1]] + [sorted(names)]
        manifest = _manifest(temporary, chain, folders, weights, beside, parent)
        write_file(temporary / MANIFEST, manifest_bytes(manifest))
    return manifest


def bytes_to_read(checkpoint: Checkpoint, chain: Sequence[Submodel]) -> int:
    """Bytes of the parent that `pack` reads: a pass for the core, and one for each ring."""
    parts = partition(checkpoint, [checkpoint.layout.sizes_of(size.config) for size in chain])
    corners = [c for each in parts.values() for part in each[1:] for c in part]
    rows = sum(corner.row * sum(count for _, count in corner.rows) for corner in corners)
    return rows + slicing.bytes_to_read([slicing.plan(checkpoint, chain[0])])


def _write_ring(
    checkpoint: Checkpoint,
    parts: Mapping[str, list[Part]],
    number: int,
    folder: Path,
    max_shard_size: int,
    progress: Progress | None,
) -> None:
    """What one size adds, as flat tensors in the parent's order."""
    counts = extents(checkpoint, parts, number)
    specs = [Spec(name, checkpoint.stored[name].dtype, (counts[name],)) for name in counts]
    with (
        Reader(checkpoint.path, checkpoint.stored) as reader,
        Shards(folder, specs, max_shard_size) as shards,
    ):

        def wanted() -> Iterator[tuple[str, Wanted]]:
            for name in counts:
                for corner in parts[name][number]:  # the first one's rows all before the second's
                    yield name, [(corner, shards.write)]

        transfer_each(reader, wanted(), progress)


def _write_parent(
    checkpoint: Checkpoint, folder: Path, names: Mapping[str, str]
) -> dict[str, Original]:
    """The parent's headers, and copies of all that stands beside its weights."""
    folder.mkdir()
    for name in names:
        copy_file(checkpoint.path, name, folder / name)
    found = {}
    for file in dict.fromkeys(stored.file for stored in checkpoint.stored.values()):
        header = f"{check_name(checkpoint.path, file)}.header"
        begin = min(each.start for each in checkpoint.stored.values() if each.file == file)
        size, data = _head(checkpoint.path, file, begin)
        write_file(folder / header, data)
        sha256 = checkpoint.space.digests.get(file) or digest(checkpoint.path / file)
        found[file] = Original(bytes=size, sha256=sha256, header=f"{PARENT}/{header}")
    return found


def _head(folder: Path, file: str, length: int) -> tuple[int, bytes]:
    """The size of a weight file, and its first bytes: all that comes before the tensors."""
    with os.fdopen(open_inside(folder, file), "rb") as opened:
        data = opened.read(length)
        size = os.fstat(opened.fileno()).st_size
    if len(data) < length:
        raise CheckpointError(f"{folder / file}: changed while it was read")
    return size, data


def _files_beside(folder: Path) -> list[str]:
    """What an elastic folder holds besides its weights, as docs/format.md lists it."""
    there = [name for name in (*_BESIDE, *_OPTIONAL) if os.path.lexists(folder / name)]
    return [*there, *companions(folder)]


def _weights(packed: Path, folder: str) -> list[str]:
    names = sorted(path.name for path in (packed / folder).iterdir())
    return [f"{folder}/{name}" for name in names if name.endswith(".safetensors") or name == INDEX]


def _beside(packed: Path, folder: str) -> list[str]:
    weights = {path.partition("/")[2] for path in _weights(packed, folder)}
    return sorted({path.name for path in (packed / folder).iterdir()} - weights)


def _manifest(
    packed: Path,
    chain: Sequence[Submodel],
    folders: Sequence[str],
    weights: Sequence[list[str]],
    beside: Sequence[list[str]],
    parent: Mapping[str, Original],
) -> Manifest:
    """Digests of all files; of equal ones beside the weights (tokenizers) only the first stays.

    The core keeps all of its own: it is a folder that others load as it is.
    """
    files = {path: _held(packed / path) for paths in weights for path in paths}
    files |= {original.header: _held(packed / original.header) for original in parent.values()}
    first: dict[Held, str] = {}
    sizes = []
    for size, folder, ours, names in zip(chain, folders, weights, beside, strict=True):
        here = PARENT if size is chain[-1] else folder
        places = {}
        for name in names:
            own, held = f"{here}/{name}", _held(packed / here / name)
            path = places[name] = own if here == CORE else first.get(held, own)
            first.setdefault(held, own)
            if path == own:
                files[path] = held
            else:
                (packed / own).unlink()
        sizes.append(
            Ring(
                name=size.name,
                config={field: n for field, n in size.config.items() if isinstance(n, int)},
                total_params=size.total_params,
                active_params=size.active_params,
                folder=folder,
                weights=ours,
                beside=places,
            )
        )
    return Manifest(sizes=sizes, parent=dict(parent), files=files)


def _held(path: Path) -> Held:
    return Held(bytes=path.stat().st_size, sha256=digest(path))
