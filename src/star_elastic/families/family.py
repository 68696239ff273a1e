"""What a family table says: the named shape of every weight, in the family's own config fields.

Grammar of a shape: `,` separates dimensions, `+` concatenates segments inside one dimension, `*`
multiplies factors, outermost first; ` if FIELD` at the end makes the weight depend on a config
flag. A brace in a *name* is an axis too: `{layer}` and the family's expert field. Names are those
of the published checkpoint, written with the in-memory prefix (`disk_prefix` maps the two).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Probe:
    """Where a calibration pass looks to score units: one side of one module.

    `output` and `input` are the activations that leave or enter the module which owns the weight;
    `segment` picks one segment of the named dimension; `experts` looks inside a routed-expert
    block. `fields` are the axes scored there.
    """

    module: str
    side: Literal["input", "output", "experts"]
    fields: tuple[str, ...]
    segment: int = 0


@dataclass(frozen=True)
class Family:
    """One model family as data. `derived` symbols are `a / b` (a ratio) or `a or b` (an alias)."""

    model_type: str
    blocks: Callable[[Any], list[tuple[str, ...]]]  # config -> the parts of every layer
    depth: Callable[[Any, Sequence[int]], dict[str, Any]]  # config fields once only these stay
    outside: Mapping[str, str]  # weights outside the layers
    parts: Mapping[str, Mapping[str, str]]  # part -> weights below `layer_prefix`
    axes: tuple[str, ...]  # config fields that may shrink
    split: tuple[str, ...]  # axes that engines share out over tensor-parallel ranks
    norms: frozenset[str]  # RMS norms: they divide by the width that is kept
    # where units are masked: weight -> its dimensions; each unit once on its way through a layer
    masked: Mapping[str, tuple[int, ...]]
    derived: Mapping[str, str]
    probes: Mapping[str, tuple[Probe, ...]]  # part (or "outside") -> probes
    cache: Mapping[str, Mapping[str, str]]  # part -> state tensors per sequence (or per token)
    layer_prefix: str = "model.layers.{layer}."
    experts: str | None = None  # the field that counts routed experts
    top_k: str = "num_experts_per_tok"
    # fused in-memory tensor -> the published per-expert tensors it stacks and concatenates
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()  # weights that stock classes keep as buffers
    disk_prefix: tuple[str, str] | None = None  # (in memory, on disk)
    tied: Mapping[str, str] = field(default_factory=dict)  # weight dropped when embeddings are tied
    ignored: tuple[str, ...] = ()  # prefixes that stock classes skip on load
