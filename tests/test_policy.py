"""Choosing the size: every policy by itself, and all of them in order."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import IDLE, LARGE, MIDDLE, PRESSED, SIZES, SMALL, Ticking, pressed, refusal

from star_elastic.serve.policy import (
    Bucket,
    ByCost,
    ByLatency,
    ByQuality,
    Cascade,
    Chooser,
    Pinned,
    Refused,
    Size,
    Speeds,
    Wish,
    confidence,
)


def test_without_a_wish_the_largest_answers() -> None:
    choice = Chooser([SMALL, LARGE, MIDDLE], [Pinned()]).choose(Wish(), IDLE)
    assert (choice.size, choice.why) == ("30b", ("default: the largest size",))


def test_sizes_that_cannot_serve() -> None:
    with pytest.raises(ValueError, match="none"):
        Chooser([], [])
    with pytest.raises(ValueError, match="same name"):
        Chooser([SMALL, Size("12b", 1)], [])


@pytest.mark.parametrize("size", SIZES)
def test_a_pin_is_never_changed(size: Size) -> None:
    """Whatever stands before or after it: that size, or a refusal that says why."""
    clock = Ticking()
    speeds = Speeds()
    speeds.observe(SMALL, 0.0, 10, 10.0, 10, 10.0)
    after = [pressed(clock), ByLatency(speeds, ttft_ms=1.0, tpot_ms=1.0)]
    wish = Wish(size=size.name, prompt_tokens=10, max_tokens=10)
    choice = Chooser(SIZES, [Pinned(), *after]).choose(wish, PRESSED)
    assert choice.size == size.name and choice.why == (f"pinned: the request names {size.name}",)

    quality = ByQuality({"routine": SMALL})
    cost = ByCost({"me": Bucket(20 * SMALL.price, clock)})
    asked = Wish(10, 10, size=size.name, tier="routine", key="me")
    for policies in ([Pinned(), quality], [quality, Pinned()], [Pinned(), cost], [cost, Pinned()]):
        chooser = Chooser(SIZES, policies)
        if size is SMALL:
            assert chooser.choose(asked, IDLE).size == "12b"
        else:
            assert size.name in str(refusal(lambda chooser=chooser: chooser.choose(asked, IDLE)))


def test_an_unknown_pin_is_refused_for_good() -> None:
    error = refusal(lambda: Chooser(SIZES, [Pinned()]).choose(Wish(size="7b"), IDLE))
    assert str(error) == "size '7b' is not among those allowed: 30b, 23b, 12b"
    assert error.retry_after_s is None


def test_policies_narrow_in_order_and_say_so() -> None:
    clock = Ticking()
    by_quality = ByQuality({"fine": LARGE, "good": MIDDLE})
    chooser = Chooser(SIZES, [Pinned(), by_quality, ByCost({})])
    wish = Wish(10, 10, quality="fine", tier="good", max_cost=20 * SMALL.price)
    assert chooser.choose(wish, IDLE).why == (
        "tier: good allows 23b at most",
        "cost: 12b is the largest within max_cost, 40 left",
    )
    chooser = Chooser(SIZES, [by_quality, pressed(clock)])
    choice = chooser.choose(Wish(quality="good"), PRESSED)
    assert choice.size == "12b"
    assert choice.why[1] == "load: at most 12b while 99 wait, 0 run at 100 tokens/s, cache 0%"


def test_quality_names_are_the_operators() -> None:
    by_quality = ByQuality({"fine": LARGE})
    error = refusal(lambda: by_quality.allow(Wish(quality="best"), IDLE, SIZES))
    assert str(error) == "quality 'best' is unknown; known are fine"
    assert by_quality.allow(Wish(), IDLE, SIZES).sizes == SIZES


# by latency


def observed(slowdown: float, size: Size = SMALL, queued_s: float = 0.0) -> Speeds:
    speeds = Speeds()
    observe(speeds, size, slowdown, queued_s)
    return speeds


def observe(speeds: Speeds, size: Size, slowdown: float, queued_s: float = 0.0) -> None:
    """A machine that takes 1 ms a prompt token and 10 ms an output token, per 1e9 active."""
    pace = slowdown * size.active_params / 1e9
    speeds.observe(size, queued_s, 100, 100 * pace * 1e-3, 50, 50 * pace * 1e-2)


def test_a_size_nobody_tried_is_as_slow_as_it_is_large() -> None:
    speeds = observed(1.0)
    assert speeds.tpot_s(SMALL) == pytest.approx(0.020)
    assert speeds.tpot_s(LARGE) == pytest.approx(0.040)
    assert speeds.ttft_s(LARGE, 200) == pytest.approx(0.8)
    speeds.observe(LARGE, 0.0, output_tokens=10, decode_s=0.25)  # better than that
    assert speeds.tpot_s(LARGE) == pytest.approx(0.025)
    assert speeds.tpot_s(SMALL) == pytest.approx(0.020)


def test_an_empty_phase_teaches_nothing() -> None:
    speeds = Speeds()
    speeds.observe(SMALL, 0.0, 0, 1.0, 5, 0.0)
    assert speeds.tpot_s(SMALL) is None and speeds.ttft_s(SMALL, 10) is None
    with pytest.raises(ValueError, match="weights"):
        Speeds(fast=0)


@pytest.mark.parametrize(
    ("targets", "size"),
    [
        ({}, "30b"),
        ({"tpot_ms": 50.0}, "30b"),
        ({"tpot_ms": 40.0}, "23b"),  # 40 ms is above nine tenths of 40 ms
        ({"tpot_ms": 30.0}, "12b"),
        ({"tpot_ms": 1.0}, "12b"),
        ({"ttft_ms": 350.0}, "23b"),
    ],
)
def test_the_largest_that_meets_the_targets(targets: dict[str, float], size: str) -> None:
    chooser = Chooser(SIZES, [ByLatency(observed(1.0), **targets)])
    assert chooser.choose(Wish(prompt_tokens=100), IDLE).size == size


def test_a_requests_own_limit_counts_the_queue_and_every_token() -> None:
    speeds = observed(1.0, queued_s=1.0)  # 0.3 s of it, by the weight of one observation
    chooser = Chooser(SIZES, [ByLatency(speeds)])
    at_30b = 0.3 + 100 * 0.004 + 10 * 0.040
    for limit, size in [(at_30b / 0.9 + 1e-6, "30b"), (at_30b / 0.9 - 1e-6, "23b")]:
        assert chooser.choose(Wish(100, 10, max_latency_ms=1e3 * limit), IDLE).size == size
    choice = chooser.choose(Wish(100, 10, max_latency_ms=1.0), IDLE)
    assert choice.why == ("latency: no size meets in all 1 ms; the smallest is nearest",)
    assert Chooser(SIZES, [ByLatency(Speeds(), 1.0)]).choose(Wish(), IDLE).size == "30b"


@given(st.floats(1.5, 20), st.floats(0.8, 1.25))
@settings(max_examples=100, deadline=None)
def test_a_slow_minute_passes(slowdown: float, noise: float) -> None:
    """The large size, too slow while all are, comes back though only the small one was tried."""
    speeds = Speeds()
    chooser = Chooser(SIZES, [ByLatency(speeds, tpot_ms=50.0)])
    for size in SIZES * 5:
        observe(speeds, size, 1.0)
    assert chooser.choose(Wish(), IDLE).size == "30b"
    for _ in range(20):
        observe(speeds, SMALL, slowdown)
    assert chooser.choose(Wish(), IDLE).size != "30b"
    for _ in range(40):
        observe(speeds, SMALL, noise)
        observe(speeds, SMALL, 1 / noise)
    assert speeds.tpot_s(SMALL) == pytest.approx(0.020, rel=0.15)
    assert chooser.choose(Wish(), IDLE).size in ("30b", "23b")


# by cost


def test_the_price_of_a_token() -> None:
    assert SMALL.price == 2.0 and Size("free", 10**9, price=0.0).price == 0.0
    with pytest.raises(ValueError, match="negative"):
        Size("gift", 10**9, price=-1.0)


def test_a_key_spends_its_minute_and_gets_it_back() -> None:
    clock = Ticking()
    cost = ByCost({"me": Bucket(600.0, clock)})
    chooser = Chooser(SIZES, [cost])
    wish = Wish(50, 50, key="me")
    assert chooser.choose(wish, IDLE).size == "30b"
    cost.charge("me", 250)
    assert chooser.choose(wish, IDLE).why == (
        "cost: 23b is the largest within the key's budget per minute, 350 left",
    )
    cost.charge("me", 300)
    error = refusal(lambda: chooser.choose(wish, IDLE))
    assert error.retry_after_s == 15  # 150 more, at 10 a second
    assert chooser.choose(Wish(50, 50, key="you"), IDLE).size == "30b"
    clock.now += 15
    assert chooser.choose(wish, IDLE).size == "12b"
    cost.charge("me", -500)  # most of it was not used
    clock.now += 3_600
    assert chooser.choose(wish, IDLE).size == "30b"  # a minute's worth, not an hour's
    cost.charge("me", 600)
    assert refusal(lambda: chooser.choose(wish, IDLE)).retry_after_s == 20


def test_what_no_waiting_helps() -> None:
    chooser = Chooser(SIZES, [ByCost({}, everybody=Bucket(100.0, Ticking()))])
    error = refusal(lambda: chooser.choose(Wish(50, 50), IDLE))
    assert error.retry_after_s is None and "the server's ever holds" in str(error)
    error = refusal(lambda: chooser.choose(Wish(5, 5, max_cost=1.0), IDLE))
    assert error.retry_after_s is None and "max_cost is 1" in str(error)
    with pytest.raises(ValueError, match="not positive"):
        Bucket(0.0, Ticking())


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 200)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_nobody_spends_more_than_the_budget(asked: list[tuple[float, int]]) -> None:
    """In any window: what was there, and what flowed in since."""
    clock = Ticking()
    cost, spent = ByCost({"me": Bucket(600.0, clock)}), 0.0
    for seconds, tokens in asked:
        clock.now += seconds
        try:
            size = Chooser(SIZES, [cost]).choose(Wish(0, tokens, key="me"), IDLE).size
        except Refused as error:
            # It comes at the time it was given, and is let in.
            assert error.retry_after_s is not None
            clock.now += error.retry_after_s + 1e-6
            size = Chooser(SIZES, [cost]).choose(Wish(0, tokens, key="me"), IDLE).size
        paid = {each.name: each.price for each in SIZES}[size] * tokens
        cost.charge("me", paid)
        spent += paid
        assert spent <= 600 + 10 * clock.now + 1e-6


# cascade


def test_a_cascade_climbs_while_answers_are_unsure() -> None:
    chooser = Chooser(SIZES, [Pinned(), Cascade(below=0.7)])
    wish, sizes = Wish(), []
    for _ in range(3):
        choice = chooser.choose(wish, IDLE)
        sizes.append((choice.size, choice.escalate_below))
        wish = replace(wish, after=choice.size)
    assert sizes == [("12b", 0.7), ("23b", 0.7), ("30b", None)]
    assert choice.why == ("cascade: 23b was not sure",)
    assert "no size above 30b" in str(refusal(lambda: chooser.choose(wish, IDLE)))


def test_a_cascade_leaves_a_pin_alone_and_climbs_no_higher_than_allowed() -> None:
    chooser = Chooser(SIZES, [Pinned(), ByQuality({"good": MIDDLE}), Cascade(below=0.7)])
    choice = chooser.choose(Wish(size="23b"), IDLE)
    assert (choice.size, choice.escalate_below) == ("23b", None)
    assert chooser.choose(Wish(quality="good"), IDLE).size == "12b"
    assert chooser.choose(Wish(quality="good", after="12b"), IDLE).size == "23b"
    refusal(lambda: chooser.choose(Wish(quality="good", after="23b"), IDLE))


def test_confidence() -> None:
    assert confidence([math.log(0.5), math.log(0.125)]) == pytest.approx(0.25)
    assert confidence([]) == 0.0
    with pytest.raises(ValueError, match="between 0 and 1"):
        Cascade(below=1.0)
