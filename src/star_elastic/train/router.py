"""The router: a budget in, one choice per axis out, learned by distillation under masks.

Flextron (arXiv 2406.10260) and Nemotron Elastic (arXiv 2511.16664, section 3.3): a small network
per axis turns a budget into logits over that axis' choices; Gumbel-softmax (arXiv 1611.01144) draws
a soft choice, whose mask the parent runs under, and whose *expected* cost is held to the budget.
Budgets nobody trained for are blends of their two neighbours.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from torch import Tensor, nn

from star_elastic import latency
from star_elastic.budget import Metric
from star_elastic.folder import (
    CheckpointError,
    Stored,
    one_line,
    parse_file,
    parse_json,
    read_bytes,
)
from star_elastic.layout import Layout
from star_elastic.submodel import check_fields
from star_elastic.symbols import DEPTH, symbol_of
from star_elastic.train.likely import likely
from star_elastic.train.recipe import Routing

ROUTER = "router.safetensors"
_TRIED = 400  # combinations held against a budget, at most
_MAX_BYTES, _MAX_CHOICES = 2**24, 2**12  # of a router's file; of all its axes
Probabilities = dict[str, Tensor]  # axis -> (layers or 1, choices), rows sum to 1


class Router(nn.Module):
    """Budgets are shares of the parent's cost under a metric, 1.0 for the parent itself."""

    def __init__(
        self,
        layout: Layout,
        settings: Routing,
        metric: Metric,
        budgets: Sequence[float],
        seed: int = 0,
    ):
        """Raises:
        ValueError: an axis or a choice that this parent does not have.
        """
        super().__init__()
        self.layout = layout
        self.metric = metric
        self.budgets = sorted(set(budgets), reverse=True)
        if not self.budgets or not 0 < self.budgets[-1] <= self.budgets[0] <= 1:
            raise ValueError(f"router: budgets {self.budgets} are no shares of the parent")
        self.choices = {axis: _choices(layout, axis, settings.axes[axis]) for axis in settings.axes}
        # with the parent's own values, so that a router on disk tells which parent it is of
        self.settings = settings.model_copy(update={"axes": self.choices})
        for axis in settings.per_layer:
            if axis not in self.choices:
                raise ValueError(f"router.per_layer: {axis!r} is not among router.axes")
            check_fields(layout, {axis: [layout.sizes[axis]] * len(layout.blocks)})
        self.whole = float(metric.cost(layout, layout.sizes))
        least = layout.sizes_of({axis: choices[0] for axis, choices in self.choices.items()})
        if metric.cost(layout, least) == self.whole:
            axes = ", ".join(self.choices) or "none"
            raise ValueError(f"router.axes: {axes}: no choice changes the {metric.describe()}")
        self._costs: dict[str, float] = {}
        draw = torch.Generator().manual_seed(seed)
        self.networks = nn.ModuleDict(
            {
                axis: _network(len(self.budgets), settings.width, self._outputs(axis), draw)
                for axis in self.choices
            }
        )

    def encode(self, budget: float) -> Tensor:
        """A budget as a one-hot of those trained, or the blend of its two neighbours."""
        code = torch.zeros(len(self.budgets))
        for position, trained in enumerate(self.budgets):
            if budget >= trained:
                above = self.budgets[max(0, position - 1)]
                share = 0.0 if above == trained else min(1, (budget - trained) / (above - trained))
                code[position] += 1 - share
                code[max(0, position - 1)] += share
                return code
        code[-1] = 1.0
        return code

    def logits(self, budget: float) -> Probabilities:
        """Unscaled logits per axis."""
        code = self.encode(budget)
        return {
            axis: self.networks[axis](code).view(-1, len(choices))
            for axis, choices in self.choices.items()
        }

    def draw(self, budget: float, done: float, generator: torch.Generator) -> Probabilities:
        """A Gumbel-softmax draw; `done` (0 to 1) anneals temperature and scale of the logits.

        In `settings.hard` of all draws the forward value is one-hot, its gradient the soft one's.
        """
        first, last = self.settings.temperature
        temperature = first * (last / first) ** done
        low, high = self.settings.scale
        hard = torch.rand((), generator=generator).item() < self.settings.hard
        found: Probabilities = {}
        for axis, logits in self.logits(budget).items():
            noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
            scaled = logits * (low + (high - low) * done) + noise
            soft = F.softmax(scaled / temperature, -1)
            found[axis] = _hardened(soft) if hard else soft
        return found

    @torch.no_grad()
    def fields(self, budget: float) -> dict[str, int | list[int]]:
        """The likeliest config fields whose cost is the budget, within the dead zone.

        Where no combination tried comes that near, the likeliest that does not exceed it; where all
        do, the cheapest. Fields of the parent's own value are left out. Axes that differ per layer
        take each layer's likeliest.
        """
        logits = self.logits(budget)
        uneven = {
            axis: [self.choices[axis][n] for n in logits[axis].argmax(-1).tolist()]
            for axis in self.settings.per_layer
        }
        even = [axis for axis in self.choices if axis not in uneven]
        scores = [logits[axis][0].log_softmax(-1).tolist() for axis in even]
        tried: list[tuple[float, dict[str, int | list[int]]]] = []
        for picked in islice(likely(scores), _TRIED):
            chosen = {a: self.choices[a][n] for a, n in zip(even, picked, strict=True)}
            fields = self._shrunk({**chosen, **uneven})
            miss = self._cost(fields) / (budget * self.whole) - 1
            if abs(miss) <= self.settings.dead_zone:
                return fields
            tried.append((miss, fields))
        cheapest = min(tried, key=lambda each: each[0])
        return next((each for each in tried if each[0] < 0), cheapest)[1]

    def _shrunk(self, fields: Mapping[str, int | list[int]]) -> dict[str, int | list[int]]:
        whole = self.layout.sizes
        return {
            axis: value
            for axis, value in fields.items()
            if any(each != whole[axis] for each in (value if isinstance(value, list) else [value]))
        }

    def _cost(self, fields: Mapping[str, int | list[int]]) -> float:
        key = repr(fields)
        if key not in self._costs:
            self._costs[key] = float(self.metric.cost(self.layout, self.layout.sizes_of(fields)))
        return self._costs[key]

    def expected(self, probabilities: Probabilities) -> dict[str, Any]:
        """The sizes to expect of a draw, for `Layout.count` and its like; differentiable."""
        sizes: dict[str, Any] = dict(self.layout.sizes)
        for axis, choices in self.choices.items():
            for symbol in {axis, symbol_of(self.layout.family, axis)}:
                values = [float(self._units(axis, symbol, choice)) for choice in choices]
                mean = probabilities[axis] @ torch.tensor(values)
                sizes[symbol] = list(mean) if axis in self.settings.per_layer else mean[0]
        if DEPTH in self.choices:
            sizes["layer"] = list(self._kept_layers(probabilities[DEPTH]))
        return sizes

    def masks(self, probabilities: Probabilities) -> dict[str, Any]:
        """The masks of a draw: M = sum over choices of probability * prefix (soft or one-hot)."""
        masks: dict[str, Any] = {"layer": list(torch.ones(len(self.layout.blocks)))}
        for axis, choices in self.choices.items():
            if axis == DEPTH:
                masks["layer"] = list(self._kept_layers(probabilities[axis]))
                continue
            symbol = symbol_of(self.layout.family, axis)
            units = torch.arange(self.layout.sizes[symbol])
            kept = torch.tensor([self._units(axis, symbol, choice) for choice in choices])
            mask = probabilities[axis] @ (units < kept[:, None]).float()
            masks[symbol] = list(mask) if axis in self.settings.per_layer else mask[0]
        return masks

    def budget_loss(self, probabilities: Probabilities, budget: float) -> Tensor:
        """|expected cost / (budget * parent's cost) - 1|, nothing inside the dead zone.

        Budget 1 has no dead zone and is anchored to the full size, so that there it is exact.
        """
        cost = self.metric.cost(self.layout, self.expected(probabilities))
        miss = (cost / (budget * self.whole) - 1).abs()
        if budget != 1.0:
            return miss * (miss.detach() >= self.settings.dead_zone)
        return miss + self.settings.anchor * sum(
            F.mse_loss(
                probs, F.one_hot(torch.tensor(len(choices) - 1), len(choices)).expand_as(probs)
            )
            for probs, choices in zip(probabilities.values(), self.choices.values(), strict=True)
        )

    def _outputs(self, axis: str) -> int:
        layers = len(self.layout.blocks) if axis in self.settings.per_layer else 1
        return layers * len(self.choices[axis])

    def _units(self, axis: str, symbol: str, choice: int) -> int:
        return self.layout.sizes_of({axis: choice})[symbol]

    def _kept_layers(self, probabilities: Tensor) -> Tensor:
        """The chance of each layer to be there, (layers,)."""
        kept = [self.layout.sizes_of({DEPTH: choice})["layer"] for choice in self.choices[DEPTH]]
        return probabilities[0] @ torch.tensor(kept).float()


def _choices(layout: Layout, axis: str, choices: Sequence[int]) -> list[int]:
    """Ascending, the parent's own value always among them."""
    for choice in choices:
        check_fields(layout, {axis: choice})
    return sorted({*choices, layout.sizes[axis]})


def _network(inputs: int, width: int, outputs: int, draw: torch.Generator) -> nn.Sequential:
    first, second = nn.Linear(inputs, width, bias=False), nn.Linear(width, outputs, bias=False)
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=0.1, generator=draw)
    return nn.Sequential(first, nn.LeakyReLU(0.1), second)


def _hardened(soft: Tensor) -> Tensor:
    """One-hot forward, the soft draw's gradient backward."""
    picked = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return picked + (soft - soft.detach())  # exactly one-hot


def warm_up(router: Router) -> None:
    """Learn the budgets alone, before any model runs: expected costs are affordable from the start.

    Without noise, so that nothing is decided yet: probabilities stay soft, and the distillation
    loss still has its say in which axis pays.
    """
    optimizer = torch.optim.Adam(router.parameters(), lr=router.settings.learning_rate)
    for update in range(router.settings.warmup):
        budget = router.budgets[update % len(router.budgets)]
        soft = {axis: F.softmax(logits, -1) for axis, logits in router.logits(budget).items()}
        router.budget_loss(soft, budget).backward()
        optimizer.step()
        optimizer.zero_grad()


def metric_of(settings: Routing, layout: Layout) -> Metric:
    """The metric that a recipe's budgets are shares of.

    Raises:
        ValueError: latency without a table, or a table that cannot be read.
    """
    table = None
    if settings.metric == "latency":
        if settings.latency_table is None:
            raise ValueError("router.latency_table: the metric is latency, so it needs one")
        table = latency.load(settings.latency_table, layout)
    return Metric(kind=settings.metric, context=settings.context, batch=settings.batch, table=table)


def save_router(router: Router, path: Path) -> None:
    """Write a router: the networks, and in its metadata what they choose among."""
    described = {
        "settings": json.loads(router.settings.model_dump_json()),
        "metric": json.loads(router.metric.model_dump_json()),
        "budgets": router.budgets,
        "layer_order": router.layout.layer_order,
    }
    tensors = {name: t.detach().contiguous() for name, t in router.state_dict().items()}
    # one entry: the order of several would differ from one file to the next
    save_file(tensors, path, metadata={"router": json.dumps(described)})


def load_router(path: Path, layout: Layout) -> Router:
    """The router that lies beside a checkpoint's weights.

    Raises:
        CheckpointError: not a router, or one of another parent.
    """
    data = read_bytes(path.parent, path.name, _MAX_BYTES)
    try:
        stored, metadata = parse_file(data, path.name)
        described = parse_json(metadata["router"].encode())
        if described["layer_order"] != layout.layer_order:
            raise ValueError("its layer_order is not the checkpoint's")
        settings = Routing.model_validate_json(json.dumps(described["settings"]))
        metric = Metric.model_validate_json(json.dumps(described["metric"]))
        _check_sizes(settings, described["budgets"], stored)
        router = Router(layout, settings, metric, described["budgets"])
        tensors = load(data)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError("a weight is not finite")
        router.load_state_dict(tensors)
    except KeyError as error:
        raise CheckpointError(f"{path}: no {error} in its metadata") from None
    except Exception as error:
        raise CheckpointError(f"{path}: not the router of this parent: {one_line(error)}") from None
    return router.eval()


def _check_sizes(settings: Routing, budgets: Sequence[float], stored: Mapping[str, Stored]) -> None:
    """What the settings claim is in the file: only then is it worth the memory and the time."""
    if (count := sum(map(len, settings.axes.values()))) > _MAX_CHOICES:
        raise ValueError(f"axes: {count} choices; at most {_MAX_CHOICES} are read")
    if len(settings.per_layer) > len(settings.axes):
        raise ValueError("per_layer: more entries than axes")
    for axis in settings.axes:
        name, expected = f"networks.{axis}.0.weight", (settings.width, len(budgets))
        if name not in stored or stored[name].shape != expected:
            found = stored[name].shape if name in stored else "missing"
            raise ValueError(f"{name[:80]}: {found}, expected {expected}")
