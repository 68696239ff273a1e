"""Quantized tensors on disk as named shapes: the same weights, in blocks, and their scales.

Known are the layouts that compressed-tensors and ModelOpt write for FP8, INT8, INT4, NVFP4 and
MXFP4. A scale of a whole tensor belongs to every size; a scale of a block is cut with its block, so
that a cut must fall between blocks.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from star_elastic.folder import Stored
from star_elastic.layout import Layout, Weight
from star_elastic.shapes import Dim, Sizes

SHAPE = "weight_shape"  # a tensor whose two values are the shape of the weight beside it
_ONE: Dim = (("1",),)
# (suffix, dtype) -> elements per stored index (rows, columns), and what must stand beside it
_CODES: dict[tuple[str, str], tuple[list[tuple[int, int]], set[str]]] = {
    ("weight", "F8_E4M3"): ([(1, 1)], {"weight_scale"}),
    ("weight", "I8"): ([(1, 1)], {"weight_scale"}),
    ("weight", "U8"): ([(1, 2)], {"weight_scale", "weight_scale_2"}),
    ("weight_packed", "U8"): ([(1, 2)], {"weight_scale"}),
    ("weight_packed", "I32"): ([(1, 8), (1, 4)], {"weight_scale", SHAPE}),
}
_SCALES = {"weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point"}
_SCALE_DTYPES = {"F32", "F16", "BF16", "F8_E4M3", "U8"}  # U8: powers of two
_ZERO_DTYPES = {"I8", "U8", "I32", "F8_E4M3"}
SCALARS = {"input_scale", "input_global_scale", "k_scale", "v_scale", "q_scale"}  # of activations
_LAYER = re.compile(r"layers\.(\d+)(?![^.])")  # a layer by its number, as a name


def packed_weights(layout: Layout, stored: Mapping[str, Stored]) -> dict[str, Weight]:
    """What each stored tensor is, quantized or not, by its name on disk.

    Tensors that the layout does not know are left out.

    Raises:
        ValueError: naming a tensor whose codes or scales do not fit its weight, or are missing.
    """
    found: dict[str, Weight] = {}
    modules: dict[str, Weight] = {}
    for name, weight in layout.stored.items():
        module = name.rpartition(".")[0]
        modules.setdefault(module, weight)
        modules.setdefault(module.rpartition(".")[0], weight)
        here = name if name in stored else f"{module}.weight_packed"
        if here in stored and _is_coded(weight, here, stored[here]):
            found |= dict(_coded(layout, weight, here, stored))
        else:
            found[name] = weight
    for name in sorted(stored.keys() - found.keys()):
        module, _, leaf = name.rpartition(".")
        if leaf in SCALARS and module in modules:
            found[name] = _scalar(name, modules[module], stored[name])
    return found


def is_quantized(weights: Mapping[str, Weight], layout: Layout) -> bool:
    """Does any weight stand on disk as codes?"""
    return weights.keys() != layout.stored.keys()


def shape_told(codes: Weight, sizes: Sizes) -> list[int]:
    """What the `weight_shape` beside some codes tells of a size: its rows and columns."""
    return [n * block for n, block in zip(codes.shape(sizes), codes.blocks, strict=True)]


def renumbered(declared: Any, kept: Mapping[int, int]) -> Any:
    """A `quantization_config` for a model that keeps some layers: parent's number -> its own.

    Names of dropped layers go; patterns stay, unless they tell layers by number.

    Raises:
        ValueError: such a pattern, where numbers change.
    """
    if isinstance(declared, dict):
        return {key: renumbered(value, kept) for key, value in declared.items()}
    if isinstance(declared, list):
        several = [renumbered(value, kept) for value in declared]
        return [new for new, old in zip(several, declared, strict=True) if new or new == old]
    if not isinstance(declared, str) or all(old == new for old, new in kept.items()):
        return declared
    if found := _LAYER.search(declared):
        new = kept.get(int(found[1]))
        return "" if new is None else _LAYER.sub(f"layers.{new}", declared, count=1)
    if re.search(r"\d", declared.partition("layers")[2]):
        raise ValueError(f"quantization_config: {declared!r} tells layers by number")
    return declared


def _is_coded(weight: Weight, name: str, stored: Stored) -> bool:
    """Does a matrix stand on disk in a dtype of codes?"""
    return len(weight.dims) == 2 and (name.rpartition(".")[2], stored.dtype) in _CODES


def _coded(
    layout: Layout, weight: Weight, name: str, stored: Mapping[str, Stored]
) -> Iterator[tuple[str, Weight]]:
    """The codes of a weight, and the scales beside them."""
    here, whole = stored[name], weight.shape(layout.sizes)
    module, _, leaf = name.rpartition(".")
    blocks, needed = _CODES[leaf, here.dtype]
    yield name, _in_blocks(weight, name, whole, here, blocks)
    for suffix in sorted(needed):
        if f"{module}.{suffix}" not in stored:
            raise ValueError(f"{here.file}: {name}: dtype {here.dtype}, and no {suffix} beside it")
    for suffix in sorted(_SCALES):
        if (scale := f"{module}.{suffix}") in stored:
            yield scale, _scale(weight, scale, whole, stored[scale])
    if SHAPE in needed:
        shape = f"{module}.{SHAPE}"
        if stored[shape].dtype not in ("I32", "I64") or stored[shape].shape != (2,):
            raise ValueError(f"{stored[shape].file}: {shape}: not two integers")
        yield shape, replace(weight, name=shape, dims=((("2",),),), blocks=())


def _in_blocks(
    weight: Weight,
    name: str,
    whole: tuple[int, ...],
    stored: Stored,
    allowed: list[tuple[int, int]],
) -> Weight:
    for blocks in allowed:
        held = tuple(n * block for n, block in zip(stored.shape, blocks, strict=False))
        if len(stored.shape) == 2 and held == whole:
            return replace(weight, name=name, blocks=blocks)
    raise _misfit(name, stored, whole)


def _scale(weight: Weight, name: str, whole: tuple[int, ...], stored: Stored) -> Weight:
    """Scales of the whole tensor, of its rows, or of blocks along its columns."""
    is_zero = name.endswith("zero_point")
    if stored.dtype not in (_ZERO_DTYPES if is_zero else _SCALE_DTYPES):
        raise ValueError(f"{stored.file}: {name}: dtype {stored.dtype} is none of a scale")
    if all(n == 1 for n in stored.shape):
        return _scalar(name, weight, stored)
    shape, (rows, columns) = list(stored.shape), whole
    packed = is_zero and stored.dtype == "I32" and shape[0] * 8 == rows
    first = 8 if packed else 1
    if shape[0] * first != rows or len(shape) > 2:
        raise _misfit(name, stored, whole)
    if len(shape) == 1:
        return replace(weight, name=name, dims=weight.dims[:1], blocks=(first,))
    if shape[1] == 1 and stored.dtype != "F8_E4M3":  # such a one is of a block, the only one
        return replace(weight, name=name, dims=(weight.dims[0], _ONE), blocks=(first, 1))
    if not shape[1] or columns % shape[1]:
        raise _misfit(name, stored, whole)
    return replace(weight, name=name, blocks=(first, columns // shape[1]))


def _scalar(name: str, weight: Weight, stored: Stored) -> Weight:
    """One value for a whole tensor: every size has it."""
    if any(n != 1 for n in stored.shape):
        raise ValueError(f"{stored.file}: {name}: shape {stored.shape}, expected one value")
    return replace(weight, name=name, dims=(_ONE,) * len(stored.shape), blocks=())


def _misfit(name: str, stored: Stored, whole: tuple[int, ...]) -> ValueError:
    shape, dtype = stored.shape, stored.dtype
    return ValueError(f"{stored.file}: {name}: shape {shape} of {dtype} does not fit {whole}")
