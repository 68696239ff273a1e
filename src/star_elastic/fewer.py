"""Codes of eight bits as codes of four, while they are cut: one file serves both precisions.

A code of eight bits, rounded to its upper four, is a code of four whose step is sixteen times as
long (Matryoshka Quantization, arXiv 2502.06786, eq. 6). Engines read codes of four and eight bits;
`ElasticModel` reads eight at any number below.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from star_elastic.folder import Spec
from star_elastic.layout import Weight

BITS = 4
_STEP = 1 << (8 - BITS)
_HELD = (1, 4)  # elements of an int32: four codes of eight bits
_TAKEN = (1, 8)
Convert = Callable[[memoryview], memoryview]


@dataclass(frozen=True)
class Fewer:
    """What becomes of one tensor: its new named shape, its new dtype and shape, its bytes."""

    weight: Weight
    spec: Spec
    convert: Convert


def fewer(name: str, weight: Weight, spec: Spec, codes: Weight | None) -> Fewer | None:
    """A tensor of a slice at four bits; None: it stays as it is.

    Args:
        codes: the `weight_packed` beside a scale.
    """
    leaf = name.rpartition(".")[2]
    if leaf == "weight_packed" and weight.blocks == _HELD:
        rows, columns = spec.shape
        halved = Spec(name, spec.dtype, (rows, columns * _HELD[1] // _TAKEN[1]))
        return Fewer(replace(weight, blocks=_TAKEN), halved, _codes)
    if leaf == "weight_scale" and codes is not None and codes.blocks == _HELD:
        return Fewer(weight, spec, _SCALES[spec.dtype])
    return None


def declared(path: Path, config: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """The `quantization_config` of a slice at four bits.

    Raises:
        ValueError: other bits, or a parent that is not all codes of eight bits in groups.
    """
    where = f"{path / 'config.json'}: quantization_config"
    if bits != BITS:
        raise ValueError(f"bits {bits}: engines read codes of {BITS} and 8 bits")
    found = copy.deepcopy(config.get("quantization_config")) or {}
    groups = found.get("config_groups", {})
    schemes = [group.get("weights") or {} for group in groups.values()]
    wanted = {"num_bits": 8, "type": "int", "strategy": "group", "symmetric": True}
    for scheme in schemes or [{}]:
        for key, value in wanted.items():
            if scheme.get(key) != value:
                raise ValueError(
                    f"{where}: {key} is {scheme.get(key)!r}, and bits {bits} are taken from "
                    f"{value!r} only (quantize --format int8 --group N)"
                )
        scheme["num_bits"] = bits
    return found


def _codes(data: memoryview) -> memoryview:
    """Each code rounded to its upper half, the largest clamped; two to a byte, the first low."""
    codes = np.frombuffer(data, np.uint8)
    upper = (np.minimum(codes, 255 - _STEP // 2) + np.uint8(_STEP // 2)) >> BITS
    return (upper[::2] | (upper[1::2] << BITS)).data


def _scales(dtype: type[np.floating]) -> Convert:
    return lambda data: (np.frombuffer(data, dtype) * dtype(_STEP)).view(np.uint8).data


def _bfloat16(data: memoryview) -> memoryview:
    """Through float32, of which it is the upper half: times a power of two is exact."""
    wide = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return ((wide * np.float32(_STEP)).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).data


_SCALES: dict[str, Convert] = {
    "BF16": _bfloat16,
    "F16": _scales(np.float16),
    "F32": _scales(np.float32),
}
