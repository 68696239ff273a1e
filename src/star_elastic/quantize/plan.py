"""All that is known of a quantized checkpoint before the first byte moves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from star_elastic.align import advice
from star_elastic.checkpoint import Checkpoint
from star_elastic.dtypes import STORED
from star_elastic.folder import Spec, Stored
from star_elastic.layout import Weight
from star_elastic.packed import packed_weights
from star_elastic.precision import Format, Groups, ignored, quantized
from star_elastic.submodel import ElasticSpace, Fields

_NUMBERS = {"BF16", "F32", "F16"}


@dataclass(frozen=True)
class Plan:
    """Which tensors become which, in the order of the parent's files."""

    checkpoint: Checkpoint
    format: Format
    tensors: Mapping[str, list[Spec]]  # by the parent's name: codes and scales, or itself
    chosen: frozenset[str]  # names of the parent's matrices that become codes
    weights: Mapping[str, Weight]  # what each new tensor will be, in blocks
    ignore: Sequence[str]  # modules that stay as they are

    @property
    def specs(self) -> list[Spec]:
        """The tensors to be written, in order."""
        return [spec for several in self.tensors.values() for spec in several]

    @property
    def bytes(self) -> int:
        """Bytes of weights that it takes on disk."""
        return sum(spec.bytes for spec in self.specs)


def make_plan(checkpoint: Checkpoint, form: Format, keep: Sequence[str] = ()) -> Plan:
    """Names, shapes and bytes of a quantized checkpoint.

    Raises:
        ValueError: weights that are codes already, a matrix whose columns do not fill blocks, a
            pattern that keeps nothing.
    """
    if checkpoint.is_quantized:
        raise ValueError(f"{checkpoint.path}: its weights are quantized already")
    chosen = quantized(checkpoint.layout, keep)
    tensors = {
        name: _codes(checkpoint, form, chosen[name]) if name in chosen else [_as_it_is(name, each)]
        for name, each in checkpoint.stored.items()
        if name in checkpoint.weights
    }
    weights = _weights(checkpoint, form, tensors, chosen)
    ignore = ignored(checkpoint.layout, chosen)
    return Plan(checkpoint, form, tensors, frozenset(chosen), weights, ignore)


def broken(planned: Plan, fields: Fields) -> str | None:
    """Why a size would not survive: a cut inside a block, and the nearest values that would do."""
    return advice(planned.checkpoint.layout, planned.weights, fields)


def surviving(planned: Plan, drop: bool) -> ElasticSpace:
    """The declaration of the quantized checkpoint, but for its digests.

    Quality goes: it was measured on other weights. So do choices that no codes can be cut at.

    Args:
        drop: leave sizes out that do not survive.

    Raises:
        ValueError: such a size, and `drop` is false; or no size is left.
    """
    space = planned.checkpoint.space
    sizes = []
    for size in space.submodels:
        reason = broken(planned, size.config)
        if reason is None:
            sizes.append(size.model_copy(update={"quality": {}}))
        elif not drop:
            raise ValueError(f"size {size.name}: {reason} (--drop leaves such sizes out)")
    if not sizes:
        raise ValueError(f"{planned.format.name}: no declared size survives")
    axes = {}
    for name, axis in space.axes.items():
        used = {n for size in sizes for n in _values(size.config.get(name, []))}
        whole = planned.checkpoint.layout.sizes[name]
        good = [
            n for n in axis.choices if n in used or n == whole or broken(planned, {name: n}) is None
        ]
        axes[name] = axis.model_copy(update={"choices": good})
    return space.model_copy(update={"axes": axes, "submodels": sizes})


def _codes(checkpoint: Checkpoint, form: Format, weight: Weight) -> list[Spec]:
    stored = checkpoint.stored[weight.name]
    rows, columns = stored.shape
    if stored.dtype not in _NUMBERS:
        raise ValueError(f"{weight.name}: dtype {stored.dtype} is not quantized")
    if columns % form.block:
        smaller = " or a smaller --group" if isinstance(form, Groups) else ""
        raise ValueError(
            f"{weight.name}: its {columns} columns do not fill blocks of {form.block}; "
            f"--keep '*.{weight.name.split('.')[-2]}.*'{smaller} would do"
        )
    module = weight.name.rpartition(".")[0]
    return form.specs(module, rows, columns, getattr(torch, STORED[stored.dtype]))


def _as_it_is(name: str, stored: Stored) -> Spec:
    return Spec(name, stored.dtype, stored.shape)


def _weights(
    checkpoint: Checkpoint,
    form: Format,
    tensors: Mapping[str, list[Spec]],
    chosen: Mapping[str, Weight],
) -> dict[str, Weight]:
    """What a reader will see, but that codes are cut at their scales' blocks at the least."""
    specs = [spec for several in tensors.values() for spec in several]
    would = {spec.name: Stored("", spec.dtype, spec.shape, 0, spec.bytes) for spec in specs}
    weights = packed_weights(checkpoint.layout, would)
    for name, weight in chosen.items():
        weights[name.rpartition(".")[0] + "." + form.codes] = replace(
            weight, blocks=(1, form.block)
        )
    return weights


def _values(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
