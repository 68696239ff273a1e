"""Layers ranked by iterative removal, against models that really lack them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from models import FAMILIES, logits, tiny, tiny_config, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from star_elastic import rank, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.rank.blocks import Blocks
from star_elastic.submodel import ElasticSpace

DEEP = {
    "nemotron_h": {"hybrid_override_pattern": "M*ME-E"},
    "nemotron_h-latent": {"hybrid_override_pattern": "ME*M-E"},
    "qwen3_moe": {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]},
} | {family: {"num_hidden_layers": 4} for family in ("llama", "llama-tied", "qwen2", "qwen3")}


def deep(family: str) -> PreTrainedModel:
    return tiny(family, **DEEP[family])


def calibration() -> list[tuple[Tensor, Tensor]]:
    ids = token_ids(rows=3, length=9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return [(ids[:2], mask[:2]), (ids[2:], mask[2:])]


def without(model: PreTrainedModel, gone: Sequence[int]) -> PreTrainedModel:
    """A view that lacks these layers."""
    layers = len(model.model.layers)
    order = [layer for layer in range(layers) if layer not in gone] + list(gone)
    held = ElasticModel(model, layer_order=order)
    return held.submodel(num_hidden_layers=layers - len(gone))


def brute_error(model: PreTrainedModel, gone: Sequence[int]) -> float:
    error = square = 0.0
    for ids, mask in calibration():
        full = logits(model, ids)[mask.bool()].double()
        error += float((full - logits(without(model, gone), ids)[mask.bool()]).square().sum())
        square += float(full.square().sum())
    return error / square


def brute_order(model: PreTrainedModel, min_layers: int) -> list[int]:
    """The same, one candidate and one model at a time."""
    kinds = Layout(model.config).blocks
    left, gone, last = list(range(len(kinds))), list[int](), dict[int, float]()
    while len(left) > min_layers:
        of_kind = [kinds[layer] for layer in left]
        candidates = [layer for layer in left if of_kind.count(kinds[layer]) > 1]
        if not candidates:
            break
        last = {layer: brute_error(model, [*gone, layer]) for layer in candidates}
        gone.append(min(last, key=lambda layer: last[layer]))
        left.remove(gone[-1])
    kept = sorted(left, key=lambda layer: -last.get(layer, float("inf")))
    return kept + gone[::-1]


def test_every_family_is_deep_enough_to_rank() -> None:
    assert set(FAMILIES) == set(DEEP)
    for family in FAMILIES:
        kinds = Layout(tiny_config(family, **DEEP[family])).blocks
        assert len(set(kinds)) < len(kinds) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_first_errors_are_those_of_models_without_the_layer(family: str) -> None:
    model = deep(family)
    kinds = Layout(model.config).blocks
    found = rank.layer_errors(Blocks(model), calibration(), min_layers=len(kinds))
    assert found.shape == (1, len(kinds))
    for layer, kind in enumerate(kinds):
        if kinds.count(kind) == 1:
            assert found[0, layer] == torch.inf
        else:
            assert float(found[0, layer]) == pytest.approx(brute_error(model, [layer]), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_iterative_removal_agrees_with_brute_force(family: str) -> None:
    model = deep(family)
    layout = Layout(model.config)
    errors = rank.layer_errors(Blocks(model), calibration())
    order = rank.layer_order(layout, errors)
    assert order == brute_order(model, 1)
    assert len(errors) == len(layout.blocks) - len(set(layout.blocks))
    kept = order[: len(set(layout.blocks))]
    assert {layout.blocks[layer] for layer in kept} == set(layout.blocks)


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3"])
def test_each_iteration_measures_without_all_that_went_before(family: str) -> None:
    model = deep(family)
    gone: list[int] = []
    errors = rank.layer_errors(Blocks(model), calibration())
    assert len(errors) > 1
    for row in errors:
        for layer in range(len(row)):
            if row[layer] < torch.inf:
                expected = brute_error(model, [*gone, layer])
                assert float(row[layer]) == pytest.approx(expected, rel=1e-4)
        assert all(row[layer] == torch.inf for layer in gone)
        gone.append(int(row.argmin()))


@pytest.mark.parametrize("min_layers", [2, 3, 4, 9])
def test_removal_stops_and_the_rest_keeps_its_last_scores(min_layers: int) -> None:
    model = deep("qwen3")
    layout = Layout(model.config)
    errors = rank.layer_errors(Blocks(model), calibration(), min_layers)
    assert len(errors) == max(1, 4 - min_layers)
    found = rank.layer_order(layout, errors, min_layers)
    if min_layers < 4:
        assert found == brute_order(model, min_layers)
    else:
        alone = {layer: brute_error(model, [layer]) for layer in range(4)}
        assert found == sorted(alone, key=lambda layer: -alone[layer])
    whole = rank.layer_errors(Blocks(model), calibration())
    assert rank.layer_order(layout, whole, min_layers) == found


def test_errors_that_end_too_early_are_refused() -> None:
    layout = Layout(deep("qwen3").config)
    errors = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    assert rank.layer_order(layout, errors, 3) == [3, 0, 2, 1]
    with pytest.raises(ValueError, match="min_layers = 2: scores rank down to 3 only"):
        rank.layer_order(layout, errors, 2)


def test_of_equal_layers_the_last_goes_first() -> None:
    layout = Layout(deep("qwen3").config)
    errors = torch.ones(3, 4)
    errors[1, 3] = errors[2, 2:] = torch.inf
    assert rank.layer_order(layout, errors) == [0, 1, 2, 3]


@pytest.mark.parametrize("planted", [0, 2])
@torch.no_grad()
def test_a_planted_useless_mamba_layer_goes_first(planted: int) -> None:
    model = deep("nemotron_h")
    model.get_submodule(f"model.layers.{planted}.mixer.out_proj").weight.zero_()
    errors = rank.layer_errors(Blocks(model), calibration())
    assert errors[0, planted] == 0
    assert rank.layer_order(Layout(model.config), errors)[-1] == planted


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
@torch.no_grad()
def test_a_planted_useless_decoder_layer_goes_first(family: str) -> None:
    model = deep(family)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        module = model.get_submodule(f"model.layers.2.{name}")
        for tensor in module.parameters():
            tensor.zero_()
    errors = rank.layer_errors(Blocks(model), calibration())
    assert errors[0].argmin() == 2 and errors[0, 2] == 0
    assert rank.layer_order(Layout(model.config), errors)[-1] == 2


@pytest.mark.parametrize("held", [1, 10**9])
def test_fetched_layers_are_ranked_bit_for_bit_alike(held: int, tmp_path: Path) -> None:
    model = deep("nemotron_h")
    parent = ElasticModel(model)
    tensors.write(tmp_path / "parent", parent.state, parent.layout, None)
    blocks = Blocks.fetched(Checkpoint.open(tmp_path / "parent"))
    found = rank.layer_errors(blocks, calibration(), held=held)
    assert torch.equal(found, rank.layer_errors(Blocks(model), calibration(), held=held))


def test_common_prefixes_run_once() -> None:
    """Of L layers, layer l runs the whole stream and one stream for every candidate before it."""
    model = deep("qwen3")
    runs: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: runs.append(number))
    ids = token_ids(rows=1)
    rank.layer_errors(Blocks(model), [(ids, torch.ones_like(ids))], min_layers=4)
    heads = 1 + 1 + 4  # stand-ins run too: once to begin, once for each of the logits
    assert [runs.count(layer) - heads for layer in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_submodel_keeps_the_best_layers(family: str) -> None:
    model = deep(family)
    layout = Layout(model.config)
    order = rank.layer_order(layout, rank.layer_errors(Blocks(model), calibration()))
    fewer = len(order) - 1
    held = ElasticModel(model, layer_order=order)
    held.space = ElasticSpace.of(held.layout, {"full": {}, "less": {"num_hidden_layers": fewer}})
    assert held.layout.kept_layers(held.layout.sizes_of({"num_hidden_layers": fewer})) == sorted(
        order[:fewer]
    )
    found = logits(held["less"], token_ids())
    torch.testing.assert_close(found, logits(without(model, order[fewer:]), token_ids()))
