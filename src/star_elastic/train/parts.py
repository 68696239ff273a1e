"""The parent in parts, one per layer, each whole only while it runs: what FSDP2 can shard.

A stock model of some size runs on `meta` as a *skeleton* whose layers hand over to the parent's
parts. A part narrows (or masks) its own tensors inside its own `forward` and calls the stock layer
with them. The size is an argument of the call: two sizes may run at once.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.layout import Layout
from star_elastic.shapes import Run, Sizes, at, cuts, narrow
from star_elastic.submodel import Fields

# (final hidden states (batch, length, hidden), head (vocabulary, hidden)) -> what is wanted
Finish = Callable[[Tensor, Tensor], Any]


class Cut(Protocol):
    """How the tensors of a layer (None: outside the layers) become those that run."""

    def tensors(self, layer: int | None, whole: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Narrowed:
    """The leading corner of every tensor: views, or copies where heads are cut within groups."""

    layout: Layout
    sizes: Sizes

    def tensors(self, layer: int | None, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The submodel's tensors of one of the parent's layers, under the parent's names."""
        return {name: narrow(tensor, self._cuts[name]) for name, tensor in whole.items()}

    @cached_property
    def _cuts(self) -> dict[str, list[tuple[int, list[Run]]]]:
        return {
            name: cuts(weight.dims, self.layout.sizes, at(self.sizes, weight.layer))
            for name, weight in self.layout.weights.items()
        }


class Part(nn.Module):
    """Some tensors of the parent, under their in-memory names."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | None = None):
        """`device`: where they are needed, if they rest elsewhere (an offloaded teacher)."""
        super().__init__()
        self.device = device
        self.checkpointed = False
        self._names = {name.replace(".", "/"): name for name in tensors}  # modules allow no dot
        for key, name in self._names.items():
            tensor = tensors[name]
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(key, tensor)
            else:
                self.register_buffer(key, tensor)

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run(tensors, *args, **kwargs)` with the whole tensors, which are whole in here only."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            return run(self.tensors(), *args, **kwargs)

        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(inner, *args, use_reentrant=False, **kwargs)
        return inner(*args, **kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """What this part holds, by in-memory name."""
        held = {**self._parameters, **self._buffers}
        found = {name: held[key] for key, name in self._names.items()}
        if self.device is None:
            return {name: tensor for name, tensor in found.items() if tensor is not None}
        return {n: t.to(self.device, non_blocking=True) for n, t in found.items() if t is not None}


class Parts(nn.Module):
    """All tensors of one parent, in parts, and the way to run it at any size."""

    def __init__(
        self, layout: Layout, state: Mapping[str, Tensor], device: torch.device | None = None
    ):
        super().__init__()
        grouped: dict[int | None, dict[str, Tensor]] = {None: {}}
        for name, weight in layout.weights.items():
            grouped.setdefault(weight.layer, {})[name] = state[name]
        self.outside = Part(grouped[None], device)
        self.layers = nn.ModuleList(
            Part(grouped[layer], device) for layer in range(len(layout.blocks))
        )
        self.layout = layout

    def forward(self, skeleton: PreTrainedModel, cut: Cut, finish: Finish, **inputs: Tensor) -> Any:
        """Run the parent cut to a skeleton's size on inputs; `finish` gets the last hidden states.

        Whatever needs whole tensors happens in here: they are sharded again outside.
        """

        def run(tensors: Mapping[str, Tensor]) -> Any:
            kept = cut.tensors(None, tensors)
            inner = {name.removeprefix("model."): t for name, t in kept.items()}
            head = kept.get("lm_head.weight")
            inner.pop("lm_head.weight", None)
            if head is None:  # tied
                head = kept[self.layout.family.tied["lm_head.weight"]]
            output = functional_call(
                skeleton.get_submodule("model"),
                inner,
                kwargs={**inputs, "use_cache": False, "cut": cut},
            )
            return finish(output.last_hidden_state, head)

        return self.outside(run)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by in-memory name, as it is held: whole, or this process's shard."""
        found = self.outside.tensors()
        for part in self.layers:
            found |= part.tensors()  # type: ignore[operator]
        return found

    def skeleton(self, fields: Fields) -> PreTrainedModel:
        """A stock model of a size, in training mode, whose layers hand over to the parts."""
        model = stock.use_chunk_scan(stock.build_child(self.layout, fields))
        return self.connect(model, self.layout.kept_layers(self.layout.sizes_of(fields)))

    def connect(self, model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
        """Replace the layers of a model on `meta` by hand-overs to the parent's `kept` parts."""
        first = next(iter(self.tensors().values()))
        with torch.device(self.outside.device or first.device):
            stock.fill_constants(model)
        layers = stock.layers_of(model)
        for position, layer in enumerate(kept):
            prefix = self.layout.family.layer_prefix.format(layer=layer)
            layers[position] = HandOver(layers[position], self.layers[layer], prefix, layer)
        return model.train()


class Skeletons:
    """Skeletons of sizes that run again and again; the latest few are kept."""

    def __init__(
        self, parts: Parts, cut: Callable[[Fields, int], Cut] | None = None, kept: int = 32
    ):
        """`cut` makes a size's cut, for the n-th reading; without it sizes are narrowed."""
        self.parts = parts
        self.cut = cut or self._narrowed
        self.kept = kept
        self._made: OrderedDict[str, tuple[PreTrainedModel, Cut]] = OrderedDict()

    def of(self, fields: Fields, reading: int = 0) -> tuple[PreTrainedModel, Cut]:
        """The skeleton of a size, and the cut that goes with it."""
        key = f"{reading} {sorted(fields.items())}"
        if key not in self._made:
            self._made[key] = self.parts.skeleton(fields), self.cut(fields, reading)
        self._made.move_to_end(key)
        if len(self._made) > self.kept:
            self._made.popitem(last=False)
        return self._made[key]

    def _narrowed(self, fields: Fields, _: int) -> Narrowed:
        layout = self.parts.layout
        return Narrowed(layout, layout.sizes_of(fields))


class HandOver(nn.Module):
    """Stands where a skeleton's layer was: runs that stock layer on a part's tensors."""

    def __init__(self, block: nn.Module, part: nn.Module, prefix: str, layer: int):
        super().__init__()
        self.block = block
        self.layer = layer
        self.prefix = prefix
        self._part = (part,)  # a tuple: the part's tensors are not this module's

    def forward(self, hidden_states: Tensor, *args: Any, cut: Cut, **kwargs: Any) -> Any:
        """The stock layer's own result."""

        def run(tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            kept = cut.tensors(self.layer, tensors)
            local = {name.removeprefix(self.prefix): t for name, t in kept.items()}
            return functional_call(self.block, local, args, kwargs)

        return self._part[0](run, hidden_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # e.g. Nemotron-H's `block_type`
