"""Which tensors stay as they are: what is small, or what quality hangs on.

Gates and the state of Mamba layers decide discretely or feed back on themselves; norms, biases and
convolutions weigh nothing; embeddings and `lm_head` are left alone in the checkpoints that vendors
publish. Patterns are `fnmatch`'s, on names on disk.
"""

import fnmatch
from collections.abc import Iterable, Sequence

from star_elastic.layout import Layout, Weight

ATTENTION = "attention"  # a word among patterns
_ALWAYS = ("*norm*", "*.bias", "*embed*", "lm_head.*")
_MAMBA = ("*.mixer.conv1d.*", "*.mixer.A_log", "*.mixer.D", "*.mixer.dt_bias")
KEPT: dict[str, tuple[str, ...]] = {
    "llama": _ALWAYS,
    "nemotron_h": (*_ALWAYS, "*.mixer.gate.*", *_MAMBA),
    "qwen2": _ALWAYS,
    "qwen3": _ALWAYS,
    "qwen3_moe": (*_ALWAYS, "*.mlp.gate.*"),
}


def quantized(layout: Layout, keep: Sequence[str] = ()) -> dict[str, Weight]:
    """The matrices that become codes: those of the layers that no pattern keeps.

    Args:
        keep: more patterns; they may name a tensor or its module. `attention` stands for that of
            every layer, and for the Mamba layers right before it.

    Raises:
        ValueError: a pattern that keeps nothing, or nothing left to quantize.
    """
    keep = [each for text in keep for each in _patterns(layout, text)]
    _check_patterns(layout, keep)
    patterns = [*KEPT[layout.family.model_type], *keep]
    found = {
        name: weight
        for name, weight in layout.stored.items()
        if weight.layer is not None and len(weight.dims) == 2 and not _is_kept(name, patterns)
    }
    if not found:
        raise ValueError(f"--keep {' '.join(keep)}: nothing is left to quantize")
    return found


def ignored(layout: Layout, found: Iterable[str]) -> list[str]:
    """The modules whose matrices stay, by their names on disk, and in memory where these differ.

    Engines read the names on disk; stock classes match those of their own modules.
    """
    chosen = set(found)
    memory, disk = layout.family.disk_prefix or ("", "")
    kept: dict[str, None] = {}
    for name, weight in layout.stored.items():
        if name not in chosen and len(weight.dims) > 1:
            module = name.rpartition(".")[0]
            kept[module] = None
            if disk and module.startswith(disk):
                kept[memory + module.removeprefix(disk)] = None
    kept["lm_head"] = None  # engines make the module also where embeddings are tied
    return list(kept)


def _patterns(layout: Layout, text: str) -> list[str]:
    """What Nemotron's publisher left in BF16 beside its NVFP4: attention, and Mamba before it."""
    if text != ATTENTION:
        return [text]
    kinds = [parts[-1] for parts in layout.blocks]
    layers = [n for n, kind in enumerate(kinds) if kind == "full_attention"]
    layers += [n - 1 for n in layers if n and kinds[n - 1] == "linear_attention"]
    return [f"*.layers.{n}.*" for n in sorted(layers)] or ["*.self_attn.*"]


def _check_patterns(layout: Layout, keep: Sequence[str]) -> None:
    for pattern in keep:
        if not any(_is_kept(name, [pattern]) for name in layout.stored):
            example = next(name for name, w in layout.stored.items() if w.layer is not None)
            raise ValueError(f"--keep {pattern}: matches no tensor; names are like {example}")


def _is_kept(name: str, patterns: Sequence[str]) -> bool:
    module = name.rpartition(".")[0]
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(module, p) for p in patterns)
