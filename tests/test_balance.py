"""Experts: counted as the stock gates pick them, and kept busy."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import elastic
from torch import Tensor
from training import one_batch, trainer
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from star_elastic import stock
from star_elastic.train.balance import Loads, aux_loss, balance_step, watched
from star_elastic.train.recipe import Balance

MOE = ["nemotron_h", "qwen3_moe"]


def picks(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits and picks of every gate of a stock model on the batch."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(
                lambda _, __, out, name=name: found.update({name: (out[0], out[2])})
            )
    with torch.no_grad():
        stock.use_chunk_scan(model)(**one_batch().inputs, use_cache=False)
    return found


@pytest.mark.parametrize("family", MOE)
def test_loads_are_what_the_stock_gates_pick(family: str) -> None:
    model, trained, loads = elastic(family), trainer(family), Loads()
    trained.balance = Balance(rate=0.1)
    trained.loss(one_batch(), trained.sizes["small"], None, loads)
    real = one_batch().mask.flatten()
    expected = picks(model["small"])
    assert len(loads.counts) == len(expected) > 0
    for (name, experts), load in loads.counts.items():
        assert experts == 4
        same = [p for _, p in expected.values() if torch.equal(load, counted(p[real], experts))]
        assert same, name
    layers = {int(name.split(".")[2]) for name, _ in loads.counts}
    kept = model.layout.kept_layers(model.layout.sizes_of(trained.sizes["small"]))
    moe = {n for n, parts in enumerate(model.layout.blocks) if "moe" in parts}
    assert layers == moe & set(kept)  # the parent's numbers


def counted(picked: Tensor, experts: int) -> Tensor:
    return torch.bincount(picked.flatten(), minlength=experts)


def test_the_loss_is_the_stock_one() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, generator=draw)
    picked = logits.softmax(-1).topk(2).indices
    expected = load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    torch.testing.assert_close(aux_loss(logits, picked), expected)


def test_padding_has_no_part_in_the_loss() -> None:
    """As in the stock loss of one layer with an attention mask; several gates are summed."""
    draw = torch.Generator().manual_seed(1)
    real = torch.ones(3, 8, dtype=torch.bool)
    real[0, 5:] = real[2, 2:] = False
    expected, loads = [], Loads()
    for _ in range(2):
        logits = torch.randn(24, 6, generator=draw)
        loads.gates.append((logits, logits.softmax(-1).topk(2).indices))
        expected.append(load_balancing_loss_func((logits,), 6, 2, attention_mask=real.long()))
    found = loads.aux_loss(real)
    torch.testing.assert_close(found, expected[0] + expected[1])
    assert not torch.allclose(torch.as_tensor(loads.aux_loss(torch.ones_like(real))), found)


def test_balance_raises_the_idle_and_lowers_the_busy() -> None:
    bias = torch.zeros(4)
    balance_step(bias, torch.tensor([4.0, 2.0, 2.0, 0.0]), rate=0.5)
    assert bias.tolist() == [-0.5, 0.0, 0.0, 0.5]


def test_padding_is_not_counted() -> None:
    trained, batch = trainer("qwen3_moe"), one_batch()
    skeleton, cut = trained.skeleton({})
    for real in (batch.mask, torch.zeros_like(batch.mask)):
        loads = Loads()
        with watched(skeleton, real, loads), torch.no_grad():
            trained.parts(skeleton, cut, lambda hidden, head: hidden, **batch.inputs)
        top_k = trained.parts.layout.sizes["num_experts_per_tok"]
        assert [int(n.sum()) for n in loads.counts.values()] == [int(real.sum()) * top_k] * 2


@pytest.mark.parametrize("again", [False, True])
def test_blocks_computed_again_are_counted_once(again: bool) -> None:
    trained, loads = trainer("nemotron_h", checkpoint_activations=again), Loads()
    trained.balance = Balance(rate=0.1, aux_loss=0.1)
    trained.loss(one_batch(), {}, None, loads).backward()
    tokens = int(one_batch().mask.sum())
    assert {int(load.sum()) for load in loads.counts.values()} == {2 * tokens}


@pytest.mark.parametrize("family", MOE)
def test_blocks_computed_again_have_the_same_gradients(family: str) -> None:
    """The loss on the gates included, though nothing watches them the second time."""
    found: list[dict[str, Tensor | None]] = []
    for again in (False, True):
        trained = trainer(family, checkpoint_activations=again)
        trained.balance = Balance(aux_loss=1.0)
        trained.loss(one_batch(), trained.sizes["small"], None, Loads()).backward()
        found.append({name: tensor.grad for name, tensor in trained.weights.items()})
    assert any(name.endswith("gate.weight") for name in found[0])
    for name, gradient in found[0].items():
        other = found[1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            torch.testing.assert_close(other, gradient, msg=lambda m, n=name: f"{n}: {m}")


def hooks(skeleton: Any) -> int:
    return sum(len(module._forward_hooks) for module in skeleton.modules())


def test_nothing_is_watched_afterwards() -> None:
    """Not even after an error in the pass."""
    trained, batch, loads = trainer("qwen3_moe"), one_batch(), Loads()
    skeleton, cut = trained.skeleton({})
    before = hooks(skeleton)
    for broken in (False, True):

        def finish(hidden: Tensor, head: Tensor, broken: bool = broken) -> Tensor:
            if broken:
                raise RuntimeError("out of memory")
            assert hooks(skeleton) == before + 2
            return hidden

        with (
            pytest.raises(RuntimeError) if broken else nullcontext(),
            watched(skeleton, batch.mask, loads),
        ):
            trained.parts(skeleton, cut, finish, **batch.inputs)
        assert hooks(skeleton) == before and len(loads.gates) == 2 * (1 + broken)


def test_sizes_are_counted_apart() -> None:
    """The experts of a smaller size are fewer: its mean load is over those alone."""
    trained, loads = trainer("nemotron_h"), Loads()
    trained.balance = Balance(rate=0.1)
    for name in ("full", "small", "full"):
        trained.loss(one_batch(), trained.sizes[name], None, loads)
    tokens = int(one_batch().mask.sum())
    found = {experts: int(load.sum()) for (_, experts), load in loads.counts.items()}
    assert found == {6: 2 * 2 * tokens, 4: tokens}  # top 2 of 6, twice; top 1 of 4


@pytest.mark.parametrize("family", MOE)
def test_the_loss_reaches_the_gate(family: str) -> None:
    gradients = []
    for weight in (0.0, 1.0):
        trained = trainer(family)
        trained.balance = Balance(aux_loss=weight, rate=0.1)
        trained.loss(one_batch(), {}, None, Loads()).backward()
        gradients.append(
            {n: t.grad for n, t in trained.weights.items() if n.endswith("gate.weight")}
        )
    plain, balanced = gradients
    assert all(not torch.allclose(plain[name], balanced[name]) for name in plain)


@pytest.mark.parametrize(
    ("family", "balance"),
    [("qwen3_moe", Balance(aux_loss=1.0)), ("nemotron_h", Balance(rate=0.1))],
)
def test_a_collapsed_gate_recovers(family: str, balance: Balance) -> None:
    """One expert that is everybody's choice is less so after training that balances."""
    shares = []
    for each in (Balance(), balance):
        trained = trainer(family, steps=20, balance=each, size_probs={"full": 1.0})
        with torch.no_grad():
            for name, tensor in trained.weights.items():
                if name.endswith("e_score_correction_bias"):
                    tensor[0] += 1.0
                elif name.endswith("gate.weight") and family == "qwen3_moe":
                    tensor.mul_(0.2)
                    tensor[1:] = 0.5 * tensor[1:] - 0.5 * tensor[0]
        trained.run()
        shares.append(busiest(trained))
    assert shares[1] < 0.9 * shares[0]


@torch.no_grad()
def busiest(trained: Any) -> float:
    """The largest share of tokens that one expert gets, over all gates."""
    loads, batch = Loads(), one_batch()
    skeleton, cut = trained.skeleton({})
    with watched(skeleton, batch.mask, loads):
        trained.parts(skeleton, cut, lambda hidden, head: hidden, **batch.inputs)
    return max(float(load.max() / load.sum()) for load in loads.counts.values())
