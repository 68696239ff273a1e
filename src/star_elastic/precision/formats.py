"""Four number formats: scales from a matrix, codes from a matrix and scales, and what codes mean.

Codes and scales are bit for bit those of compressed-tensors 0.20 on the same matrix: its arithmetic
is done here in the same order and in the matrix's own dtype (float16 in float32: its reciprocals
overflow). `encode` takes the scales as they are stored, so that the codes of a slice, made with
the parent's scales, are the slice of the parent's codes.

Glossary
    whole     scales of the whole matrix, from its largest magnitude
    rows      scales of its rows, or of blocks of `block` columns in each row
    scales    both, by the name that follows the module's in the file
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from star_elastic.dtypes import STORED_AS
from star_elastic.folder import Spec

Scales = Mapping[str, Tensor]
_E4M3 = torch.float8_e4m3fn
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The least magnitude of each next code, and whether it belongs to it: ties go to even codes.
_E2M1_STEPS = ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_NO_BLOCK_SCALE = 0.125  # what compressed-tensors puts where an E4M3 scale would be 0


@dataclass(frozen=True)
class Format(ABC):
    """One format; `block` is how many columns share a scale of a row, 1 where blocks are none."""

    name: ClassVar[str]
    codes: ClassVar[str] = "weight"  # the tensor of codes, by the name that follows the module's
    has_whole: ClassVar[bool] = False
    packed: ClassVar[int] = 1  # codes in one stored element
    block: int = 1

    @abstractmethod
    def specs(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> list[Spec]:
        """The tensors that stand for a matrix on disk, in order, its codes first."""

    def whole(self, largest: Tensor) -> dict[str, Tensor]:
        """Scales of the whole matrix, from its largest magnitude (no dimensions)."""
        return {}

    def rows(self, weight: Tensor, whole: Scales) -> dict[str, Tensor]:
        """Scales of some rows."""
        return {}

    @abstractmethod
    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """The codes of some rows, as stored, from scales as stored."""

    @abstractmethod
    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """What codes stand for, in float32."""


class FP8(Format):
    """E4M3 and one scale a matrix: compressed-tensors' `float-quantized`, strategy `tensor`."""

    name = "fp8"
    has_whole = True

    def specs(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> list[Spec]:
        """`weight` (rows, columns) and `weight_scale` (1)."""
        return [
            Spec(f"{module}.weight", "F8_E4M3", (rows, columns)),
            Spec(f"{module}.weight_scale", _stored(dtype), (1,)),
        ]

    def whole(self, largest: Tensor) -> dict[str, Tensor]:
        """The largest magnitude becomes 448."""
        return {"weight_scale": _positive(largest / _E4M3_MAX).reshape(1)}

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Rounded to nearest, ties to even; -0 becomes 0, as adding a zero point makes it."""
        steps = (weight / scales["weight_scale"]).add_(0.0)
        return steps.clamp_(-_E4M3_MAX, _E4M3_MAX).to(_E4M3)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code times scale."""
        return codes.float() * scales["weight_scale"].float()


class INT8(Format):
    """-128 to 127 and a scale a row: compressed-tensors' `int-quantized`, strategy `channel`."""

    name = "int8"

    def specs(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> list[Spec]:
        """`weight` (rows, columns) and `weight_scale` (rows, 1)."""
        return [
            Spec(f"{module}.weight", "I8", (rows, columns)),
            Spec(f"{module}.weight_scale", _stored(dtype), (rows, 1)),
        ]

    def rows(self, weight: Tensor, whole: Scales) -> dict[str, Tensor]:
        """The largest magnitude of a row becomes 127.5."""
        return {"weight_scale": _positive(_largest(weight) / 127.5)[:, None]}

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Rounded to nearest, ties to even."""
        return (weight / scales["weight_scale"]).clamp_(-128, 127).round_().to(torch.int8)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code times its row's scale."""
        return codes.float() * scales["weight_scale"].float()


@dataclass(frozen=True)
class INT4(Format):
    """-8 to 7 and a scale a group of columns: compressed-tensors' `pack-quantized`.

    Eight codes, each plus 8, make an int32, the first in its lowest bits.
    """

    name = "int4"
    codes = "weight_packed"
    packed = 8
    block: int = 128

    def __post_init__(self) -> None:
        """Refuse groups that would share an int32."""
        if self.block < 8 or self.block % 8:
            raise ValueError(f"--group {self.block}: not a multiple of 8, the codes of an int32")

    def specs(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> list[Spec]:
        """`weight_packed` (rows, columns / 8), `weight_scale` (rows, columns / group), shape."""
        return [
            Spec(f"{module}.weight_packed", "I32", (rows, columns // 8)),
            Spec(f"{module}.weight_scale", _stored(dtype), (rows, columns // self.block)),
            Spec(f"{module}.weight_shape", "I64", (2,)),
        ]

    def rows(self, weight: Tensor, whole: Scales) -> dict[str, Tensor]:
        """The largest magnitude of a group becomes 7.5."""
        return {"weight_scale": _positive(_largest(_blocks(weight, self.block)) / 7.5)}

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Rounded to nearest, ties to even."""
        steps = _blocks(weight, self.block) / scales["weight_scale"][..., None]
        codes = (steps.clamp_(-8, 7).round_() + 8).to(torch.uint8).view(len(weight), -1)
        return _nibbles(codes).view(torch.int32)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code minus 8, times its group's scale."""
        values = _apart(codes.view(torch.uint8)).float() - 8
        return _scaled(values, scales["weight_scale"].float(), self.block)


@dataclass(frozen=True)
class NVFP4(Format):
    """E2M1 in blocks of 16 columns, E4M3 block scales, a float32 scale a matrix: ModelOpt's layout.

    Codes and block scales are compressed-tensors'; `weight_scale_2` is the reciprocal of its global
    scale, from which encoding takes that scale back: exactly for bfloat16. For float32 it may be
    off by one in the last digit; what the file says counts.
    """

    name = "nvfp4"
    has_whole = True
    packed = 2
    block: int = 16

    def specs(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> list[Spec]:
        """`weight` (rows, columns / 2), low nibble first; scales (rows, columns / 16) and ()."""
        return [
            Spec(f"{module}.weight", "U8", (rows, columns // 2)),
            Spec(f"{module}.weight_scale", "F8_E4M3", (rows, columns // self.block)),
            Spec(f"{module}.weight_scale_2", "F32", ()),
        ]

    def whole(self, largest: Tensor) -> dict[str, Tensor]:
        """The largest magnitude becomes 448 * 6."""
        tiny = torch.finfo(largest.dtype).tiny
        found = _E4M3_MAX * _E2M1_MAX / largest.clamp(min=tiny)
        return {"weight_scale_2": 1 / found.nan_to_num(nan=1.0, posinf=1.0).float()}

    def rows(self, weight: Tensor, whole: Scales) -> dict[str, Tensor]:
        """The largest magnitude of a block becomes 6, before the scale is rounded to E4M3."""
        blocks = _largest(_blocks(weight, self.block)) / _E2M1_MAX
        scale = (_global(whole) * blocks.float()).clamp(-_E4M3_MAX, _E4M3_MAX).to(_E4M3)
        least = torch.tensor(_NO_BLOCK_SCALE)
        return {"weight_scale": torch.where(scale.float() == 0, least, scale.float()).to(_E4M3)}

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Rounded to nearest, ties to even; what is negative keeps its sign, also as zero."""
        divisor = scales["weight_scale"].float() / _global(scales)
        steps = (_blocks(weight, self.block).float() / divisor[..., None]).view(len(weight), -1)
        codes = (steps < 0).to(torch.uint8) * 8
        steps.abs_()
        codes += steps > 0.25
        for least, included in _E2M1_STEPS:
            codes += steps >= least if included else steps > least
        return _nibbles(codes)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code times its block's scale times the matrix's."""
        nibbles = _apart(codes).int()
        values = torch.tensor(_E2M1)[nibbles & 7] * (1 - 2 * (nibbles >> 3))
        scale = scales["weight_scale"].float() * scales["weight_scale_2"]
        return _scaled(values, scale, self.block)


FORMATS: tuple[type[Format], ...] = (FP8, NVFP4, INT8, INT4)


def format_of(name: str, group: int | None = None) -> Format:
    """A format by its name; `group` is how many columns share a scale of INT4.

    Raises:
        ValueError: no such format, or a group that it cannot have.
    """
    kinds = {each.name: each for each in FORMATS}
    if name not in kinds:
        raise ValueError(f"--format {name}: not one of {', '.join(kinds)}")
    if group is None:
        return kinds[name]()
    if name != INT4.name:
        raise ValueError(f"--group {group}: only int4 has groups of a chosen size")
    return INT4(group)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a matrix's arithmetic, and of its scales where the format leaves it open."""
    return torch.float32 if dtype == torch.float16 else dtype


def _stored(dtype: torch.dtype) -> str:
    return STORED_AS[str(computed_in(dtype)).removeprefix("torch.")]


def _positive(scale: Tensor) -> Tensor:
    """Zero becomes the dtype's epsilon, as nothing can be divided by it."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def _largest(values: Tensor) -> Tensor:
    low, high = torch.aminmax(values, dim=-1)
    return torch.maximum(-low, high)


def _blocks(weight: Tensor, block: int) -> Tensor:
    return weight.unflatten(-1, (-1, block))


def _global(scales: Scales) -> Tensor:
    """compressed-tensors' global scale: of the numbers whose reciprocal is stored, the roundest.

    It has the few digits of the matrix's dtype. In float32 several numbers may have one reciprocal.
    """
    stored = scales["weight_scale_2"]
    near = (1 / stored).view(torch.int32) + torch.tensor([0, -1, 1], dtype=torch.int32)
    found = near[1 / near.view(torch.float32) == stored]
    found = found if len(found) else near[:1]  # of a file that others wrote
    return found[(found & -found).argmax()].view(torch.float32)  # by the lowest bit that is set


def _nibbles(codes: Tensor) -> Tensor:
    """Pairs of codes as bytes, the first in the low half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _apart(packed: Tensor) -> Tensor:
    """The inverse of `_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _scaled(values: Tensor, scale: Tensor, block: int) -> Tensor:
    return (_blocks(values, block) * scale[..., None]).flatten(-2)
