"""Formats whose codes are small floating-point numbers: FP8 (E4M3) and NVFP4 (E2M1 in blocks)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from star_elastic.folder import Spec
from star_elastic.precision.format import (
    Format,
    Scales,
    in_blocks,
    largest_of,
    paired,
    positive,
    scaled,
    stored_scale,
)

_E4M3 = torch.float8_e4m3fn
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The least magnitude of each next code, and whether it belongs to it: ties go to even codes.
_E2M1_STEPS = ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_NO_BLOCK_SCALE = 0.125  # what compressed-tensors puts where an E4M3 scale would be 0


class FP8(Format):
    """E4M3 and one scale a matrix: compressed-tensors' `float-quantized`, strategy `tensor`."""

    name = "fp8"
    has_whole = True

    def specs(self, module: str, rows: int, columns: int, dtype: torch.dtype) -> list[Spec]:
        """`weight` (rows, columns) and `weight_scale` (1)."""
        return [
            Spec(f"{module}.weight", "F8_E4M3", (rows, columns)),
            Spec(f"{module}.weight_scale", stored_scale(dtype), (1,)),
        ]

    def whole(self, largest: Tensor) -> dict[str, Tensor]:
        """The largest magnitude becomes 448."""
        return {"weight_scale": positive(largest / _E4M3_MAX).reshape(1)}

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Rounded to nearest, ties to even; -0 becomes 0, as adding a zero point makes it."""
        steps = (weight / scales["weight_scale"]).add_(0.0)
        return steps.clamp_(-_E4M3_MAX, _E4M3_MAX).to(_E4M3)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code times scale."""
        return codes.float() * scales["weight_scale"].float()


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
        found = largest_of(in_blocks(weight, self.block)) / _E2M1_MAX
        scale = (_global(whole) * found.float()).clamp(-_E4M3_MAX, _E4M3_MAX).to(_E4M3)
        least = torch.tensor(_NO_BLOCK_SCALE)
        return {"weight_scale": torch.where(scale.float() == 0, least, scale.float()).to(_E4M3)}

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Rounded to nearest, ties to even; what is negative keeps its sign, also as zero."""
        divisor = scales["weight_scale"].float() / _global(scales)
        steps = (in_blocks(weight, self.block).float() / divisor[..., None]).view(len(weight), -1)
        codes = (steps < 0).to(torch.uint8) * 8
        steps.abs_()
        codes += steps > 0.25
        for least, included in _E2M1_STEPS:
            codes += steps >= least if included else steps > least
        return paired(codes)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """Code times its block's scale times the matrix's."""
        values = _pairs(codes.device)[codes.int()].flatten(-2)
        scale = scales["weight_scale"].float() * scales["weight_scale_2"]
        return scaled(values, scale, self.block)


def _global(scales: Scales) -> Tensor:
    """compressed-tensors' global scale: of the numbers whose reciprocal is stored, the roundest.

    It has the few digits of the matrix's dtype. In float32 several numbers may have one reciprocal.
    """
    stored = scales["weight_scale_2"]
    near = (1 / stored).view(torch.int32) + torch.tensor([0, -1, 1], dtype=torch.int32)
    is_one = 1 / near.view(torch.float32) == stored  # none, in a file that others wrote
    roundness = torch.where(is_one, near & -near, 0).long()  # its lowest bit that is set
    best = (4 * roundness - torch.arange(3)).argmax(0, keepdim=True)  # of equals the first
    return near.gather(0, best)[0].view(torch.float32)


def _pairs(device: torch.device) -> Tensor:
    """What the two codes of every byte stand for, (256, 2): one look-up instead of two."""
    byte = torch.arange(256, device=device)
    magnitudes = torch.tensor(_E2M1, device=device)
    codes = torch.stack([byte & 15, byte >> 4], -1)
    return magnitudes[codes & 7] * (1 - 2 * (codes >> 3))
