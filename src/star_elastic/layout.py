"""Named shapes: every weight of a model, from its family's table and its config.

From here, and from nowhere else, come tensor names, shapes, parameter counts and memory; the index
of a submodel inside its parent is `shapes.runs`. A brace in a weight's name is an axis too: sizes
carry `layer`, one 0 or 1 per layer of the parent (a probability, where a router is learning).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from star_elastic.dtypes import ITEMSIZE
from star_elastic.shapes import Dim, Run, Shape, Sizes, at, cuts, narrow, parse, width
from star_elastic.symbols import DEPTH, check_count, family_of, resolve, symbol_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """One tensor: its name, its named shape, and where it sits in the in-memory model.

    `place` is (in-memory name, segment of a fused tensor's first inner dimension). `blocks` tells,
    per dimension, how many elements one stored index holds: two 4-bit codes, 16 under a scale.
    """

    name: str
    dims: Shape
    layer: int | None
    expert: int | None
    place: tuple[str, int]
    suffix: str  # the name inside its layer, as the family's table writes it
    is_buffer: bool = False
    blocks: tuple[int, ...] = ()

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The sizes of all dimensions, e.g. (10304, 2688)."""
        sizes = at(sizes, self.layer)
        widths = (width(dim, sizes) for dim in self.dims)
        if not self.blocks:
            return tuple(widths)
        return tuple(n // block for n, block in zip(widths, self.blocks, strict=True))

    def cuts(self, parent: Sizes, child: Sizes) -> list[tuple[int, list[Run]]]:
        """The dimensions that a child shortens, and the runs it keeps of each; `shapes.cuts`."""
        child = at(child, self.layer)
        try:
            return cuts(self.dims, at(parent, self.layer), child, self.blocks)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


class Layout:
    """The named shapes of one config: `stored` as published on disk, `weights` as held in memory.

    The two differ where stock classes fuse experts into one tensor, and in the name's prefix.
    `layer_order` ranks the layers, best first: a submodel of k layers keeps the first k of it, in
    the parent's sequence. Without it depth is no axis.
    """

    def __init__(self, config: Any, layer_order: Sequence[int] | None = None):
        self.family = family_of(config)
        self.config = config
        self.blocks = self.family.blocks(config)
        check_count(self.family, config, self.blocks)
        if layer_order is not None and sorted(layer_order) != list(range(len(self.blocks))):
            raise ValueError(f"layer_order: not an order of {len(self.blocks)} layers")
        self.layer_order = None if layer_order is None else list(layer_order)
        self.sizes: dict[str, Any] = self.sizes_of({})
        self._alias = {
            symbol: next(name for name in text.split(" or ") if self.sizes.get(name))
            for symbol, text in self.family.derived.items()
            if " or " in text
        }

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The config fields that may shrink in this very model: some weight's shape has them."""
        weights = self.weights.values()
        used = {symbol for w in weights for dim in w.dims for seg in dim for symbol in seg}
        if self.family.experts in used:
            used.add(self.family.top_k)
        if getattr(self.config, "n_group", 1) > 1:  # a prefix of experts would break gate groups
            used.discard(self.family.experts or "")
        if self.layer_order is not None:
            used.add(DEPTH)
        return tuple(axis for axis in self.family.axes if symbol_of(self.family, axis) in used)

    @cached_property
    def stored(self) -> dict[str, Weight]:
        """Every tensor of the published checkpoint by its name on disk."""
        return {weight.name: weight for weight in self._stored()}

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Every tensor of the stock class's state dict by its name in memory."""
        weights: dict[str, Weight] = {}
        for weight in self.stored.values():
            name, part = weight.place
            if weight.expert is None:
                weights[name] = replace(weight, name=name)
            elif weight.expert == 0:
                inner = weights[name].dims[1] + weight.dims[0] if part else weight.dims[0]
                experts: Dim = ((self._experts,),)
                dims = (experts, inner, *weight.dims[1:])
                weights[name] = replace(weight, name=name, dims=dims, expert=None)
        return weights

    @cached_property
    def pieces(self) -> dict[str, list[Weight]]:
        """In-memory name -> the published tensors that make it up: one, or every expert's."""
        pieces: dict[str, list[Weight]] = {}
        for weight in self.stored.values():
            pieces.setdefault(weight.place[0], []).append(weight)
        return pieces

    def kept(
        self, child: Sizes, weights: Mapping[str, Weight] | None = None
    ) -> Iterator[tuple[str, Weight]]:
        """What a submodel keeps of `stored` (or of `weights`): its own name, the parent's tensor.

        A layer or an expert beyond the child's is gone; layers that stay move up.
        """
        position = {layer: n for n, layer in enumerate(self.kept_layers(child))}
        for weight in (self.stored if weights is None else weights).values():
            experts = at(child, weight.layer).get(self.family.experts or "", 0)
            if weight.expert is not None and weight.expert >= experts:
                continue
            if weight.layer is None:
                yield weight.name, weight
            elif weight.layer in position:
                here, there = f"layers.{weight.layer}.", f"layers.{position[weight.layer]}."
                yield weight.name.replace(here, there, 1), weight

    def kept_layers(self, child: Sizes) -> list[int]:
        """The parent's layers that a submodel keeps, in sequence."""
        return [layer for layer, there in enumerate(child["layer"]) if there]

    def sizes_of(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of a submodel: this config with some fields replaced (a list: per layer)."""
        sizes = resolve(self.family, self.config, fields)
        order = self.layer_order or range(len(self.blocks))
        kept = set(order[: sizes[DEPTH]])
        sizes["layer"] = [int(layer in kept) for layer in range(len(self.blocks))]
        return sizes

    def child(self, fields: Mapping[str, Any], config: Any) -> "Layout":
        """The layout of a submodel by itself, its layers still in order of importance."""
        if self.layer_order is None:
            return Layout(config)
        kept = self.kept_layers(self.sizes_of(fields))
        return Layout(config, [kept.index(n) for n in self.layer_order if n in kept])

    def view(
        self, state: "Mapping[str, Tensor]", weight: Weight, child: Sizes | None = None
    ) -> "Tensor":
        """The part of an in-memory tensor that is stored on disk as `weight`.

        Args:
            child: the sizes that `state` has, if it is a submodel's under the parent's names.
        """
        name, part = weight.place
        tensor = state[name]
        if weight.expert is None:
            return tensor
        sizes = at(child or self.sizes, weight.layer)
        start = width(self.weights[name].dims[1][:part], sizes)
        return tensor[weight.expert].narrow(0, start, width(weight.dims[0], sizes))

    def take(self, name: str, tensor: "Tensor", child: Sizes) -> "Tensor":
        """The child's part of the in-memory tensor `name`."""
        return narrow(tensor, self.weights[name].cuts(self.sizes, child))

    def count(self, sizes: Sizes | None = None) -> Any:
        """Parameters of a submodel, embeddings included, buffers not; differentiable in sizes."""
        sizes = sizes or self.sizes
        return sum(_there(w, sizes) * prod(w.shape(sizes)) for w in self._parameters())

    def count_active(self, sizes: Sizes | None = None) -> Any:
        """Parameters one token uses: `top_k` of the routed experts and everything else."""
        sizes = sizes or self.sizes
        return sum(
            _there(w, sizes) * prod(w.shape(self._routed(w, sizes))) for w in self._parameters()
        )

    def cache_shapes(self, sizes: Sizes | None = None) -> dict[str, tuple[Any, ...]]:
        """State of one sequence, `layer.kind` -> shape; `token.*` shapes are per token.

        Layers are the parent's; those that a submodel drops are left out.
        """
        sizes = sizes or self.sizes
        return {
            f"{layer}.{kind}": tuple(width(dim, at(sizes, layer)) for dim in parse(text))
            for layer in self.kept_layers(sizes)
            for part in self.blocks[layer]
            for kind, text in self.family.cache.get(part, {}).items()
        }

    def cache_bytes_per_token(self, sizes: Sizes | None = None, dtype: str = "bfloat16") -> Any:
        """Bytes that one more token of context adds to the KV cache; differentiable in sizes."""
        return ITEMSIZE[dtype] * self._cache_elements(".token.", sizes or self.sizes)

    def cache_bytes(
        self, context: int, batch: int = 1, sizes: Sizes | None = None, dtype: str = "bfloat16"
    ) -> dict[str, Any]:
        """Bytes of KV, conv and SSM state for `batch` sequences of `context` tokens.

        The SSM state has the dtype of the config's `mamba_ssm_cache_dtype` (fp32 by default).
        """
        sizes = sizes or self.sizes
        ssm = ITEMSIZE[getattr(self.config, "mamba_ssm_cache_dtype", "float32")]
        return {
            "kv": context * batch * self.cache_bytes_per_token(sizes, dtype),
            "conv": batch * ITEMSIZE[dtype] * self._cache_elements(".conv", sizes),
            "ssm": batch * ssm * self._cache_elements(".ssm", sizes),
        }

    def memory(
        self, context: int, batch: int = 1, sizes: Sizes | None = None, dtype: str = "bfloat16"
    ) -> Any:
        """Bytes to run a submodel: weights, KV cache, conv and SSM state."""
        state = self.cache_bytes(context, batch, sizes, dtype)
        return ITEMSIZE[dtype] * self.count(sizes) + sum(state.values())

    def _cache_elements(self, kind: str, sizes: Sizes) -> Any:
        return sum(
            sizes["layer"][int(name.partition(".")[0])] * prod(shape)
            for name, shape in self.cache_shapes(sizes).items()
            if kind in name
        )

    @property
    def _experts(self) -> str:
        assert self.family.experts is not None
        return self.family.experts

    def _parameters(self) -> Iterator[Weight]:
        return (weight for weight in self.weights.values() if not weight.is_buffer)

    def _routed(self, weight: Weight, sizes: Sizes) -> Sizes:
        if weight.suffix not in self._fused_parts:
            return sizes
        return {**sizes, self._experts: sizes[self.family.top_k]}

    @cached_property
    def _fused_parts(self) -> dict[str, tuple[str, int]]:
        """Published per-expert suffix -> (fused suffix in memory, its segment there)."""
        return {
            stored: (fused, part)
            for fused, parts in self.family.fused.items()
            for part, stored in enumerate(parts)
        }

    def _stored(self) -> Iterator[Weight]:
        for name, text in self.family.outside.items():
            if not (name in self.family.tied and self.config.tie_word_embeddings):
                yield from self._expand("", name, text, None)
        for layer, parts in enumerate(self.blocks):
            prefix = self.family.layer_prefix.format(layer=layer)
            for part in parts:
                for suffix, text in self.family.parts[part].items():
                    yield from self._expand(prefix, suffix, text, layer)

    def _expand(self, prefix: str, suffix: str, text: str, layer: int | None) -> Iterator[Weight]:
        _, _, flags = text.partition(" if ")
        if not all(getattr(self.config, flag) for flag in flags.split(" and ") if flag):
            return
        fused, part = self._fused_parts.get(suffix, (suffix, 0))
        is_buffer = suffix in self.family.buffers
        brace = "{" + self.family.experts + "}" if self.family.experts else "{}"
        dims = tuple(
            tuple(tuple(self._alias.get(s, s) for s in segment) for segment in dim)
            for dim in parse(text)
        )
        for expert in range(self.sizes[self._experts]) if brace in suffix else (None,):
            name = prefix + suffix.replace(brace, str(expert))
            place = (prefix + fused, part)
            yield Weight(self._on_disk(name), dims, layer, expert, place, suffix, is_buffer)

    def in_memory(self, name: str) -> str:
        """A name on disk as modules in memory have it: stock classes rename the first part."""
        memory, disk = self.family.disk_prefix or ("", "")
        return memory + name.removeprefix(disk) if disk and name.startswith(disk) else name

    def _on_disk(self, name: str) -> str:
        memory, disk = self.family.disk_prefix or ("", "")
        return disk + name.removeprefix(memory) if memory and name.startswith(memory) else name


def _there(weight: Weight, sizes: Sizes) -> Any:
    """1 if a submodel keeps the layer of this weight, else 0; in between while a router learns."""
    return 1 if weight.layer is None else sizes["layer"][weight.layer]
