"""The tensors of a GGUF file: their names, where they come from, and how values change on the way.

Names are `gguf`'s own tables' wherever these know a published name; shapes are those of the named
shapes. Experts that stand apart on disk are stacked, routed experts first.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS, TensorNameMap, get_tensor_name_map

from star_elastic.checkpoint import Checkpoint
from star_elastic.export.gguf import nvfp4
from star_elastic.export.gguf.architecture import BIASES
from star_elastic.export.gguf.nvfp4 import Codes
from star_elastic.layout import Weight
from star_elastic.shapes import Sizes
from star_elastic.symbols import head_dim

# published names that gguf's table knows under another spelling only
_SPELLED = {
    "backbone.layers.{}.mixer.dt_bias": "backbone.layers.{}.mixer.dt.bias",
    "backbone.layers.{}.mixer.gate.e_score_correction_bias": (
        "backbone.layers.{}.mixer.gate.e_score_correction.bias"
    ),
    "backbone.layers.{}.mixer.experts.up_proj.weight": (
        "model.layers.{}.mlp.experts.up_proj.weight"
    ),
    "backbone.layers.{}.mixer.experts.down_proj.weight": (
        "model.layers.{}.mlp.experts.down_proj.weight"
    ),
}
# llama.cpp multiplies by these in fp32 whatever the type of a file
_EXACT = {
    MODEL_TENSOR.FFN_GATE_INP,
    MODEL_TENSOR.SSM_CONV1D,
    MODEL_TENSOR.SSM_A,
    MODEL_TENSOR.SSM_D,
    MODEL_TENSOR.SSM_NORM,
}
_FEED_FORWARD = {MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_DOWN}
Array = np.ndarray
Change = Callable[[Array], Array]


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: the `sources` on disk, in order, each changed, then stacked.

    `weight` is the parent's (of the first source); `shape` is outermost first, as NumPy's.
    """

    name: str
    kind: MODEL_TENSOR
    sources: tuple[str, ...]
    weight: Weight
    shape: tuple[int, ...]
    change: Change
    has_bias: bool = False  # another tensor of the file, that is added to this one's product

    @property
    def takes_nvfp4(self) -> bool:
        """Does llama.cpp multiply its product by a scale? In feed-forward not beside a bias."""
        return self.kind in nvfp4.SCALED and not (self.has_bias and self.kind in _FEED_FORWARD)

    @property
    def is_matrix(self) -> bool:
        """May it stand in a type of fewer bits? Vectors, norms and gates may not."""
        return len(self.shape) > 1 and self.kind not in _EXACT

    @property
    def is_stacked(self) -> bool:
        """Is it made of routed experts?"""
        return self.weight.expert is not None


def entries(checkpoint: Checkpoint, arch: MODEL_ARCH, config: Any, child: Sizes) -> list[Entry]:
    """What the file holds, in the order in which `Checkpoint.tensors` reads it.

    Raises:
        ValueError: a tensor that llama.cpp has no place for; names it.
    """
    known = get_tensor_name_map(arch, config.num_hidden_layers)
    found = []
    for several in _stacks(checkpoint, child).values():
        first, weight = several[0]
        kind, name = _named(known, arch, first, weight)
        shape = weight.shape(child)
        change, inner = _change(arch, config, kind, shape)
        whole = inner if weight.expert is None else (len(several), *inner)
        sources = tuple(source for source, _ in several)
        found.append(Entry(name, kind, sources, weight, whole, change))
    names = {entry.name for entry in found}
    return [replace(e, has_bias=e.name.replace(".weight", ".bias") in names) for e in found]


def extras(several: Iterable[Entry], config: Any) -> dict[str, Array]:
    """Small tensors that no checkpoint holds and llama.cpp wants."""
    found: dict[str, Array] = {}
    if getattr(config, "use_conv_bias", True) is False:  # llama.cpp adds one in any case
        for entry in several:
            if entry.kind == MODEL_TENSOR.SSM_CONV1D:
                name = entry.name.replace(".weight", ".bias")
                found[name] = np.zeros(entry.shape[0], np.float32)
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        found["rope_freqs.weight"] = _frequency_factors(config)
    return found


def _stacks(checkpoint: Checkpoint, child: Sizes) -> dict[Any, list[tuple[str, Weight]]]:
    """The size's tensors by the one they become: experts of a layer and a matrix are one."""
    found: dict[Any, list[tuple[str, Weight]]] = {}
    for name, weight in checkpoint.layout.kept(child):
        key = name if weight.expert is None else (weight.layer, weight.suffix)
        found.setdefault(key, []).append((name, weight))
    return found


def _named(
    names: TensorNameMap, arch: MODEL_ARCH, source: str, weight: Weight
) -> tuple[MODEL_TENSOR, str]:
    plain = source.replace(f".experts.{weight.expert}.", ".experts.", 1)
    layer = plain.partition("layers.")[2].partition(".")[0]
    pattern = plain.replace(f"layers.{layer}.", "layers.{}.", 1)
    spelled = _SPELLED.get(pattern, pattern).format(layer)
    found = names.get_type_and_name(spelled, try_suffixes=(".weight", ".bias"))
    if found is None or found[0] not in MODEL_TENSORS[arch]:
        raise ValueError(f"{weight.name}: llama.cpp has no place for it")
    kind, name = found
    if name.endswith(".bias") and kind not in BIASES[arch]:
        raise ValueError(f"{weight.name}: llama.cpp has no place for this bias")
    return kind, name


def _change(
    arch: MODEL_ARCH, config: Any, kind: MODEL_TENSOR, shape: tuple[int, ...]
) -> tuple[Change, tuple[int, ...]]:
    """What happens to the values, and the shape that comes of it."""
    if kind == MODEL_TENSOR.SSM_A:
        return _decay, (*shape, 1)
    if kind == MODEL_TENSOR.SSM_D:
        return partial(np.reshape, shape=(*shape, 1)), (*shape, 1)
    if kind == MODEL_TENSOR.SSM_NORM:
        grouped = (config.n_groups, math.prod(shape) // config.n_groups)
        return partial(np.reshape, shape=grouped), grouped
    if kind == MODEL_TENSOR.SSM_CONV1D and len(shape) == 3:
        return partial(np.squeeze, axis=1), (shape[0], shape[2])
    if arch == MODEL_ARCH.LLAMA and kind in (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K):
        return partial(_interleaved, half=head_dim(config) // 2), shape
    return _same, shape


def _same(values: Array) -> Array:
    return values


def _decay(a_log_H: Array) -> Array:
    """Mamba's A = -exp(A_log), (H, 1): llama.cpp keeps the rate itself."""
    return -np.exp(a_log_H)[:, None]


def _interleaved(rows: Array, half: int) -> Array:
    """Channels of a head as llama.cpp's rope turns them: in pairs, not half a head apart."""
    heads = rows.shape[0] // (2 * half)
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _frequency_factors(config: Any) -> Array:
    """By what each rotary frequency is divided (Llama 3's scaling), as stock classes compute it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dim, base = head_dim(config), config.rope_parameters["rope_theta"]
    plain = base ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    return (plain / scaled.numpy()).astype(np.float32)


def changed(entry: Entry, tensors: Iterator[tuple[str, Any]]) -> Iterator[Array | Codes]:
    """The sources of an entry, read and changed, one at a time: in fp32, or as codes."""
    for source in entry.sources:
        name, tensor = next(tensors)
        assert name == source
        if tensor.element_size() > 1:
            yield entry.change(tensor.float().numpy())
            continue
        codes = nvfp4.read(tensor, next(tensors)[1], next(tensors)[1])  # scales stand behind
        yield replace(codes, packed=entry.change(codes.packed), scales=entry.change(codes.scales))
