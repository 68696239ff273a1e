"""What a number format is: scales from a matrix, codes from a matrix and scales, what codes mean.

`encode` takes the scales as they are stored, so that the codes of a slice, made with the parent's
scales, are the slice of the parent's codes.

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


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a matrix's arithmetic, and of its scales where the format leaves it open."""
    return torch.float32 if dtype == torch.float16 else dtype


def stored_scale(dtype: torch.dtype) -> str:
    """The dtype of scales on disk where the format leaves it open, for a matrix of some dtype."""
    return STORED_AS[str(computed_in(dtype)).removeprefix("torch.")]


def positive(scale: Tensor) -> Tensor:
    """Zero becomes the dtype's epsilon, as nothing can be divided by it."""
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def largest_of(values: Tensor) -> Tensor:
    """The largest magnitude along the last dimension."""
    low, high = torch.aminmax(values, dim=-1)
    return torch.maximum(-low, high)


def in_blocks(weight: Tensor, block: int) -> Tensor:
    """(rows, columns) as (rows, columns / block, block)."""
    return weight.unflatten(-1, (-1, block))


def paired(codes: Tensor) -> Tensor:
    """Pairs of codes of four bits as bytes, the first in the low half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def apart(packed: Tensor) -> Tensor:
    """The inverse of `paired`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def scaled(values: Tensor, scale: Tensor, block: int) -> Tensor:
    """Values times the scales of their blocks of columns."""
    return (in_blocks(values, block) * scale[..., None]).flatten(-2)
