"""Formats whose codes are integers: INT8 a row, INT4 and INT8 in groups of columns."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from star_elastic.folder import Spec
from star_elastic.precision.format import (
    Format,
    Scales,
    apart,
    in_blocks,
    largest_of,
    paired,
    positive,
    scaled,
    stored_scale,
)

# What the largest magnitude of a group becomes: all of the range of eight bits, or less of it.
_REACHES = (127.5, 123.5, 119.5, 115.5, 111.5)


class INT8(Format):
    """-128 to 127 and a scale a row: compressed-tensors' `int-quantized`, strategy `channel`."""

    name = "int8"

    def specs(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> list[Spec]:
        """`weight` (rows, columns) and `weight_scale` (rows, 1)."""
        return [
            Spec(f"{module}.weight", "I8", (rows, columns)),
            Spec(f"{module}.weight_scale", stored_scale(dtype), (rows, 1)),
        ]

    def rows(self, weight: Tensor, whole: Scales) -> dict[str, Tensor]:
        """The largest magnitude of a row becomes 127.5."""
        return {"weight_scale": positive(largest_of(weight) / 127.5)[:, None]}

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Rounded to nearest, ties to even."""
        return (weight / scales["weight_scale"]).clamp_(-128, 127).round_().to(torch.int8)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code times its row's scale."""
        return codes.float() * scales["weight_scale"].float()


@dataclass(frozen=True)
class Groups(Format):
    """Signed codes and a scale a group of columns: compressed-tensors' `pack-quantized`.

    Codes have half their range added and fill int32s, the first in the lowest bits.
    """

    codes = "weight_packed"
    bits: ClassVar[int]
    block: int = 128

    def __post_init__(self) -> None:
        """Refuse groups that would share an int32, at four bits a code too."""
        if self.block < 8 or self.block % 8:
            raise ValueError(f"--group {self.block}: not a multiple of 8, the codes of an int32")

    def specs(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> list[Spec]:
        """`weight_packed` (rows, columns * bits / 32), `weight_scale` (rows, groups), shape."""
        return [
            Spec(f"{module}.weight_packed", "I32", (rows, columns // self.packed)),
            Spec(f"{module}.weight_scale", stored_scale(dtype), (rows, columns // self.block)),
            Spec(f"{module}.weight_shape", "I64", (2,)),
        ]

    def rows(self, weight: Tensor, whole: Scales) -> dict[str, Tensor]:
        """The largest magnitude of a group becomes half the range, less a half."""
        found = largest_of(in_blocks(weight, self.block)) / (self._half - 0.5)
        return {"weight_scale": positive(found)}

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Rounded to nearest, ties to even."""
        steps = in_blocks(weight, self.block) / scales["weight_scale"][..., None]
        steps = steps.clamp_(-self._half, self._half - 1).round_() + self._half
        codes = steps.to(torch.uint8).view(len(weight), -1)
        return (paired(codes) if self.bits == 4 else codes).view(torch.int32)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code minus half the range, times its group's scale."""
        stored = codes.view(torch.uint8)
        values = (apart(stored) if self.bits == 4 else stored).float() - self._half
        return scaled(values, scales["weight_scale"].float(), self.block)

    @property
    def _half(self) -> int:
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class INT4(Groups):
    """-8 to 7 and a scale a group."""

    name = "int4"
    packed = 8
    bits = 4


@dataclass(frozen=True)
class INT8Groups(Groups):
    """-128 to 127 and a scale a group, which may be read at fewer bits.

    Rounded to `read` bits, the codes are those of a smaller format whose step is so many times
    as long: a file of eight bits holds one of four (Matryoshka Quantization, arXiv 2502.06786,
    eq. 6: `round(code / 2^(8 - read))`, clamped). A group's scale is the one of `_REACHES` whose
    four bits are nearest to the numbers; none cuts the range of the eight short.
    """

    name = "int8"
    packed = 4
    bits = 8
    read: int = 8

    def __post_init__(self) -> None:
        """Refuse groups that would share an int32, and bits that are not there."""
        super().__post_init__()
        if not 2 <= self.read <= self.bits:
            raise ValueError(f"bits {self.read}: codes of {self.bits} are read at 2 to {self.bits}")

    def rows(self, weight: Tensor, whole: Scales) -> dict[str, Tensor]:
        """Of several scales a group the one with the least squared error at four bits."""
        largest, four = largest_of(in_blocks(weight, self.block)), replace(self, read=4)
        tried = []
        for reach in _REACHES:
            scales = {"weight_scale": positive(largest / reach)}
            error = four.decode(four.encode(weight, scales), scales) - weight
            tried.append((scales["weight_scale"], in_blocks(error.square(), self.block).sum(-1)))
        best = torch.stack([error for _, error in tried]).argmin(0, keepdim=True)
        found = torch.stack([scale for scale, _ in tried]).gather(0, best)[0]
        return {"weight_scale": found}

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code minus half the range, rounded to fewer bits, times as long a step."""
        stored = codes.view(torch.uint8)
        step = 1 << (self.bits - self.read)
        if step > 1:
            stored = stored.clamp(max=255 - step // 2).add_(step // 2).bitwise_and_(256 - step)
        return scaled(stored.float() - self._half, scales["weight_scale"].float(), self.block)
