"""A stock causal LM run layer by layer, with all its layers in memory or one at a time.

Nothing of any architecture is re-implemented: the stock model's own forward runs with stand-ins for
its layers, once to learn what each layer is called with (masks, rotary angles) and once to turn
final hidden states into logits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from star_elastic import stock
from star_elastic.checkpoint import Checkpoint
from star_elastic.layout import Layout
from star_elastic.tensors import in_memory

HELD = 4 * 2**30  # bytes of hidden states that a group of batches may hold
CalibrationBatch = tuple[Tensor, Tensor]  # token ids, mask of real tokens; each (batch, length)
_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Flow:
    """A batch on its way through the layers: `hidden` (batch, length, width) enters the next one.

    `calls` holds what the stock model calls each layer with, beside the hidden states.
    """

    input_ids: Tensor
    mask: Tensor  # bool: real tokens
    hidden: Tensor
    calls: list[_Call]

    def held(self, streams: int) -> int:
        """Bytes in memory while `streams` versions of the hidden states are under way."""
        others = {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(self.calls)}
        return streams * self.hidden.nbytes + sum(others.values())


Run = Callable[[Tensor, Flow], Tensor]


class Blocks:
    """The layers of a stock model, one at a time.

    `fetch` gives a layer's tensors by in-memory name; without it they are the model's own. A model
    is never left changed: stand-ins go, and fetched tensors are dropped, also on an error.
    """

    def __init__(
        self, model: PreTrainedModel, fetch: Callable[[int], dict[str, Tensor]] | None = None
    ):
        self.model = model
        self.layout = Layout(model.config)
        self.layers: Any = stock.layers_of(model)
        self._fetch = fetch

    @classmethod
    def fetched(cls, checkpoint: Checkpoint, device: str = "cpu") -> "Blocks":
        """The blocks of a folder: embeddings, last norm and head stay in memory, layers do not.

        Tensors have the dtypes that `from_pretrained` would give them.
        """
        model = stock.build(checkpoint.config, device="meta").eval()
        stock.set_tensors(model, _load(checkpoint, model, None, device))
        with torch.device(device):
            stock.fill_constants(model)
        model.tie_weights()
        return cls(model, lambda layer: _load(checkpoint, model, layer, device))

    def begin(self, input_ids: Tensor, mask: Tensor) -> Flow:
        """Embed a batch and learn what each layer will be called with."""
        calls: list[_Call] = []
        entered: list[Tensor] = []

        def record(hidden: Tensor, *arguments: Any, **named: Any) -> Tensor:
            calls.append((arguments, named))
            entered.append(hidden)
            return hidden

        with self._standing_in(record):
            self.model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        return Flow(input_ids, mask.bool(), entered[0], calls)

    def groups(
        self, batches: Iterable[CalibrationBatch], held: int, streams: int = 1
    ) -> Iterator[list[Flow]]:
        """Batches begun, as many together as `held` bytes allow (but one at least).

        Args:
            streams: versions of the hidden states that will be under way at once.
        """
        group: list[Flow] = []
        total = 0
        for input_ids, mask in batches:
            flow = self.begin(input_ids, mask)
            size = flow.held(streams)
            if group and total + size > held:
                yield group
                group, total = [], 0
            group.append(flow)
            total += size
        if group:
            yield group

    @contextmanager
    def layer(self, layer: int) -> Iterator[Run]:
        """Run one layer on hidden states (batch, length, width) of a flow; its weights are there
        inside the block only.
        """
        before: dict[str, Tensor] = {}

        def run(hidden: Tensor, flow: Flow) -> Tensor:
            arguments, named = flow.calls[layer]
            return self.layers[layer](hidden, *arguments, **named)

        try:
            if self._fetch is not None:
                tensors = self._fetch(layer)
                own = stock.get_tensors(self.model)
                before = {name: own[name] for name in tensors}
                stock.set_tensors(self.model, tensors)
                del tensors
            yield run
        finally:
            stock.set_tensors(self.model, before)

    def logits(self, flow: Flow, hidden: Tensor, last: int = 0) -> Tensor:
        """(batch, length, vocabulary) of hidden states that left the last layer.

        Args:
            last: positions at the end to compute; 0 for all.
        """
        with self._standing_in(lambda *_, **__: hidden):
            called = self.model(input_ids=flow.input_ids, use_cache=False, logits_to_keep=last)
        return called.logits

    @contextmanager
    def _standing_in(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        own = [vars(layer).get("forward") for layer in self.layers]
        try:
            for layer in self.layers:
                layer.forward = forward
            yield
        finally:
            for layer, before in zip(self.layers, own, strict=True):
                vars(layer).pop("forward", None)
                if before is not None:  # someone else's wrapper
                    layer.forward = before


def _load(
    checkpoint: Checkpoint, model: PreTrainedModel, layer: int | None, device: str
) -> dict[str, Tensor]:
    """In-memory tensors of one layer (or of what is outside), fused ones put together."""
    weights = [w for w in checkpoint.layout.weights.values() if w.layer == layer]
    return {
        name: tensor.to(device, stock.loaded_dtype(model, name))
        for name, tensor in in_memory(checkpoint, weights)
    }


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
