"""Prefixes that were computed before: the same tokens come out, less is computed."""

from collections.abc import Sequence

import pytest
import torch
from models import FAMILIES, elastic
from test_serve_engine import SIZES, alone, answers, drain, ends, pool_tensors, prompt

from star_elastic.model import ElasticModel
from star_elastic.serve.engine import Engine, Request
from star_elastic.serve.prefix import Prefixes


def ask(
    engine: Engine, ids: Sequence[int], size: str = "full", **how: str
) -> tuple[list[int], int]:
    """An answer of six tokens, and how many of the prompt's were not computed."""
    id = engine.submit(Request(ids, size, 6, **how))
    events = drain(engine)
    assert ends(events) == {id: "length"}
    assert not any(event.cached_tokens for event in events[1:])
    return answers(events)[id], events[0].cached_tokens


def engine_of(model: ElasticModel, slots: int = 2, **how: int) -> Engine:
    return Engine(model, slots, max_length=96, block_size=4, **how)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_comes_again_is_computed_from_its_last_block_on(
    family: str, size: str
) -> None:
    model = elastic(family)
    engine = engine_of(model)
    for length in (31, 32, 33):
        ids = prompt(length, length)
        expected = alone(model, size, ids, 6)
        assert ask(engine, ids, size) == (expected, 0)
        assert ask(engine, ids, size) == (expected, (length - 1) // 4 * 4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_goes_on_where_it_was(family: str, size: str) -> None:
    """The old prompt, its answer and more: what was computed of both is not computed again."""
    model = elastic(family)
    engine, ids = engine_of(model), prompt(18, 0)
    without = Engine(model, 2, max_length=96, reuse=False, sizes=[size])
    before = 0
    for turn in range(5):
        answer, cached = ask(engine, ids, size)
        assert (answer, 0) == ask(without, ids, size)
        assert cached == before
        before = (len(ids) + 5) // 4 * 4  # the last token was never computed
        ids = ids + answer + prompt(5, turn)


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_prompts_that_part_share_what_is_before(family: str) -> None:
    """With a recurrent state from the third on: the second shows where they part."""
    model = elastic(family)
    engine, common = engine_of(model), prompt(34, 0)
    found = []
    for number in range(4):
        ids = common + prompt(20, 50 + number)
        answer, cached = ask(engine, ids)
        assert answer == alone(model, "full", ids, 6)
        found.append(cached)
    assert found == [0, 0 if family == "nemotron_h" else 32, 32, 32]


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_another_size_or_salt_finds_nothing(family: str) -> None:
    """Though small and prefix of llama lie in one pool."""
    model = elastic(family)
    engine, ids = engine_of(model), prompt(33, 0)
    for size in SIZES:
        expected = alone(model, size, ids, 6)
        for salt in ("", "hers"):
            assert ask(engine, ids, size, salt=salt) == (expected, 0)
            assert ask(engine, ids, size, salt=salt) == (expected, 32)
    stats = engine.stats.sizes["small"]
    assert (stats.prompt_tokens_computed, stats.prompt_tokens_reused) == (2 * 34, 2 * 32)


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_sequences_that_run_at_once_share(family: str) -> None:
    """Also those that computed the same side by side; neither harms the other."""
    model = elastic(family)
    engine, ids = engine_of(model, 4), prompt(33, 0)
    submitted = [engine.submit(Request(ids, "full", 6 + 7 * n)) for n in range(3)]
    events = engine.step()
    events += engine.step()
    space = engine._pools.rooms[engine._sizes["full"].places.geometry].space
    assert len({tuple(job.blocks[:8]) for job in space.running}) == 1
    submitted.append(engine.submit(Request(ids, "full", 9)))
    events += drain(engine)
    whole = alone(model, "full", ids, 20)
    for id, count in zip(submitted, (6, 13, 20, 9), strict=True):
        assert answers(events)[id] == whole[:count]
    assert [event.cached_tokens for event in events if event.cached_tokens] == [32]


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_what_is_needed_is_taken_from_prefixes(family: str) -> None:
    """A cache full of prefixes takes what an empty one takes; the oldest prefix goes first."""
    model = elastic(family)
    engine = engine_of(model, 2, cache_tokens=96)
    for number in range(6):
        ask(engine, prompt(40, number))
        assert engine.stats.cache_used == 0
    assert ask(engine, prompt(40, 5))[1] == 36
    assert ask(engine, prompt(40, 0))[1] == 0
    long = [engine.submit(Request(prompt(n, n), "full", 90 - n)) for n in (20, 70)]
    events = drain(engine)
    assert answers(events)[long[0]] == alone(model, "full", prompt(20, 20), 70)
    assert answers(events)[long[1]] == alone(model, "full", prompt(70, 70), 20)


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3"])
def test_one_that_gave_way_goes_on_from_what_is_left(family: str) -> None:
    model = elastic(family)
    engine = engine_of(model, 2, cache_tokens=96, sizes=["full"])
    first = engine.submit(Request(prompt(20, 1), "full", 60))
    second = engine.submit(Request(prompt(21, 2), "full", 60))
    events = drain(engine)
    assert engine.stats.preemptions > 0
    assert answers(events)[first] == alone(model, "full", prompt(20, 1), 60)
    assert answers(events)[second] == alone(model, "full", prompt(21, 2), 60)


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_only_what_was_kept_is_read_again(family: str) -> None:
    """All else may be NaN."""
    model = elastic(family)
    engine, ids = engine_of(model), prompt(33, 0)
    expected, _ = ask(engine, ids)
    served = engine._sizes["full"]
    pool, prefixes = served.room.pool, served.room.space.prefixes
    path = prefixes.find(("full", ""), ids + expected, 99)
    assert len(path) == 9
    tokens = [4 * node.block + n for node in path for n in range(4)]
    snapshots = [node.snapshot for node in path if node.snapshot is not None]
    assert len(snapshots) == (2 if family == "nemotron_h" else 0)
    for kind, tensor in zip(pool.kinds, pool.tensors, strict=True):
        kept = tokens if kind.startswith("token.") else snapshots
        spoilt = torch.full_like(tensor, torch.nan)
        spoilt[kept] = tensor[kept]
        tensor.copy_(spoilt)
    assert ask(engine, ids) == (expected, 32)


def test_what_a_failed_request_computed_is_not_used_again() -> None:
    engine = engine_of(elastic("llama"))

    def refuse(token: int) -> Sequence[int]:
        raise RuntimeError

    ids = prompt(33, 0)
    engine.submit(Request(ids, "full", 6, watch=refuse))
    assert drain(engine)[-1].finish == "error"
    assert ask(engine, ids)[1] == 0
    engine.submit(Request([*ids, 7], "full", 6, watch=refuse))
    assert drain(engine)[-1].finish == "error"
    assert ask(engine, ids)[1] in (0, 32)


def test_reuse_may_be_off() -> None:
    engine = Engine(elastic("nemotron_h"), 2, max_length=96, block_size=4, reuse=False)
    answer, _ = ask(engine, prompt(33, 0))
    assert ask(engine, prompt(33, 0)) == (answer, 0)
    with_it = Engine(elastic("nemotron_h"), 2, max_length=96, block_size=4)
    assert with_it.cache_bytes > engine.cache_bytes  # snapshots


def test_snapshots_are_as_many_as_there_are_places() -> None:
    engine = engine_of(elastic("nemotron_h"))
    held = [tensor.data_ptr() for tensor in pool_tensors(engine)]
    for number in range(12):
        ask(engine, prompt(30, number))
    prefixes = engine._sizes["full"].room.space.prefixes
    assert len(prefixes._snapshots) == 4 and not prefixes._free_snapshots
    assert ask(engine, prompt(30, 11))[1] == 28
    assert ask(engine, prompt(30, 0))[1] == 0
    assert held == [tensor.data_ptr() for tensor in pool_tensors(engine)]


def test_a_size_that_went_leaves_nothing() -> None:
    engine, ids = engine_of(elastic("llama")), prompt(33, 0)
    ask(engine, ids, "small")
    space = engine._sizes["small"].room.space
    assert space.prefixes.num_unused
    engine.remove_size("small")
    assert not space.prefixes.num_unused and len(space.free_blocks) == space.blocks
    engine.add_size("small")
    assert ask(engine, ids, "small")[1] == 0


def path_of(prefixes: Prefixes, tokens: Sequence[int], first_block: int) -> list:
    path: list = []
    for number in range(len(tokens) // prefixes.block_size):
        prefixes.add(path, ("s", ""), tokens, first_block + number)
    return path


def test_what_hangs_on_a_node_goes_before_it() -> None:
    prefixes = Prefixes(block_size=2)
    first = path_of(prefixes, [1, 2, 3, 4, 5, 6], 10)
    second = path_of(prefixes, [1, 2, 7, 8], 20)
    assert [node.block for node in second] == [10, 21]
    assert prefixes.num_unused == 0
    prefixes.leave(first)
    assert prefixes.num_unused == 2  # the other still uses the first block
    prefixes.leave(second)
    assert [prefixes.evict() for _ in range(4)] == [12, 11, 21, 10]
    assert not prefixes._roots and prefixes.find(("s", ""), [1, 2], 1) == []


def test_a_state_is_kept_where_the_oldest_was() -> None:
    prefixes = Prefixes(block_size=1, snapshots=[5, 6])
    a, b, c = path_of(prefixes, [1, 2, 3], 0)
    assert [prefixes.snapshot(a), prefixes.snapshot(b)] == [5, 6]
    prefixes.use(a)  # touched: b is the oldest now
    assert prefixes.resumable([a, b, c]) == 2
    assert prefixes.snapshot(c) == 6 and b.snapshot is None
    assert prefixes.snapshot(b, instead=c) == 6 and c.snapshot is None
    assert prefixes.resumable([a, b, c]) == 2 and prefixes.resumable([b, c][1:]) == 0
