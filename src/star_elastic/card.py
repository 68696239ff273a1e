"""Model cards: the README.md that goes into every folder we write."""

from star_elastic.layout import Layout
from star_elastic.submodel import ElasticSpace, Submodel

TAG = "tags: [star-elastic, elastic]"  # tells a card of ours from a publisher's
ADOPTED = "declared by adopt, not trained by star-elastic"
UNTRAINED = "reordered, never trained: not elastic, expect little of it"
BETWEEN = "between trained sizes, itself never trained: measure it before you rely on it"


def warning(size: Submodel, space: ElasticSpace | None) -> str:
    """What to say of a size that was not trained; nothing of one that was.

    In a checkpoint that a training made, such a size lies between those that were trained.
    """
    if size.trained:
        return ""
    return UNTRAINED if space is None or space.training is None else BETWEEN


def of_checkpoint(layout: Layout, space: ElasticSpace) -> str:
    """The card of an elastic checkpoint: its sizes and how to get at them."""
    lines = [
        "---",
        "library_name: transformers",
        TAG,
        "---",
        "",
        "# An elastic checkpoint",
        "",
        f"A `{layout.config.model_type}` parent in nested order: every size below is inside its "
        "weights. Stock transformers loads the parent; `star-elastic` loads or slices any size.",
        "",
        *size_table(space.submodels),
        *_origin(space),
        *(f"\n{size.name}: {text}." for size in space.submodels if (text := warning(size, space))),
        "",
        "    star-elastic slice . --size NAME --out DIR",
        "",
    ]
    return "\n".join(lines)


def of_slice(source: str, size: Submodel, space: ElasticSpace | None = None) -> str:
    """The card of a stock folder that was cut out of an elastic checkpoint of this space."""
    fields = ", ".join(f"{field} = {value}" for field, value in size.config.items())
    trained = ADOPTED if _is_adopted(space) else "trained jointly with the other sizes"
    state = trained if size.trained else warning(size, space)
    lines = [
        "---",
        "library_name: transformers",
        "---",
        "",
        f"# {source}, size {size.name}",
        "",
        f"Cut out of the elastic checkpoint `{source}` with no further training"
        f" ({fields or 'the whole parent'}); {state}.",
        "",
        *size_table([size]),
        "",
        "    AutoModelForCausalLM.from_pretrained(DIR)",
        "",
    ]
    return "\n".join(lines)


def is_ours(text: str) -> bool:
    """Is a README.md one of our cards, which we may write anew?"""
    return TAG in text[:200]


def _is_adopted(space: ElasticSpace | None) -> bool:
    return space is not None and space.training is not None and not space.training.is_ours


def _origin(space: ElasticSpace) -> list[str]:
    """Where sizes come from that another's training made."""
    if space.training is None or not _is_adopted(space):
        return []
    return ["", f"These sizes were {ADOPTED}: {space.training.recipe}."]


def size_table(sizes: list[Submodel]) -> list[str]:
    """Markdown rows: counts, state and measured quality per size."""
    columns = sorted({f"{t} {m}" for s in sizes for t, q in s.quality.items() for m in q})
    head = ["size", "total", "active", "trained", *columns]
    rows = [head, ["---"] * len(head)]
    for size in sizes:
        quality = {f"{t} {m}": v for t, q in size.quality.items() for m, v in q.items()}
        rows.append(
            [
                size.name,
                f"{size.total_params:,}",
                f"{size.active_params:,}",
                "yes" if size.trained else "no",
                *(f"{quality[c]:.3f}" if c in quality else "" for c in columns),
            ]
        )
    return [f"| {' | '.join(row)} |" for row in rows]
