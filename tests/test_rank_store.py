"""Scores on disk, random orders, and parents sorted from folder to folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import stock_load
from models import FAMILIES, SMALL, letters_tokenizer, logits, same, tiny, tiny_config, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_elastic import rank, tensors
from star_elastic.checkpoint import Checkpoint
from star_elastic.folder import CheckpointError
from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.rank.blocks import Blocks
from star_elastic.slicing import slice_checkpoint
from star_elastic.symbols import symbol_of


def measured(family: str) -> tuple[Layout, rank.Raw]:
    model, ids = tiny(family), token_ids()
    batches = [(ids, torch.ones_like(ids))]
    blocks = Blocks(model)
    raw = rank.measure(blocks, batches)
    return blocks.layout, replace(raw, depth=rank.layer_errors(blocks, batches))


def parent_folder(family: str, path: Path) -> Checkpoint:
    """A plain folder with a tokenizer."""
    model = ElasticModel(tiny(family))
    tensors.write(path, model.state, model.layout, None, tokenizer=letters_tokenizer())
    return Checkpoint.open(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_come_back_as_they_were(family: str, tmp_path: Path) -> None:
    layout, raw = measured(family)
    rank.save_scores(tmp_path / "scores.safetensors", raw)
    found = rank.load_scores(tmp_path / "scores.safetensors", layout)
    assert (found.samples, found.tokens, found.parent) == (2, 26, raw.parent)
    assert found.sums.keys() == raw.sums.keys()
    assert all(torch.equal(found.sums[key], raw.sums[key]) for key in raw.sums)
    assert found.depth is not None and raw.depth is not None
    assert torch.equal(found.depth, raw.depth)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 40}, "hidden_size is 32, this one has 40"),
        ({"hybrid_override_pattern": "MEM*E-"}, "layers is 'norm+linear_attention"),
        ({"moe_shared_expert_intermediate_size": 24}, "moe_shared_expert_intermediate_size is 20"),
    ],
)
def test_scores_of_another_parent_are_refused(
    changes: dict[str, object], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "scores.safetensors"
    rank.save_scores(path, measured("nemotron_h")[1])
    with pytest.raises(CheckpointError) as error:
        rank.load_scores(path, Layout(tiny_config("nemotron_h", **changes)))
    assert named in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="model_type is 'nemotron_h', this one has 'qwen3'"):
        rank.load_scores(path, Layout(tiny_config("qwen3")))


def dropped(tensors: dict[str, Tensor]) -> None:
    del tensors["-/hidden_size/abs"]


def surplus(tensors: dict[str, Tensor]) -> None:
    tensors["0/hidden_size/abs"] = torch.ones(32)


def flat(tensors: dict[str, Tensor]) -> None:
    tensors["-/hidden_size/abs"] = torch.ones(31)


def nan(tensors: dict[str, Tensor]) -> None:
    tensors["-/hidden_size/abs"] = torch.full((32,), torch.nan)


def deeper(tensors: dict[str, Tensor]) -> None:
    tensors["depth"] = torch.ones(1, 99)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (dropped, "-/hidden_size/abs: missing"),
        (surplus, "0/hidden_size/abs: missing, or not of this model"),
        (flat, "-/hidden_size/abs: shape (31,), expected (32,)"),
        (nan, "-/hidden_size/abs: not all values are finite"),
        (deeper, "depth: shape (1, 99)"),
    ],
)
def test_a_file_of_scores_that_lies_is_refused(
    spoil: Callable[[dict[str, Tensor]], None], named: str, tmp_path: Path
) -> None:
    layout, raw = measured("nemotron_h")
    path = tmp_path / "scores.safetensors"
    rank.save_scores(path, raw)
    tensors = load_file(path)
    spoil(tensors)
    metadata = {"format": "star-elastic scores 1", "samples": "2", "tokens": "26"}
    metadata["parent"] = json.dumps(raw.parent)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError) as error:
        rank.load_scores(path, layout)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"format": "pt"}, "format: 'pt'"),
        ({"parent": "[1"}, "parent: "),
        ({"parent": "[1]"}, "parent: "),
        ({"tokens": "many"}, "metadata: "),
    ],
)
def test_metadata_that_cannot_be_read_are_refused(
    metadata: dict[str, str], named: str, tmp_path: Path
) -> None:
    layout, raw = measured("qwen3")
    path = tmp_path / "scores.safetensors"
    rank.save_scores(path, raw)
    good = {"format": "star-elastic scores 1", "samples": "2", "tokens": "26"}
    good["parent"] = json.dumps(raw.parent)
    save_file(load_file(path), path, metadata=good | metadata)
    with pytest.raises(CheckpointError) as error:
        rank.load_scores(path, layout)
    assert f"{path}: {named}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_what_is_no_file_of_scores_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="scores.safetensors: not readable"):
        rank.load_scores(path, Layout(tiny_config("qwen3")))


def test_heads_are_ranked_again_for_fewer_channels_without_the_data(tmp_path: Path) -> None:
    """D_top of eq. 4: another number of channels ranks heads on the best of these only."""
    layout, raw = measured("nemotron_h")
    rank.save_scores(tmp_path / "scores.safetensors", raw)
    loaded = rank.load_scores(tmp_path / "scores.safetensors", layout)
    squares = raw.sums[0, "n_groups*mamba_heads*mamba_head_dim", "square"]
    whole = rank.scores_of(layout, loaded)
    for kept in (1, 3):
        found = rank.scores_of(layout, loaded, {"mamba_head_dim": kept})
        top = sorted(range(4), key=lambda d: -float(squares[:, :, d].sum()))[:kept]
        expected = sum(squares[:, :, d] for d in top) ** 0.5
        torch.testing.assert_close(found[0, "mamba_heads"], expected)
        assert not torch.equal(found[0, "mamba_heads"], whole[0, "mamba_heads"])
        assert torch.equal(found[0, "mamba_head_dim"], whole[0, "mamba_head_dim"])
        queries = [key for key in found if key[1] == "queries"]
        assert queries and all(torch.equal(found[key], whole[key]) for key in queries)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_order_is_of_every_axis_and_keeps_the_function(family: str) -> None:
    model, ids = tiny(family), token_ids()
    layout = Layout(model.config)
    expected = rank.order(rank.score(model, [(ids, torch.ones_like(ids))]))
    before = logits(model, ids)
    orders, layers = rank.random_order(layout, seed=3)
    assert {k: v.shape for k, v in orders.items()} == {k: v.shape for k, v in expected.items()}
    assert sorted(layers) == list(range(len(layout.blocks)))
    kinds = [layout.blocks[layer] for layer in layers]
    assert len({*kinds[: len({*kinds})]}) == len({*kinds})
    assert any(not torch.equal(orders[key], expected[key]) for key in orders)
    rank.reorder(model, orders)
    torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=1e-5)


def test_a_seed_decides_the_random_order() -> None:
    layout = Layout(tiny_config("nemotron_h"))
    orders, layers = rank.random_order(layout, seed=3)
    again, layers_again = rank.random_order(layout, seed=3)
    assert layers == layers_again
    assert orders.keys() == again.keys()
    assert all(torch.equal(orders[key], again[key]) for key in orders)
    other, _ = rank.random_order(layout, seed=4)
    hidden = {tuple(o[None, "hidden_size"].tolist()) for o in (orders, other)}
    assert len(hidden) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_sorting_a_folder_is_sorting_in_memory(family: str, tmp_path: Path) -> None:
    opened = parent_folder(family, tmp_path / "parent")
    orders, layers = rank.random_order(opened.layout, seed=1)
    rank.reorder_checkpoint(opened, orders, layers, tmp_path / "sorted", max_shard_size=8_000)
    written = Checkpoint.open(tmp_path / "sorted")
    assert len({stored.file for stored in written.stored.values()}) > 3
    assert written.layout.layer_order == written.space.layer_order == layers
    model = ElasticModel.from_pretrained(opened.path)
    rank.reorder(model.parent, orders)
    state = {w.name: model.layout.view(model.state, w) for w in model.layout.stored.values()}
    same(dict(written.tensors()), state)
    found = stock_load(tmp_path / "sorted")
    assert torch.equal(logits(found, token_ids()), logits(model.parent, token_ids()))
    assert (tmp_path / "sorted" / "tokenizer_config.json").is_file()


def test_a_sorted_folder_is_sliced_on_every_axis(tmp_path: Path) -> None:
    opened = parent_folder("nemotron_h", tmp_path / "parent")
    orders, layers = rank.random_order(opened.layout, seed=1)
    rank.reorder_checkpoint(opened, orders, layers, tmp_path / "sorted")
    written = Checkpoint.open(tmp_path / "sorted")
    slice_checkpoint(written, tmp_path / "small", fields=SMALL["nemotron_h"])
    model = ElasticModel.from_pretrained(tmp_path / "sorted")
    small = model.submodel(**SMALL["nemotron_h"])
    found = logits(stock_load(tmp_path / "small"), token_ids())
    assert torch.equal(found, logits(small, token_ids()))


def test_sorting_a_bfloat16_folder_keeps_every_dtype(tmp_path: Path) -> None:
    model = tiny("nemotron_h").to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    held = ElasticModel(model)
    state = {n: t.float() if "correction" in n else t for n, t in held.state.items()}
    tensors.write(tmp_path / "parent", state, held.layout, None)
    opened = Checkpoint.open(tmp_path / "parent")
    rank.reorder_checkpoint(opened, rank.random_order(opened.layout, 1)[0], None, tmp_path / "s")
    written = Checkpoint.open(tmp_path / "s")
    dtypes = {name: stored.dtype for name, stored in written.stored.items()}
    assert dtypes == {name: stored.dtype for name, stored in opened.stored.items()}
    assert set(dtypes.values()) == {"BF16", "F32"}
    assert written.config.dtype == torch.bfloat16


def test_without_a_new_layer_order_the_old_one_stays(tmp_path: Path, written: Path) -> None:
    opened = Checkpoint.open(written)
    rank.reorder_checkpoint(opened, {}, None, tmp_path / "sorted")
    found = Checkpoint.open(tmp_path / "sorted")
    assert found.layout.layer_order == opened.layout.layer_order == [3, 1, 2, 5, 4, 0]
    assert [*found.space.sizes] == ["full"]


def test_a_folder_is_not_sorted_onto_itself(tmp_path: Path) -> None:
    opened = parent_folder("qwen3", tmp_path / "parent")
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        rank.reorder_checkpoint(opened, {}, None, tmp_path / "parent", overwrite=True)
    with pytest.raises(FileExistsError):
        (tmp_path / "there").mkdir()
        rank.reorder_checkpoint(opened, {}, None, tmp_path / "there")


def test_every_axis_has_a_symbol_in_the_random_order() -> None:
    layout = Layout(tiny_config("nemotron_h-latent"))
    orders, _ = rank.random_order(layout, seed=0)
    symbols = {symbol_of(layout.family, axis) for axis in layout.axes} - {layout.family.top_k}
    assert {symbol for _, symbol in orders} == symbols
