"""Tensors on their way from a checkpoint into a GGUF file, one at a time.

At most one tensor of the file is in memory: of stacked experts all of one layer and matrix, as
codes, and one expert as numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize

from star_elastic.export.gguf import llama, nvfp4
from star_elastic.export.gguf.nvfp4 import Codes
from star_elastic.export.gguf.plan import Plan, nbytes, writer_of
from star_elastic.export.gguf.tensors import Array, Entry, changed
from star_elastic.export.gguf.types import Type, type_of
from star_elastic.folder import atomic_file, check_room
from star_elastic.slicing import refuse_source

_METADATA = 2**26  # bytes of keys and tokens, at most


@dataclass(frozen=True)
class Written:
    """A file that was written: its bytes, and how many tensors stand in each type."""

    path: Path
    bytes: int
    codes: dict[str, int]


def write_gguf(
    plan: Plan,
    target: Path,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Write the file, atomically.

    Raises:
        CheckpointError: a parent that cannot be read, or changes meanwhile.
        FileExistsError: the target exists and `overwrite` is false.
        OSError: the disk is full, or another process is writing the target.
        ValueError: the target is one of the checkpoint's files, values are beyond a type's range,
            or llama.cpp fails.
    """
    refuse_source(plan.checkpoint, [target], "export")
    first = plan if plan.kind.is_direct else replace(plan, kind=_lossless(plan))
    needed = first.bytes if plan.kind.is_direct else 2 * first.bytes
    check_room(target, needed + _METADATA)
    with atomic_file(target, overwrite) as temporary:
        if plan.kind.is_direct:
            _write(plan, temporary, progress)
        else:
            _write_through(first, temporary, plan.kind, progress)
        codes = Counter(tensor.tensor_type.name for tensor in GGUFReader(temporary).tensors)
        size = temporary.stat().st_size
    return Written(target, size, dict(codes.most_common()))


def _lossless(plan: Plan) -> Type:
    """The type in which matrices lose nothing of what is stored."""
    sources = {name for entry in plan.entries if entry.is_matrix for name in entry.sources}
    kept = plan.checkpoint.layout.kept(plan.sizes, plan.checkpoint.weights)
    stored = {plan.checkpoint.stored[w.name].dtype for name, w in kept if name in sources}
    return type_of("bf16" if stored == {"BF16"} else "f32")


def _write_through(
    first: Plan, path: Path, kind: Type, progress: Callable[[int], None] | None
) -> None:
    """Write a file that loses nothing, and let llama.cpp make codes of it."""
    whole = path.with_suffix(".whole")
    try:
        _write(first, whole, progress)
        llama.quantize(whole, path, kind)
    finally:
        whole.unlink(missing_ok=True)


def _write(plan: Plan, path: Path, progress: Callable[[int], None] | None) -> None:
    writer = writer_of(plan)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in plan.extras.values():
            writer.write_tensor_data(values)
        tensors = plan.checkpoint.tensors(plan.sizes)
        for entry in plan.entries:
            count = _put(writer, entry, changed(entry, tensors), plan.code(entry))
            if progress is not None:
                progress(count)
    finally:
        writer.close()


def _put(
    writer: GGUFWriter, entry: Entry, parts: Iterator[Array | Codes], code: GGMLQuantizationType
) -> int:
    """Write one tensor, which nobody holds any more then; how many bytes?"""
    coded, scales = _coded(entry, parts, code)
    writer.write_tensor_data(coded)
    if code == GGMLQuantizationType.NVFP4:
        writer.write_tensor_data(scales)
    return coded.nbytes


def _coded(
    entry: Entry, parts: Iterator[Array | Codes], code: GGMLQuantizationType
) -> tuple[Array, Array]:
    """A tensor as the bytes it has in the file, one row a part; the scales of NVFP4's parts."""
    found = np.empty((len(entry.sources), nbytes(entry, code) // len(entry.sources)), np.uint8)
    scales = np.ones(len(entry.sources), np.float32)
    for number, part in enumerate(parts):
        if code == GGMLQuantizationType.NVFP4:
            codes = part if isinstance(part, Codes) else nvfp4.encoded(part)
            found[number], scales[number] = nvfp4.blocks(codes).reshape(-1), codes.whole
        else:
            assert not isinstance(part, Codes)
            found[number] = _encoded(entry, part, code)
    return found, scales


def _encoded(entry: Entry, values: Array, code: GGMLQuantizationType) -> Array:
    """Numbers as bytes of a type; (..., rows, columns) in blocks along columns."""
    with np.errstate(over="ignore"):  # told below, by name
        made = quantize(np.ascontiguousarray(values), code)
    if code == GGMLQuantizationType.F16 and not np.isfinite(made).all():
        raise ValueError(f"{entry.weight.name}: values beyond f16; take bf16 or f32")
    return np.ascontiguousarray(made).reshape(-1).view(np.uint8)
