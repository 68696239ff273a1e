"""Stock models run layer by layer: resident or fetched from disk, the same as run whole."""

from pathlib import Path

import pytest
import torch
from models import FAMILIES, elastic, logits, same, tiny, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from star_elastic import rank, stock, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.rank.blocks import Blocks, Flow

RESIDENT_AND_FETCHED = [pytest.param(False, id="resident"), pytest.param(True, id="fetched")]


def folder_of(model: PreTrainedModel, path: Path, shard: int = 5 * 10**9) -> Checkpoint:
    held = ElasticModel(model)
    tensors.write(path, held.state, held.layout, None, max_shard_size=shard)
    return Checkpoint.open(path)


def blocks_of(model: PreTrainedModel, path: Path, fetched: bool) -> Blocks:
    return Blocks.fetched(folder_of(model, path / "parent")) if fetched else Blocks(model)


@torch.no_grad()
def walked(blocks: Blocks, ids: Tensor) -> Tensor:
    """Logits, layer by layer."""
    flow = blocks.begin(ids, torch.ones_like(ids))
    for layer in range(len(blocks.layers)):
        with blocks.layer(layer) as run:
            flow.hidden = run(flow.hidden, flow)
    return blocks.logits(flow, flow.hidden)


def batches_of(*rows: int) -> list[tuple[Tensor, Tensor]]:
    drawn = [token_ids(rows=n, length=9 + n, seed=n) for n in rows]
    return [(ids, torch.ones_like(ids)) for ids in drawn]


@pytest.mark.parametrize("fetched", RESIDENT_AND_FETCHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_whole_model(family: str, fetched: bool, tmp_path: Path) -> None:
    model, ids = tiny(family), token_ids(rows=3)
    expected = logits(model, ids)
    assert torch.equal(walked(blocks_of(model, tmp_path, fetched), ids), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_are_the_stock_models_own(implementation: str) -> None:
    model, ids = tiny("qwen3"), token_ids(rows=3)
    model.set_attn_implementation(implementation)
    assert torch.equal(walked(Blocks(model), ids), logits(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_fetched_from_many_files_scores_as_in_memory(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    opened = folder_of(model, tmp_path / "parent", shard=8_000)
    assert len({stored.file for stored in opened.stored.values()}) > 3
    batches = batches_of(1, 2, 3)
    expected = rank.measure(Blocks(model), batches)
    found = rank.measure(Blocks.fetched(opened), batches)
    assert found.sums.keys() == expected.sums.keys()
    assert all(torch.equal(found.sums[key], value) for key, value in expected.sums.items())
    assert (found.samples, found.tokens) == (6, 10 + 2 * 11 + 3 * 12)
    assert (found.samples, found.tokens) == (expected.samples, expected.tokens)


def test_a_bfloat16_folder_is_fetched_as_it_loads(tmp_path: Path) -> None:
    model = tiny("nemotron_h").to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    opened = folder_of(model, tmp_path / "parent")
    loaded = ElasticModel.from_pretrained(opened.path).parent
    blocks = Blocks.fetched(opened)
    assert torch.equal(walked(blocks, token_ids()), logits(loaded, token_ids()))
    with blocks.layer(1):
        found = stock.get_tensors(blocks.model)
        expected = stock.get_tensors(loaded)
        there = {name for name, tensor in found.items() if not tensor.is_meta}
        assert {name: found[name].dtype for name in there} == {
            name: expected[name].dtype for name in there
        }
        assert any(found[name].dtype == torch.float32 for name in there)


@pytest.mark.parametrize("held", [1, 10**9])
def test_groups_hold_what_fits_and_read_the_model_once_each(held: int, tmp_path: Path) -> None:
    model = tiny("nemotron_h")
    opened = folder_of(model, tmp_path / "parent")
    fetched = Blocks.fetched(opened)
    reads: list[int] = []
    fetch = fetched._fetch
    assert fetch is not None
    blocks = Blocks(fetched.model, lambda layer: reads.append(layer) or fetch(layer))
    found = rank.measure(blocks, batches_of(1, 2, 3), held)
    layers = len(model.model.layers)
    assert reads == list(range(layers)) * (3 if held == 1 else 1)
    expected = rank.measure(Blocks(model), batches_of(1, 2, 3))
    for key, value in expected.sums.items():
        torch.testing.assert_close(found.sums[key], value, rtol=1e-12, atol=1e-12)


def test_a_group_stays_within_its_bytes() -> None:
    blocks = Blocks(tiny("llama"))
    flows = [blocks.begin(*batch) for batch in batches_of(2, 2, 2)]
    limit = sum(flow.held(3) for flow in flows[:2])
    assert flows[0].held(3) - flows[0].held(1) == 2 * flows[0].hidden.nbytes
    sizes = [len(group) for group in blocks.groups(batches_of(2, 2, 2), limit, streams=3)]
    assert sizes == [2, 1]
    sizes = [len(group) for group in blocks.groups(batches_of(2, 2, 2), limit - 1, streams=3)]
    assert sizes == [1, 1, 1]


def resident_bytes(model: PreTrainedModel) -> int:
    return sum(t.nbytes for t in stock.get_tensors(model).values() if not t.is_meta)


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
def test_one_layer_is_in_memory_at_a_time(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    blocks = Blocks.fetched(folder_of(model, tmp_path / "parent"))
    sizes = [sum(t.nbytes for t in stock.get_tensors(layer).values()) for layer in blocks.layers]
    outside = resident_bytes(blocks.model)
    assert outside == resident_bytes(model) - sum(sizes)
    peaks: list[int] = []
    for layer, expected in enumerate(sizes):
        with blocks.layer(layer):
            peaks.append(resident_bytes(blocks.model))
            assert peaks[-1] == outside + expected
        assert resident_bytes(blocks.model) == outside
    assert max(peaks) < 0.7 * resident_bytes(model)


def test_fetched_tensors_go_even_after_an_error(tmp_path: Path) -> None:
    blocks = Blocks.fetched(folder_of(tiny("qwen3"), tmp_path / "parent"))
    outside = resident_bytes(blocks.model)
    with pytest.raises(KeyError), blocks.layer(0):
        raise KeyError
    assert resident_bytes(blocks.model) == outside


def test_stand_ins_go_even_after_an_error() -> None:
    model = tiny("qwen3")
    before = logits(model, token_ids())
    with pytest.raises(IndexError):
        Blocks(model).begin(token_ids() + 10**6, torch.ones(2, 13))
    assert not any("forward" in vars(layer) for layer in stock.layers_of(model))
    assert torch.equal(logits(model, token_ids()), before)


def test_another_ones_wrapper_of_a_layer_stays() -> None:
    model = tiny("qwen3")
    expected = logits(model, token_ids())
    layer = stock.layers_of(model)[0]
    wrapped, calls = layer.forward, []
    layer.forward = lambda *args, **named: calls.append(1) or wrapped(*args, **named)
    assert torch.equal(walked(Blocks(model), token_ids()), expected)
    assert calls == [1]
    model(input_ids=token_ids(), use_cache=False)
    assert calls == [1, 1]


def test_logits_of_the_last_positions_only() -> None:
    model, ids = tiny("qwen3"), token_ids()
    blocks = Blocks(model)
    flow: Flow = blocks.begin(ids, torch.ones_like(ids))
    with torch.no_grad():
        whole = blocks.logits(flow, flow.hidden)
        assert torch.equal(blocks.logits(flow, flow.hidden, last=2), whole[:, -2:])
    assert whole.shape == (*ids.shape, model.config.vocab_size)


def test_tied_embeddings_are_held_once(tmp_path: Path) -> None:
    blocks = Blocks.fetched(folder_of(tiny("llama-tied"), tmp_path / "parent"))
    head = blocks.model.get_output_embeddings().weight
    assert head is blocks.model.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_an_elastic_folder_is_fetched_too(family: str, tmp_path: Path) -> None:
    model = elastic(family)
    model.save_pretrained(tmp_path / "elastic")
    blocks = Blocks.fetched(Checkpoint.open(tmp_path / "elastic"))
    assert torch.equal(walked(blocks, token_ids()), logits(model.parent, token_ids()))
    with blocks.layer(0):
        found = {n: t for n, t in stock.get_tensors(blocks.model).items() if not t.is_meta}
        state = {n: t for n, t in stock.get_tensors(model.parent).items() if n in found}
        same(found, state)
