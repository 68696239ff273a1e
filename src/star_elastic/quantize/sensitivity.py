"""Which parts of a model codes harm most: each part quantized alone, KL of the logits to without.

A part is all matrices of one kind in one layer; a `keep` of matrices that engines fuse (q, k and v;
gate and up) would have to name them together anyway. Nothing is written, and no weight changes: the
forward pass runs on what the codes of that part would mean, at the parent and at the smallest size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from star_elastic.layout import Weight
from star_elastic.quantize.plan import Plan, broken
from star_elastic.records import Batch, Record, collate, encode
from star_elastic.submodel import Fields
from star_elastic.tensors import dtype_of
from star_elastic.train.coded import Coded, Coding
from star_elastic.train.distillation import loss, predicting
from star_elastic.train.distributed import World
from star_elastic.train.load import load_parts
from star_elastic.train.recipe import Distil
from star_elastic.train.teacher import Teacher

_ROWS = 8  # records that run at once


@dataclass(frozen=True)
class Part:
    """The matrices of one kind in one layer, and the bytes that their codes save."""

    layer: int
    kind: str
    weights: tuple[Weight, ...]
    saved: int

    @property
    def patterns(self) -> list[str]:
        """What `--keep` would be given to leave it as it is."""
        modules = {}
        for weight in self.weights:
            name = weight.name.rpartition(".")[0]
            if weight.expert is not None:
                name = name.replace(f".experts.{weight.expert}.", ".experts.*.")
            modules[name] = None
        return list(modules)


@dataclass(frozen=True)
class Harm:
    """KL(without codes || with this part's codes) by size, in nats per token."""

    part: Part
    kl: Mapping[str, float]

    @property
    def total(self) -> float:
        """The sum over the sizes measured."""
        return sum(self.kl.values())

    @property
    def per_byte(self) -> float:
        """What quality a saved byte costs."""
        return self.total / max(1, self.part.saved)


def parts_of(planned: Plan) -> list[Part]:
    """The parts whose matrices would become codes."""
    stored, found = planned.checkpoint.stored, {}
    for name, weight in planned.checkpoint.layout.stored.items():
        if name in planned.chosen:
            assert weight.layer is not None
            found.setdefault((weight.layer, kind_of(weight)), []).append(weight)
    parts = []
    for (layer, kind), weights in found.items():
        before = sum(stored[w.name].end - stored[w.name].start for w in weights)
        after = sum(spec.bytes for w in weights for spec in planned.tensors[w.name])
        parts.append(Part(layer, kind, tuple(weights), before - after))
    return parts


def kind_of(weight: Weight) -> str:
    """What a matrix belongs to, in words."""
    *owners, module, _ = weight.suffix.split(".")
    for owner in ("shared_experts", "experts"):
        if owner in owners:
            return owner.replace("_", " ")
    if module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return "attention"
    return f"mamba {module}" if module in ("in_proj", "out_proj") else "mlp"


def sizes_to_measure(planned: Plan) -> dict[str, Fields]:
    """The parent, and the smallest of the sizes that survive."""
    space = planned.checkpoint.space
    whole = [size.name for size in space.submodels if not size.config]
    found: dict[str, Fields] = {whole[0] if whole else "parent": {}}
    left = [s for s in space.submodels if s.config and not broken(planned, s.config)]
    if left:
        smallest = min(left, key=lambda size: size.total_params)
        found[smallest.name] = smallest.config
    return found


@torch.no_grad()
def measure(
    planned: Plan,
    tokenizer: object,
    records: Sequence[Record],
    max_length: int = 512,
    device: str = "cpu",
) -> list[Harm]:
    """Quantize every part alone; the most harmful for a byte saved come first.

    The model is held in memory, in float32 on a CPU and as it is stored elsewhere.

    Args:
        records: all of their tokens count, up to `max_length` of each.

    Raises:
        ValueError: no record has a token to predict.
    """
    opened, kind = planned.checkpoint, torch.device(device)
    loaded = load_parts(opened, World(device=kind), torch.float32 if kind.type == "cpu" else None)
    teacher = Teacher(loaded, own=True)
    stored = {name: dtype_of(opened, weight) for name, weight in opened.layout.weights.items()}
    parts = parts_of(planned)
    batches = [
        collate(encode(tokenizer, records[start : start + _ROWS], max_length), pad=0).to(kind)
        for start in range(0, len(records), _ROWS)
    ]
    count = sum(int(batch.targets[:, 1:].sum()) for batch in batches)
    if not count:
        raise ValueError("--measure: no record has a token to predict")
    found: list[dict[str, float]] = [{} for _ in parts]
    for name, fields in sizes_to_measure(planned).items():
        cuts = [
            Coding(opened.layout, [planned.format], part.weights, stored).cut(fields)
            for part in parts
        ]
        totals = [0.0] * len(parts)
        for batch in batches:
            for n, kl in enumerate(_harms(teacher, fields, cuts, batch)):
                totals[n] += kl * int(batch.targets[:, 1:].sum()) / count
        for harm, total in zip(found, totals, strict=True):
            harm[name] = total
    harms = [Harm(part, kl) for part, kl in zip(parts, found, strict=True)]
    return sorted(harms, key=lambda harm: harm.per_byte, reverse=True)


def spared(harms: Sequence[Harm], planned: Plan, share: float) -> list[Harm]:
    """What to leave as it is: down the list, all that still fits in a share more bytes.

    Args:
        harms: the most harmful for a byte first; share: of the bytes of all codes, 0.05 for 5 %.

    Raises:
        ValueError: no share.
    """
    if not 0 <= share < 10:
        raise ValueError(f"--spare {share}: a share of the bytes, such as 0.05")
    left, found = share * planned.bytes, []
    for harm in harms:
        if harm.total > 0 and harm.part.saved <= left:
            left -= harm.part.saved
            found.append(harm)
    return found


def told(harms: Sequence[Harm], kept: Sequence[Harm]) -> str:
    """For the card: what was measured, and what stays as it is for that."""
    before, after = (sum(h.total for h in several) for several in (harms, _rest(harms, kept)))
    sizes = " and ".join(harms[0].kl)
    text = (
        f"Every part was quantized alone: KL to the model without codes, at {sizes}; the sum over "
        f"all parts is {before:.3g} nats per token."
    )
    if kept:
        names = ", ".join(f"{h.part.kind} of layer {h.part.layer}" for h in kept)
        text += f" In full precision, as the most harmful for their bytes: {names}"
        text += f"; the sum over the others is {after:.3g}."
    return text


def _rest(harms: Sequence[Harm], kept: Sequence[Harm]) -> list[Harm]:
    return [harm for harm in harms if harm not in kept]


def _harms(teacher: Teacher, fields: Fields, cuts: Sequence[Coded], batch: Batch) -> list[float]:
    """KL of a size with every part's codes to itself without, mean over positions."""
    lesson = teacher.lesson(batch, fields)
    skeleton, _ = teacher.skeleton(fields)
    labels = batch.input_ids[:, 1:][batch.targets[:, 1:]]

    def finish(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return loss(predicting(hidden, batch.targets), head, labels, lesson, Distil())

    return [teacher.parts(skeleton, cut, finish, **batch.inputs).item() for cut in cuts]
