"""Training for codes: what a size runs on is what slicing the quantized checkpoint would give it.

Quantization-aware distillation (QAD, arXiv 2601.20088): the forward pass sees decoded codes, the
gradient goes straight through to the float32 weights that AdamW keeps. A matrix is one on disk:
each expert has scales of its own, however they are fused in memory.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from star_elastic.align import Alignment, advice
from star_elastic.layout import Layout, Weight
from star_elastic.precision import Format
from star_elastic.precision.fake import Cuts, fake, straight
from star_elastic.shapes import at
from star_elastic.submodel import Fields
from star_elastic.train.parts import Narrowed


@dataclass(frozen=True)
class Coded:
    """A `Cut`: narrowed tensors, rounded to the dtype they are stored in, matrices to their codes.

    `stored` is that dtype by in-memory name; `chosen` the matrices that become codes, by theirs.
    """

    narrowed: Narrowed
    form: Format
    chosen: Mapping[str, Sequence[Weight]]
    stored: Mapping[str, torch.dtype]

    def tensors(self, layer: int | None, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The submodel's tensors of one of the parent's layers, under the parent's names."""
        kept = self.narrowed.tensors(layer, whole)
        return {name: self._value(name, whole[name], tensor) for name, tensor in kept.items()}

    def _value(self, name: str, whole: Tensor, kept: Tensor) -> Tensor:
        stored = self.stored[name]
        if name not in self.chosen and kept.dtype == stored:
            return kept
        value = kept.detach().to(stored).to(kept.dtype, copy=True)
        for piece, cuts in self._cuts.get(name, ()):
            matrix = self._layout.view({name: whole.detach()}, piece)
            target = self._layout.view({name: value}, piece, self.narrowed.sizes)
            target.copy_(fake(matrix.to(stored), self.form, cuts))
        return straight(kept, value)

    @property
    def _layout(self) -> Layout:
        return self.narrowed.layout

    @cached_property
    def _cuts(self) -> dict[str, list[tuple[Weight, Cuts]]]:
        parent, child = self._layout.sizes, self.narrowed.sizes
        experts = self._layout.family.experts or ""
        found: dict[str, list[tuple[Weight, Cuts]]] = {}
        for name, pieces in self.chosen.items():
            for piece in pieces:
                if piece.expert is None or piece.expert < at(child, piece.layer)[experts]:
                    found.setdefault(name, []).append((piece, piece.cuts(parent, child)))
        return found


class Coding:
    """How a parent's matrices become codes at every size; made once for a run.

    A format may have several readings, of more and fewer bits of the same codes; sizes learn for
    each of them in turn.
    """

    def __init__(
        self,
        layout: Layout,
        readings: Sequence[Format],
        chosen: Iterable[Weight],
        stored: Mapping[str, torch.dtype],
    ):
        """`chosen`: matrices on disk; `stored`: the dtype of each in-memory tensor on disk.

        Raises:
            ValueError: a matrix whose columns do not fill blocks.
        """
        self.layout = layout
        self.form = form = readings[0]
        self.readings = readings
        self.stored = stored
        self.chosen: dict[str, list[Weight]] = {}
        for weight in chosen:
            if (columns := weight.shape(layout.sizes)[1]) % form.block:
                raise ValueError(
                    f"quantize: {weight.name}: its {columns} columns do not fill blocks of "
                    f"{form.block}"
                )
            self.chosen.setdefault(weight.place[0], []).append(weight)

    def cut(self, fields: Fields, reading: int = 0) -> Coded:
        """The cut of a size, its codes read as in the n-th reading."""
        narrowed = Narrowed(self.layout, self.layout.sizes_of(fields))
        return Coded(narrowed, self.readings[reading], self.chosen, self.stored)

    def is_stored_in(self, dtype: torch.dtype) -> bool:
        """Are all matrices that become codes stored in this dtype?"""
        return all(self.stored[name] == dtype for name in self.chosen)

    def check(self, name: str, fields: Fields) -> None:
        """Would a size survive, every cut between blocks?

        Raises:
            ValueError: naming the size and, where there are, values that would do.
        """
        pieces = (weight for pieces in self.chosen.values() for weight in pieces)
        blocks = (1, self.form.block)
        weights = {weight.name: replace(weight, blocks=blocks) for weight in pieces}
        if reason := advice(self.layout, weights, fields):
            raise ValueError(
                f"size {name}: {reason} (blocks of {self.form.name}); "
                "`sizes` may name those that are to stay"
            )

    def steps(self, multiple_of: Mapping[str, int]) -> dict[str, int]:
        """In which steps axes shrink between blocks, in multiples of what is asked as well."""
        found = Alignment(self.form.block).steps(self.layout)
        return {axis: math.lcm(n, multiple_of.get(axis, 1)) for axis, n in found.items()}
