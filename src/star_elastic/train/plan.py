"""What a run will take, before it takes it: tokens, steps, memory, time."""

from collections.abc import Iterator, Mapping, Sequence

from star_elastic.layout import Layout
from star_elastic.submodel import Fields
from star_elastic.train.recipe import Optimise, Stage

_STATE = 16  # bytes a parameter: float32 weight, gradient and two moments of AdamW


def describe(
    layout: Layout,
    sizes: Mapping[str, Fields],
    settings: Optimise,
    teacher_bytes: int,
    processes: int = 1,
) -> Iterator[str]:
    """The plan, line by line."""
    for name, fields in sizes.items():
        cut = layout.sizes_of(fields)
        share = layout.count_active(cut) / layout.count_active()
        yield f"size {name}: {layout.count(cut):,} parameters, {share:.1%} of the active ones"
    for number, stage in enumerate(settings.stages):
        tokens = stage.length * stage.tokens_per_step
        yield (
            f"stage {number}: {stage.length:,} steps of {stage.tokens_per_step:,} tokens "
            f"({stage.sequence_length:,} a row), {tokens:,} tokens"
        )
    state = _STATE * layout.count() // processes
    rest = max(activation_bytes(layout, stage, settings) for stage in settings.stages)
    teach = teacher_bytes // processes
    yield (
        f"memory a process: {_size(state)} weights, gradients and moments, {_size(teach)} teacher, "
        f"about {_size(rest)} activations of the full size"
    )


def activation_bytes(layout: Layout, stage: Stage, settings: Optimise) -> int:
    """Bytes that one micro-batch of the full size keeps for its backward pass, roughly.

    With checkpointing the input of every layer; without, what each weight is multiplied with: an
    input and an output of its widths, per token.
    """
    tokens = stage.rows * stage.sequence_length
    size = 2 if settings.dtype == "bfloat16" else 4
    if settings.checkpoint_activations:
        return tokens * size * layout.sizes["hidden_size"] * len(layout.blocks)
    widths = 0
    for weight in layout.weights.values():
        shape = weight.shape(layout.sizes)
        if len(shape) >= 2 and weight.layer is not None:
            share = 1.0
            if len(shape) == 3 and "{" in weight.suffix:  # of the experts a token uses
                share = layout.sizes[layout.family.top_k]
            widths += int(share * sum(shape[-2:]))
    return tokens * size * widths


def seconds(settings: Optimise, measured: Sequence[Mapping[str, float]]) -> float:
    """Time of all stages, from measured seconds of a micro-batch per stage and size."""
    total = 0.0
    for stage, by_size in zip(settings.stages, measured, strict=True):
        probs = stage.size_probs or dict.fromkeys(by_size, 1.0)
        weight = sum(probs.get(name, 0.0) for name in by_size)
        mean = sum(by_size[name] * probs.get(name, 0.0) for name in by_size) / weight
        total += stage.length * stage.accumulate * mean * settings.sizes_per_batch
    return total


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
