"""Sizes that come and go while others answer, and what the engine tells of itself."""

import pytest
from models import FAMILIES, SMALL, elastic
from test_serve_engine import alone, answers, drain, ends, pool_tensors, prompt

from star_elastic.serve.engine import Engine, Request


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_come_and_go_in_mid_answer(family: str) -> None:
    model = elastic(family)
    engine = Engine(model, 2, max_length=48, step_tokens=11, block_size=4, sizes=["full"])
    first = engine.submit(Request(prompt(9, 1), "full", 20))
    events = engine.step()
    engine.add_size("small")
    engine.add_size("odd", SMALL[family] | {"hidden_size": 28})
    second = engine.submit(Request(prompt(7, 2), "small", 9))
    third = engine.submit(Request(prompt(8, 3), "odd", 30))
    for _ in range(3):
        events += engine.step()
    engine.remove_size("odd")
    engine.remove_size("full")
    assert engine.sizes == ("small",) and set(engine.stats.sizes) == {"full", "small", "odd"}
    with pytest.raises(ValueError, match="no size 'odd'; there are small"):
        engine.submit(Request([1], "odd"))
    with pytest.raises(ValueError, match="size 'odd' is served already"):
        engine.add_size("odd")  # it is not gone yet
    events += drain(engine)
    odd = model.submodel(**SMALL[family] | {"hidden_size": 28})
    model._views["odd"] = odd
    assert answers(events) == {
        first: alone(model, "full", prompt(9, 1), 20),
        second: alone(model, "small", prompt(7, 2), 9),
        third: alone(model, "odd", prompt(8, 3), 30),
    }
    assert set(engine.stats.sizes) == {"small"}
    engine.add_size("full")
    assert engine.generate([prompt(9, 1)], "full", 20) == [answers(events)[first]]


def test_a_pool_is_made_with_its_first_size_and_freed_with_its_last() -> None:
    engine = Engine(elastic("llama"), 2, max_length=32, sizes=["full"])
    alone_bytes = engine.cache_bytes
    engine.add_size("small")
    both_bytes, held = engine.cache_bytes, len(pool_tensors(engine))
    engine.add_size("prefix")  # its states have the shapes of small's
    assert engine.cache_bytes == both_bytes > alone_bytes
    id = engine.submit(Request(prompt(5, 0), "small", 5))
    engine.step()
    engine.remove_size("small")
    engine.remove_size("prefix")
    assert engine.cache_bytes == both_bytes and len(pool_tensors(engine)) == held
    assert ends(drain(engine)) == {id: "length"}
    assert engine.cache_bytes == alone_bytes


def test_the_last_of_a_size_may_be_cancelled() -> None:
    engine = Engine(elastic("nemotron_h"), 1, max_length=32, sizes=["full", "small"])
    ids = [engine.submit(Request(prompt(5, 0), "small", 5)) for _ in range(2)]
    engine.step()
    engine.remove_size("small")
    assert engine.cancel(ids[1]) and "small" in engine.stats.sizes
    assert engine.cancel(ids[0]) and set(engine.stats.sizes) == {"full"}


def test_sizes_that_cannot_come_or_go_are_refused() -> None:
    engine = Engine(elastic("llama"), 4, max_length=32, step_tokens=6, sizes=["full"])
    before = engine.cache_bytes
    for name, fields, why in [
        ("full", None, "size 'full' is served already"),
        ("tiny", None, "no size 'tiny'; there are full, small, prefix"),
        ("wide", {"hidden_size": 64}, "hidden_size = 64 is larger than the parent's 32"),
        ("odd", {"num_widgets": 3}, "num_widgets is no axis"),
        ("small", None, "step_tokens 6: must be above 8, the slots"),
    ]:
        with pytest.raises(ValueError, match=why):
            engine.add_size(name, fields)
    for name, why in [("tiny", "no size 'tiny'"), ("full", "size 'full' is the last one")]:
        with pytest.raises(ValueError, match=why):
            engine.remove_size(name)
    assert engine.sizes == ("full",) and engine.cache_bytes == before


def test_stats_tell_what_is_and_what_was() -> None:
    engine = Engine(elastic("llama"), 2, max_length=32, block_size=4, sizes=["full", "small"])
    assert (engine.stats.queued, engine.stats.running, engine.stats.cache_used) == (0, 0, 0.0)
    for number in range(3):
        engine.submit(Request(prompt(9, number), "full", 4))
    engine.submit(Request(prompt(6, 0), "small", 8))
    assert engine.stats.queued == 4 and engine.stats.steps == 0
    engine.step()
    stats = engine.stats
    assert (stats.queued, stats.running, stats.steps) == (1, 3, 1)
    assert stats.cache_used == pytest.approx(6 / 18)  # three blocks for each of two
    full = stats.sizes["full"]
    assert (full.queued, full.running) == (1, 2)
    assert (full.prompt_tokens_computed, full.prompt_tokens_reused) == (18, 0)
    drain(engine)
    stats = engine.stats
    assert (stats.queued, stats.running, stats.cache_used) == (0, 0, 0.0)
    assert stats.sizes["full"].output_tokens == 12
    assert stats.sizes["small"].output_tokens == 8
    assert stats.sizes["small"].prompt_tokens_computed == 6
    engine.step()
    assert engine.stats.steps == stats.steps  # nothing was computed


def test_the_share_of_blocks_counts_if_it_is_larger() -> None:
    engine = Engine(elastic("llama"), 4, 32, cache_tokens=32, block_size=4, sizes=["full"])
    engine.submit(Request(prompt(22, 0), "full", 4))
    engine.step()
    assert engine.stats.cache_used == pytest.approx(6 / 12)
