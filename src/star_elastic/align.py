"""Widths that engines and number formats can use: multiples along the input of every matrix.

Blocks of NVFP4, MX and GGUF formats lie along a matrix's input dimension, kernels want that
dimension in whole tiles, and tensor parallelism splits it evenly over ranks. Which axes make up
which input is read from the named shapes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from star_elastic.layout import Layout, Weight
from star_elastic.shapes import Segment, width
from star_elastic.submodel import Fields, per_layer
from star_elastic.symbols import symbol_of

# elements under one scale: NVIDIA's NVFP4, OCP Microscaling (MXFP4), llama.cpp's K-quants
TARGETS = {"nvfp4": 16, "mxfp4": 32, "gguf": 256}


@dataclass(frozen=True)
class Alignment:
    """What a target needs: inputs in multiples of `multiple` on each of `ranks` ranks."""

    multiple: int = 1
    ranks: int = 1

    @classmethod
    def parse(cls, text: str | None, ranks: int = 1) -> "Alignment":
        """`16`, `128`, or a target: `nvfp4`, `mxfp4`, `gguf`.

        Raises:
            ValueError: neither a positive number nor a target we know.
        """
        if text is None:
            multiple = 1
        elif text.lower() in TARGETS:
            multiple = TARGETS[text.lower()]
        elif text.isdecimal() and int(text):
            multiple = int(text)
        else:
            known = ", ".join(TARGETS)
            raise ValueError(f"--align {text}: not a positive number, nor one of {known}")
        if ranks < 1:
            raise ValueError(f"--tensor-parallel {ranks}: not a positive number of ranks")
        return cls(multiple, ranks)

    def for_codes(self, weights: Iterable[Weight]) -> "Alignment":
        """The same, and no cut inside a block of the codes that stand on disk."""
        blocks = {block for weight in weights for block in weight.blocks}
        return replace(self, multiple=math.lcm(self.multiple, *blocks))

    def steps(self, layout: Layout) -> dict[str, int]:
        """For every axis, the step in which it may shrink, other axes being the parent's."""
        return {axis: self._step(layout, axis) for axis in layout.axes}

    def check(self, layout: Layout, fields: Fields) -> None:
        """Hold a size against the target. Dimensions that it does not cut are the parent's affair.

        Raises:
            ValueError: naming a field, its value, and the nearest values that would do.
        """
        if uneven := per_layer(fields):
            layers = range(len(layout.blocks))
            even = {name: value for name, value in fields.items() if name not in uneven}
            for layer in layers:
                self.check(layout, even | {name: uneven[name][layer] for name in uneven})
            return
        for axis in layout.family.split:
            if axis in fields and fields[axis] % self.ranks:  # type: ignore[operator]
                raise ValueError(f"{axis} = {fields[axis]} does not divide over {self.ranks} ranks")
        child = layout.sizes_of(fields)
        for weight, segment in _inputs(layout):
            whole, kept = width((segment,), layout.sizes), width((segment,), child)
            need = self.multiple * (self.ranks if _is_split(layout, segment) else 1)
            if kept != whole and kept % need:
                raise self._refusal(layout, fields, weight, segment, kept, need)

    def _step(self, layout: Layout, axis: str) -> int:
        symbol = symbol_of(layout.family, axis)
        step = self.ranks if axis in layout.family.split else 1
        for _, segment in _inputs(layout):
            if symbol in segment:
                need = self.multiple * (self.ranks if _is_split(layout, segment) else 1)
                others = width((tuple(s for s in segment if s != symbol),), layout.sizes)
                groups = layout.sizes[axis] // layout.sizes[symbol]
                step = math.lcm(step, need // math.gcd(need, others) * groups)
        return step

    def _refusal(
        self,
        layout: Layout,
        fields: Fields,
        weight: Weight,
        segment: Segment,
        kept: int,
        need: int,
    ) -> ValueError:
        axis = next(a for a in fields if symbol_of(layout.family, a) in segment)
        step, value = self._step(layout, axis), fields[axis]
        assert isinstance(value, int)
        near = [n for n in (value // step * step, -(-value // step) * step) if n]
        return ValueError(
            f"{axis} = {value}: the input of {weight.suffix}, {kept}, is not a multiple of {need}; "
            f"{' or '.join(str(min(n, layout.sizes[axis])) for n in near)} would do"
        )


def advice(layout: Layout, weights: Mapping[str, Weight], fields: Fields) -> str | None:
    """Why a size would cut inside a block of some weights, and the nearest values that would do."""
    child = layout.sizes_of(fields)
    try:
        for _, weight in layout.kept(child, weights):
            weight.cuts(layout.sizes, child)
    except ValueError as error:
        try:
            Alignment().for_codes(weights.values()).check(layout, fields)
        except ValueError as better:
            return str(better)
        return str(error)
    return None


def _inputs(layout: Layout) -> Iterator[tuple[Weight, Segment]]:
    """The segments of every matrix's input dimension, each once."""
    seen = set()
    for weight in layout.weights.values():
        if len(weight.dims) >= 2 and weight.suffix not in seen and not weight.is_buffer:
            seen.add(weight.suffix)
            for segment in weight.dims[-1]:
                yield weight, segment


def _is_split(layout: Layout, segment: Segment) -> bool:
    """Do tensor-parallel ranks share this dimension out?"""
    return any(symbol_of(layout.family, axis) in segment for axis in layout.family.split)
