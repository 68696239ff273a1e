"""What a submodel may cost: the metrics, the numbers people write, the sizes on offer.

A cost is a number, or a tensor that a router can differentiate, in the metric's own unit:
parameters, bytes or milliseconds.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from star_elastic.layout import Layout
from star_elastic.shapes import Sizes
from star_elastic.submodel import Strict, check_fields
from star_elastic.symbols import DEPTH, symbol_of

Kind = Literal["params", "active", "memory", "latency"]
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_TOKENS = {"": 1, "k": 2**10, "m": 2**20}
_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_TIMES = {"": 1, "ms": 1, "s": 1000}


class LatencyTable(Strict):
    """Milliseconds measured on one device over a full grid of some axes' choices.

    `milliseconds` is row-major, the last axis fastest. `prefill` runs `context` tokens a sequence;
    `decode` runs one more token on a cache of `context`. Fields outside the grid were the parent's.
    """

    device: str
    dtype: str
    mode: Literal["prefill", "decode"]
    batch: int = Field(ge=1)
    context: int = Field(ge=1)
    axes: dict[str, list[int]] = Field(min_length=1)
    milliseconds: list[float]

    @model_validator(mode="after")
    def _is_a_grid(self) -> "LatencyTable":
        for field, choices in self.axes.items():
            if not choices or choices[0] < 1 or any(a >= b for a, b in pairwise(choices)):
                raise ValueError(f"axes.{field} = {choices}: not positive and ascending")
        points = math.prod(map(len, self.axes.values()))
        if len(self.milliseconds) != points:
            raise ValueError(f"milliseconds: {len(self.milliseconds)} values for {points} points")
        for value in self.milliseconds:
            if value <= 0:
                raise ValueError(f"milliseconds: {value} is no time")
        return self

    def at(self, layout: Layout, sizes: Sizes) -> Any:
        """Milliseconds at any size: multilinear between grid points, exact on them, flat outside.

        Differentiable where `sizes` holds tensors; at a grid point the slope is the left one.
        """
        values = [value_on(layout, sizes, field) for field in self.axes]
        corners: list[tuple[int, Any]] = [(0, 1.0)]  # flat index, weight
        for value, choices in zip(values, self.axes.values(), strict=True):
            low, share = _place(value, choices)
            high = min(low + 1, len(choices) - 1)
            corners = [
                (flat * len(choices) + n, weight * part)
                for flat, weight in corners
                for n, part in ((low, 1 - share), (high, share))
            ]
        total: Any = sum(weight * self.milliseconds[flat] for flat, weight in corners)
        soft = [value for value in values if hasattr(value, "item")]
        return total.to(soft[0].dtype) if soft else total

    def check(self, layout: Layout) -> None:
        """Hold the grid against a parent.

        Raises:
            ValueError: an axis or choice that this parent does not have.
        """
        for field, choices in self.axes.items():
            for choice in choices:
                try:
                    check_fields(layout, {field: choice})
                except ValueError as error:
                    raise ValueError(f"latency table: axes.{field}: {error}") from None


class Metric(Strict):
    """What is counted: `params`, `active` (parameters a token uses), `memory` or `latency`.

    `memory` is bytes of weights, KV cache and states for `batch` sequences of `context` tokens in
    `dtype`; `latency` is milliseconds by `table`. It round-trips through JSON (`model_dump_json`).
    """

    kind: Kind
    context: int = Field(default=4096, ge=1)
    batch: int = Field(default=1, ge=1)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    table: LatencyTable | None = None

    @model_validator(mode="after")
    def _has_its_table(self) -> "Metric":
        if (self.kind == "latency") != (self.table is not None):
            raise ValueError("table: latency needs one, other metrics have none")
        return self

    def cost(self, layout: Layout, sizes: Sizes) -> Any:
        """The cost of a submodel, in `unit`s; differentiable where `sizes` holds tensors."""
        if self.table is not None:
            return self.table.at(layout, sizes)
        if self.kind == "memory":
            return layout.memory(self.context, self.batch, sizes, self.dtype)
        return layout.count(sizes) if self.kind == "params" else layout.count_active(sizes)

    def describe(self) -> str:
        """The metric in words."""
        if self.table is not None:
            t = self.table
            return f"latency of {t.mode}, batch {t.batch}, context {t.context}, on {t.device}"
        if self.kind == "memory":
            return f"memory at context {self.context}, batch {self.batch}, {self.dtype}"
        return {"params": "total", "active": "active"}[self.kind] + " parameters"

    def amount(self, cost: float) -> str:
        """A cost for people, with its unit."""
        if self.kind == "latency":
            return f"{cost:.4g} ms"
        if self.kind != "memory":
            return f"{cost:,.0f} parameters"
        unit = next((name for name in ("TiB", "GiB", "MiB") if cost >= _BINARY[name.lower()]), None)
        return f"{cost / _BINARY[unit.lower()]:.2f} {unit}" if unit else f"{cost:,.0f} B"


def parse_count(text: str, flag: str) -> int:
    """Parameters: `17B`, `2.5B`, `350M`, `1_000_000`.

    Raises:
        ValueError: naming flag and text.
    """
    return round(_number(text, flag, _COUNTS, "parameters, such as 17B, 350M or 1_000_000"))


def parse_bytes(text: str, flag: str) -> int:
    """Bytes with their unit: `24GiB` (of 1024), `24GB` (of 1000).

    Raises:
        ValueError: naming flag and text.
    """
    return round(_number(text, flag, _DECIMAL | _BINARY, "memory, such as 24GiB or 24GB"))


def parse_shard_size(text: str) -> int:
    """`--max-shard-size`: bytes with their unit, or a plain number of them.

    Raises:
        ValueError: naming flag and text.
    """
    return int(text) if text.isdecimal() else parse_bytes(text, "--max-shard-size")


def parse_tokens(text: str, flag: str) -> int:
    """Tokens: `4096`, `32k` (of 1024, as contexts are told).

    Raises:
        ValueError: naming flag and text.
    """
    return round(_number(text, flag, _TOKENS, "tokens, such as 4096 or 32k"))


def parse_milliseconds(text: str, flag: str) -> float:
    """Milliseconds: `20`, `20ms`, `1.5s`.

    Raises:
        ValueError: naming flag and text.
    """
    return float(_number(text, flag, _TIMES, "time, such as 20, 20ms or 1.5s"))


def parse_field(text: str, flag: str) -> tuple[str, int]:
    """A config field and its number: `hidden_size=96`.

    Raises:
        ValueError: naming flag and text.
    """
    field, _, value = text.partition("=")
    try:
        return field, int(value)
    except ValueError:
        raise ValueError(f"{flag} {text}: not of the form field=number") from None


def step_on(layout: Layout, field: str, multiple_of: int = 1) -> int:
    """The least step of an axis: a multiple of `multiple_of` that fills the heads' groups."""
    for text in layout.family.derived.values():
        whole, _, groups = text.partition(" / ")
        if whole == field:
            return math.lcm(multiple_of, layout.sizes[groups])
    return multiple_of


def choices(
    layout: Layout,
    axes: Mapping[str, Sequence[int]],
    multiple_of: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """Every value that may be asked for between the smallest choice declared and the parent's.

    Args:
        axes: axis -> the choices declared; they stay on offer whatever `multiple_of` says.

    Raises:
        ValueError: an axis or a choice that this parent does not have, or a step below one.
    """
    offered = {}
    smallest = {field: min(declared) for field, declared in axes.items()}
    check_fields(layout, smallest)
    for field, declared in axes.items():
        multiple = (multiple_of or {}).get(field, 1)
        if multiple < 1:
            raise ValueError(f"multiple_of: {field} = {multiple} is not a positive integer")
        step = step_on(layout, field, multiple)
        top, least = layout.sizes[field], smallest[field]
        steps = range(math.ceil(least / step) * step, top + 1, step)
        values = sorted({*declared, *steps, top})
        # a value may need another axis to shrink too: few experts, fewer of them per token
        offered[field] = [
            value
            for value in values
            if _holds(layout, {field: value}) or _holds(layout, {**smallest, field: value})
        ]
    return offered


def value_on(layout: Layout, sizes: Sizes, field: str) -> Any:
    """The size on an axis, from the symbols that shapes use; a tensor if they are.

    Depth is the number of layers there; of values per layer it is the mean over the layers that
    have the axis, weighted by how far each is there.
    """
    if field == DEPTH:
        return sum(sizes["layer"])
    symbol = symbol_of(layout.family, field)
    value, groups = sizes[symbol], 1
    if symbol != field:
        groups = layout.sizes[layout.family.derived[symbol].partition(" / ")[2]]
    if not isinstance(value, list):
        return value * groups
    there = {layer: sizes["layer"][layer] for layer in _layers_with(layout, symbol)}
    return groups * sum(value[n] * share for n, share in there.items()) / sum(there.values())


def _layers_with(layout: Layout, symbol: str) -> list[int]:
    """The layers in whose shapes a symbol stands; experts per token go where the experts are."""
    seen = layout.family.experts if symbol == layout.family.top_k else symbol
    weights = [weight for weight in layout.weights.values() if weight.layer is not None]
    found = {w.layer for w in weights for dim in w.dims for segment in dim if seen in segment}
    return sorted(layer for layer in found if layer is not None)


def _holds(layout: Layout, fields: Mapping[str, int]) -> bool:
    try:
        check_fields(layout, fields)
    except ValueError:
        return False
    return True


def _place(value: Any, grid: Sequence[int]) -> tuple[int, Any]:
    """The grid point below a value, and how far it is to the next: 0 to 1."""
    soft = hasattr(value, "item")  # a tensor; this module itself needs no torch
    if len(grid) == 1:
        return 0, 0.0 * value.double() if soft else 0.0
    here = value.item() if soft else value
    low = min(max(bisect_left(grid, here) - 1, 0), len(grid) - 2)
    start, width = grid[low], grid[low + 1] - grid[low]
    if soft:
        return low, ((value.double() - start) / width).clamp(0, 1)
    return low, min(max((here - start) / width, 0.0), 1.0)


def _number(text: str, flag: str, units: Mapping[str, int], such_as: str) -> Fraction:
    found = re.fullmatch(r"(\d[\d_]{0,20}(?:\.\d{1,9})?) ?([A-Za-z]*)", text.strip())
    unit = units.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f"{flag} {text}: not a number of {such_as}")
    number = Fraction(found[1].replace("_", "")) * unit
    if round(number * 1000) <= 0:
        raise ValueError(f"{flag} {text}: must be above zero")
    return number
