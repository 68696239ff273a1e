"""Cache pools: stock models over rows of a pool say what they say without a cache."""

from typing import Any

import pytest
import torch
from models import FAMILIES, elastic, logits, tiny_config, token_ids
from torch import Tensor
from transformers import PreTrainedModel

from star_elastic.model import ElasticModel
from star_elastic.serve.cache import Places, Pool, Row, Rows, check_rows

BLOCK = 4
CPU = torch.device("cpu")
TABLES = [[7, 2, 11, 0, 5], [1, 9, 3, 10, 4]]  # blocks of two sequences, in no order


def places_of(model: ElasticModel, size: str) -> Places:
    return Places.of(model.layout, model.sizes[size].config)


def pool_of(places: Places, slots: int = 3) -> Pool:
    return Pool(places.geometry, slots, 12, BLOCK, torch.float32, CPU)


@torch.no_grad()
def run(model: PreTrainedModel, rows: Rows, ids: Tensor) -> Tensor:
    """The logits of new tokens."""
    return model(
        input_ids=ids,
        attention_mask=rows.mask(torch.float32),
        position_ids=rows.positions,
        past_key_values=rows,
        use_cache=True,
    ).logits


@pytest.mark.parametrize("size", ["full", "small"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_unlike_length_advance_together(family: str, size: str) -> None:
    """One row is three tokens ahead; both go on by 5, by 1, by 2: alone they say the same."""
    model = elastic(family)
    places = places_of(model, size)
    pool, ids = pool_of(places), token_ids(2, 14)
    for tensor in pool.tensors:
        tensor.fill_(torch.nan)  # what was never written is never read
    for slot in (2, 0):
        pool.clear(slot)
    ahead = Rows(pool, places, [Row(2, TABLES[0], 0)], 3)
    found = [[run(model[size], ahead, ids[:1, :3])[0]], []]
    ahead.commit()
    starts = [3, 0]
    for count in (5, 1, 2):
        rows = [Row(2, TABLES[0], starts[0]), Row(0, TABLES[1], starts[1])]
        cache = Rows(pool, places, rows, count)
        new = [ids[row, start : start + count] for row, start in enumerate(starts)]
        for row, part in enumerate(run(model[size], cache, torch.stack(new))):
            found[row].append(part)
        cache.commit()
        starts = [start + count for start in starts]
    for row, end in enumerate(starts):
        expected = logits(model[size], ids[row : row + 1, :end])[0]
        torch.testing.assert_close(torch.cat(found[row]), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_a_call_that_was_not_committed_may_be_made_again(count: int) -> None:
    model = elastic("nemotron_h")
    places = places_of(model, "full")
    pool, ids = pool_of(places), token_ids(2, 8)
    first = Rows(pool, places, [Row(1, TABLES[0], 0), Row(0, TABLES[1], 0)], 5)
    run(model["full"], first, ids[:, :5])
    first.commit()
    states = [tensor.clone() for tensor in pool.tensors]
    rows = [Row(1, TABLES[0], 5), Row(0, TABLES[1], 5)]
    calls = [Rows(pool, places, rows, count) for _ in range(2)]
    said = [run(model["full"], rows, ids[:, 5 : 5 + count]) for rows in calls]
    assert torch.equal(*said)
    for kind, before, after in zip(pool.kinds, states, pool.tensors, strict=True):
        assert torch.equal(before, after) == (not kind.startswith("token."))


@pytest.mark.parametrize("blocks", [[3, 4, 5, 6], [3, 4, 6, 5]])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lone_row_is_read_where_it_lies(family: str, blocks: list[int]) -> None:
    """In one piece or not, beside what is NaN; and its tokens have one place only."""
    model = elastic(family)
    places = places_of(model, "full")
    pool, ids = pool_of(places), token_ids(1, 14)
    for tensor in pool.tensors:
        tensor.fill_(torch.nan)
    pool.clear(1)
    found, start = [], 0
    for count in (6, 1, 1, 5, 1):
        cache = Rows(pool, places, [Row(1, blocks, start)], count)
        assert (cache._lies is not None) == (blocks[2] == 5 or start + count <= 8)
        found.append(run(model["full"], cache, ids[:, start : start + count]))
        cache.commit()
        start += count
    expected = logits(model["full"], ids)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-4)
    for kind, tensor in zip(pool.kinds, pool.tensors, strict=True):
        if kind.startswith("token."):
            own = [BLOCK * block + n for block in blocks for n in range(BLOCK)][:14]
            assert tensor.isfinite().all(1).nonzero().flatten().tolist() == sorted(own)


def test_a_slot_is_cleared_without_its_neighbours() -> None:
    pool = pool_of(places_of(elastic("nemotron_h"), "full"))
    for tensor in pool.tensors:
        tensor.fill_(1)
    pool.clear(1)
    kinds = set(pool.kinds)
    assert kinds == {"conv", "ssm", "token.key", "token.value"}
    for kind, tensor in zip(pool.kinds, pool.tensors, strict=True):
        if not kind.startswith("token."):
            assert not tensor[1].any() and tensor[0].all() and tensor[2].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pool_takes_the_bytes_that_the_layout_counts(family: str) -> None:
    model = elastic(family)
    pool = pool_of(places_of(model, "small"), slots=5)
    sizes = model.layout.sizes_of(model.sizes["small"].config)
    one = model.layout.cache_bytes(1, 1, sizes, "float32")
    assert pool.nbytes == 12 * BLOCK * one["kv"] + 5 * (one["conv"] + one["ssm"])


def test_sizes_of_equal_cache_shapes_have_one_geometry() -> None:
    """A Mamba head less is another geometry; a width less is none."""
    llama, hybrid = elastic("llama"), elastic("nemotron_h")
    assert places_of(llama, "small").geometry == places_of(llama, "prefix").geometry
    assert places_of(llama, "small").geometry != places_of(llama, "full").geometry
    assert places_of(hybrid, "small").geometry != places_of(hybrid, "prefix").geometry


def test_states_are_found_by_the_layers_of_the_size() -> None:
    """Of MEM*-E the small size keeps EM*-E: its Mamba layer is its second."""
    places = places_of(elastic("nemotron_h"), "small")
    assert set(places.index) == {(1, "conv"), (1, "ssm"), (2, "token.key"), (2, "token.value")}


def test_a_row_looks_at_itself_and_what_was_before() -> None:
    places = places_of(elastic("llama"), "full")
    rows = Rows(pool_of(places), places, [Row(0, TABLES[0], 2), Row(1, TABLES[1], 0)], 2)
    no = -torch.inf
    expected = [[[0, 0, 0, no], [0, 0, 0, 0]], [[0, no, no, no], [0, 0, no, no]]]
    assert torch.equal(rows.mask(torch.float32)[:, 0], torch.tensor(expected))
    assert rows.positions.tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_position_embeddings": 63}, "63 positions"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "window of 8"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    ],
)
def test_models_whose_rows_are_not_alone_are_refused(changes: dict[str, Any], named: str) -> None:
    config = tiny_config("qwen2", **{"attn_implementation": "sdpa", **changes})
    with pytest.raises(ValueError, match=named):
        check_rows(config, 64)
