"""A size out of a packed folder: what `slice` would have cut, or the parent's own folder again.

Only the files that the size is made of are fetched and read, and each is held against its digest
first. The parent's weight files are rebuilt byte for byte, and held against theirs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from star_elastic import slicing
from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import (
    CheckpointError,
    Reader,
    Shards,
    Stored,
    atomic_folder,
    check_room,
    copy_file,
    one_line,
    read_bytes,
    siblings,
    stored_tensors,
)
from star_elastic.folder.header import MAX_HEADER, parse_header
from star_elastic.packed import SHAPE
from star_elastic.rings.assemble import Assembler, Source, Stream
from star_elastic.rings.chain import Part, check_chain, extents, partition
from star_elastic.rings.fetch import Packed, open_packed
from star_elastic.rings.manifest import MANIFEST, PARENT
from star_elastic.rings.rebuilt import Rebuilt
from star_elastic.submodel import Submodel

Progress = Callable[[int], None]


def unpack(
    source: str | Path,
    size: str,
    target: str | Path,
    cache: str | Path | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write the ordinary folder of one size of a packed folder; see `unpack_from`.

    Args:
        source: a packed folder, an http(s) URL of one, a repository id of the hub, or another URL
            (s3://...) for which fsspec has a package.
        cache: where what is fetched is kept, so that a larger size fetches its ring only.

    Raises:
        CheckpointError: nothing to be had there, or no such size.
    """
    packed = open_packed(source, cache)
    unpack_from(packed, number_of(packed, size), target, overwrite, max_shard_size)


def number_of(packed: Packed, size: str) -> int:
    """Where in the chain a named size stands.

    Raises:
        CheckpointError: no such size; lists those there are.
    """
    try:
        return packed.manifest.number(size)
    except ValueError as error:
        raise CheckpointError(f"{packed.source}: {error}") from None


def unpack_from(
    packed: Packed,
    number: int,
    target: str | Path,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> None:
    """Fetch and verify what one size of the chain is made of, and put it together.

    Args:
        max_shard_size: of a size between core and parent; these two have shards of their own.
        progress: hears of every bunch of bytes, once when it is fetched (or verified, if it is here
            already) and once when it is written.

    Raises:
        CheckpointError: a file that cannot be had, that is not what the manifest says, or that does
            not fit the others.
        FileExistsError: the target exists and `overwrite` is false.
        OSError: the disk is full, or another process is writing the target.
    """
    target, ring = Path(target), packed.manifest.sizes[number]
    _refuse_source(packed.folder, target)
    needed = packed.manifest.needed(number)
    check_room(target, packed.manifest.bytes(needed))
    with atomic_folder(target, overwrite) as temporary:  # what it refuses, it refuses first
        packed.get(needed, progress)
        if number:
            _assemble(packed, number, temporary, max_shard_size, progress)
        else:
            for path in ring.weights:
                _copy(packed, path, temporary / path.partition("/")[2], progress)
        for name, path in ring.beside.items():
            _copy(packed, path, temporary / name, progress)
        Checkpoint.open(temporary, check_digests=False)  # one thing, whatever the parts were


def _copy(packed: Packed, path: str, target: Path, progress: Progress | None) -> None:
    folder, _, name = path.partition("/")
    copy_file(packed.folder / folder, name, target)
    if progress is not None:
        progress(packed.manifest.files[path].bytes)


def _assemble(
    packed: Packed, number: int, folder: Path, max_shard_size: int, progress: Progress | None
) -> None:
    """Weights of a size beyond the core, tensor by tensor, in the parent's order."""
    parent, sizes = _parent(packed, number)
    layout = parent.layout
    try:
        parts = partition(parent, [layout.sizes_of(size.config) for size in sizes])
        planned = slicing.plan(parent, sizes[-1])
        core = slicing.plan(parent, sizes[0])
    except ValueError as error:
        raise CheckpointError(f"{packed.source}: {one_line(error)}") from None
    is_parent = number == len(packed.manifest.sizes) - 1
    with ExitStack() as stack:
        readers = _readers(packed, stack, parent, parts, core)
        writer = stack.enter_context(
            Rebuilt(folder, _headers(packed), packed.manifest.parent)
            if is_parent
            else Shards(folder, planned.specs, max_shard_size)
        )
        assembler = Assembler()
        for name, tensor in parts.items():
            own = core.pieces[name].name if name in core.pieces else name
            if name.endswith(SHAPE) and not is_parent:
                writer.write(slicing.shape_of(planned, planned.pieces[name]))
                continue
            sources = list(_sources(readers, tensor, name, own))
            size = sum(corner.bytes for corner, _ in sources)
            assembler.write(sources, size, writer.write)
            if progress is not None:
                progress(size)


def _sources(
    readers: Sequence[Reader], tensor: Sequence[Part], name: str, own: str
) -> Iterator[Source]:
    """Where the parts of a tensor are; the two corners of a ring follow one another there."""
    for number, (reader, part) in enumerate(zip(readers, tensor, strict=True)):
        offset = 0
        for corner in part:
            yield corner, Stream(reader, name if number else own, offset)
            offset += corner.bytes


def _parent(packed: Packed, number: int) -> tuple[Checkpoint, list[Submodel]]:
    """The parent as its config and headers tell it, and the sizes up to a number.

    Raises:
        CheckpointError: a manifest whose sizes are not those of the parent.
    """
    where = f"{packed.source}: {MANIFEST}"
    parent = Checkpoint.of(packed.folder / PARENT, lambda: _stored(packed))
    sizes = []
    for ring in packed.manifest.sizes:
        size = parent.size(ring.name)
        if size.config != ring.config:
            raise CheckpointError(f"{where}: sizes.{ring.name}.config: the parent has another")
        sizes.append(size)
    try:
        check_chain(parent.layout, sizes)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return parent, sizes[: number + 1]


def _headers(packed: Packed) -> dict[str, bytes]:
    """What stands before the tensors in each of the parent's weight files."""
    found = {}
    for file, original in sorted(packed.manifest.parent.items()):
        folder, _, name = original.header.partition("/")
        found[file] = read_bytes(packed.folder / folder, name, MAX_HEADER + 8)
    return found


def _stored(packed: Packed) -> dict[str, Stored]:
    """The parent's tensors, in the order of its files' bytes."""
    found: dict[str, Stored] = {}
    for file, data in _headers(packed).items():
        where = f"{packed.folder}/{packed.manifest.parent[file].header}"
        try:
            if int.from_bytes(data[:8], "little") != len(data) - 8:
                raise ValueError("its length is not what it says")
            tensors = parse_header(data[8:], packed.manifest.parent[file].bytes, file)
        except ValueError as error:
            raise CheckpointError(f"{where}: bad safetensors header: {one_line(error)}") from None
        for name in tensors.keys() & found.keys():
            raise CheckpointError(f"{where}: {name}: also in {found[name].file}")
        found |= tensors
    return found


def _readers(
    packed: Packed,
    stack: ExitStack,
    parent: Checkpoint,
    parts: Mapping[str, list[Part]],
    core: slicing.Plan,
) -> list[Reader]:
    """The core's and the rings' tensors, each of the very size that its place wants."""
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in core.specs}
    readers = []
    for number, ring in enumerate(packed.manifest.sizes[: len(next(iter(parts.values())))]):
        if number:
            counts = extents(parent, parts, number)
            wanted = {name: (parent.stored[name].dtype, (n,)) for name, n in counts.items()}
        folder = packed.folder / ring.folder
        stored = stored_tensors(folder)
        for name in sorted(wanted.keys() ^ stored.keys()):
            what = "missing" if name in wanted else "belongs to no part of the parent"
            raise CheckpointError(f"{folder}: {name}: {what}")
        for name, each in stored.items():
            if (each.dtype, each.shape) != wanted[name]:
                raise CheckpointError(
                    f"{folder / each.file}: {name}: {each.dtype} {each.shape}, expected "
                    f"{' '.join(map(str, wanted[name]))}"
                )
        readers.append(stack.enter_context(Reader(folder, stored)))
    return readers


def _refuse_source(packed: Path, target: Path) -> None:
    """No folder that goes may be the packed one, or hold it."""
    packed, target = packed.resolve(), target.resolve()
    for goes in (target, *siblings(target)):
        if goes == packed or goes in packed.parents:
            raise ValueError(f"unpack: {goes} is the packed folder itself, or holds it")
