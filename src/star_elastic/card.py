"""Model cards: the README.md that goes into every folder we write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from star_elastic.folder import CheckpointError, read_bytes
from star_elastic.layout import Layout
from star_elastic.submodel import ElasticSpace, Submodel

CARD = "README.md"
_LONGEST = 2**20  # bytes of a card that is read
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


def of_checkpoint(
    layout: Layout,
    space: ElasticSpace,
    licence: Mapping[str, str] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> str:
    """The card of an elastic checkpoint: its sizes and how to get at them.

    Args:
        licence: what the parent's card says of it; see `licence_of`.
        quantization: its `quantization_config`, where that is not the layout's own.
    """
    found = precision_in(quantization or getattr(layout.config, "quantization_config", None))
    lines = [
        *_front(TAG, licence),
        "# An elastic checkpoint",
        "",
        f"A `{layout.config.model_type}` parent in nested order: every size below is inside its "
        "weights. `star-elastic` runs or cuts any of them; every tool that loads the parent finds "
        "an ordinary folder.",
        "",
        *size_table(space.submodels),
        *_origin(space),
        *(f"\n{size.name}: {text}." for size in space.submodels if (text := warning(size, space))),
        *_stands_in(found, layout),
        *_engines(space.submodels[-1].name, found),
    ]
    return "\n".join(lines)


def of_slice(
    source: str,
    size: Submodel,
    layout: Layout,
    space: ElasticSpace | None = None,
    licence: Mapping[str, str] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> str:
    """The card of a stock folder that was cut out of an elastic checkpoint of this space.

    Args:
        layout: the parent's.
        quantization: the slice's own `quantization_config`.
    """
    fields = ", ".join(f"{field} = {value}" for field, value in size.config.items())
    trained = ADOPTED if _is_adopted(space) else "trained jointly with the other sizes"
    state = trained if size.trained else warning(size, space)
    found = precision_in(quantization)
    lines = [
        *_front("tags: [star-elastic]", licence),
        f"# {source}, size {size.name}",
        "",
        f"Cut out of the elastic checkpoint `{source}` with no further training"
        f" ({fields or 'the whole parent'}); {state}.",
        "",
        *size_table([size]),
        *_stands_in(found, layout),
        *_engines(None, found),
    ]
    return "\n".join(lines)


def of_quantized(
    source: str,
    size: Submodel,
    layout: Layout,
    licence: Mapping[str, str] | None,
    quantization: Mapping[str, Any],
) -> str:
    """The card of a quantized model that is not elastic."""
    found = precision_in(quantization)
    lines = [
        *_front("tags: [star-elastic]", licence),
        f"# {source}, quantized",
        "",
        *size_table([size]),
        *_stands_in(found, layout),
        *_engines(None, found),
    ]
    return "\n".join(lines)


def licence_of(folder: Path) -> dict[str, str]:
    """What the front matter of a folder's card says of its licence: `license`, its name and link.

    Values that are no plain line are left out, as is a card that cannot be read.
    """
    try:
        text = read_bytes(folder, CARD, _LONGEST).decode("utf-8", "replace")
        said = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (CheckpointError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: said[key] for key in keys if _is_line(said.get(key))}


def precision_in(quantization: Mapping[str, Any] | None) -> str | None:
    """In what format a `quantization_config` says that matrices stand, in words."""
    if not quantization:
        return None
    method = quantization.get("quant_method")
    groups = quantization.get("config_groups") or {}
    scheme = next(iter(groups.values()), {}).get("weights") or {}
    if not scheme:
        return f"{quantization.get('quant_algo') or 'codes'} (layout of `{method}`)"
    kind = "INT" if scheme.get("type") == "int" else "FP"
    group = f" in groups of {scheme['group_size']}" if scheme.get("group_size") else ""
    return f"{kind}{scheme.get('num_bits')}{group} (layout of `{method}`)"


def is_ours(text: str) -> bool:
    """Is a README.md one of our cards, which we may write anew?"""
    return TAG in text[:200]


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 200


def _front(tag: str, licence: Mapping[str, str] | None) -> list[str]:
    """The lines that the hub reads; JSON strings are YAML's."""
    told = [f"{key}: {json.dumps(value)}" for key, value in (licence or {}).items()]
    return ["---", "library_name: transformers", tag, *told, "---", ""]


def _stands_in(precision: str | None, layout: Layout) -> list[str]:
    if precision is None:
        return []
    text = f"Its matrices stand in {precision}; whatever size is cut from it has the same codes."
    if layout.family.experts:
        text += " Stock transformers would draw codes of experts anew; engines and ours do not."
    return ["", text]


def _engines(size: str | None, precision: str | None) -> list[str]:
    """How to run it; `size` is one of an elastic checkpoint's, None stands for a slice."""
    pick = f" --size {size}" if size else ""
    lines = ["", "## Run it", ""]
    if precision is None:
        lines += ["    AutoModelForCausalLM.from_pretrained(DIR)   # transformers"]
    lines += [
        f"    star-elastic chat DIR{pick}",
        f"    vllm serve DIR{_override(size)}",
    ]
    if precision is None or "NVFP4" in precision:  # the codes that llama.cpp has too
        kind = "" if precision is None else " --type nvfp4"
        lines += [
            f"    star-elastic export DIR{pick} --to gguf{kind} --out FILE.gguf   # llama.cpp"
        ]
    if size:
        lines += [f"    star-elastic slice DIR{pick} --out OUT   # a stock folder of its own"]
    return [*lines, ""]


def _override(size: str | None) -> str:
    """For the plugin that this package brings to vLLM, if it is installed beside it."""
    return f""" --hf-overrides '{{"elastic_size": "{size}"}}'""" if size else ""


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
