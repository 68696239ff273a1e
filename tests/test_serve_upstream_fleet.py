"""Which replica: health, draining, coming and going, load, and who has seen a prompt before."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_server import (
    Reply,
    Server,
    Writer,
    answer,
    asked,
    chat,
    collect,
    quick,
    says,
    sends,
    status,
    until,
)

from star_elastic.serve.answers import AnswerFailed
from star_elastic.serve.policy import Load
from star_elastic.serve.upstream import Spec, Upstreams, UpstreamSettings
from star_elastic.serve.upstream.errors import Unusable
from star_elastic.serve.upstream.figures import Figures
from star_elastic.serve.upstream.pool import Pool, load_of
from star_elastic.serve.upstream.prefixes import Prefixes, keys_of
from star_elastic.serve.upstream.replica import Replica

FIGURES = """vllm:num_requests_running{engine="0"} 5.0
vllm:num_requests_waiting{engine="0"} 7.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
"""


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main()

    asyncio.run(bounded())


def test_some_bad_probes_take_it_out_and_a_good_one_in() -> None:
    async def main() -> None:
        async with Server() as server, Upstreams([server.spec()], quick(failures=3)) as upstreams:
            assert upstreams.ready_at("small")
            seen, server.health = server.probes, 503
            await until(lambda: not upstreams.ready)
            assert server.probes - seen >= 3
            state = upstreams.states()[0]
            assert (state.state, state.why) == ("down", "its health is not told: /health says 503")
            server.models, server.health = ["another"], 200
            await until(lambda: upstreams.ready)
            assert await answer(upstreams) == "hi"
            assert server.asked[0]["model"] == "another"

    run(main)


def test_a_server_without_health_lists_its_models() -> None:
    async def main() -> None:
        async with Server() as server:
            server.health, server.max_model_len = 404, 2048
            async with Upstreams([server.spec()], quick()) as upstreams:
                assert upstreams.ready
                assert upstreams.context_tokens() == upstreams.context_tokens("small") == 2048
                assert upstreams.context_tokens("large") is None
                server.models = []
                await until(lambda: not upstreams.ready)

    run(main)


def test_who_is_down_at_the_start_does_no_harm() -> None:
    async def main() -> None:
        async with Server() as gone:
            pass
        async with Server() as here:
            specs = [gone.spec(), here.spec(), gone.spec("large")]
            async with Upstreams(specs, quick()) as upstreams:
                assert upstreams.sizes == ("small", "large")
                assert upstreams.ready_at("small") and not upstreams.ready_at("large")
                assert not upstreams.ready
                assert await answer(upstreams) == "hi"

    run(main)


def waits(go: asyncio.Event, *words: str) -> Callable[[Writer], Coroutine[Any, Any, None]]:
    async def reply(writer: Writer) -> None:
        await go.wait()
        await says(*words)(writer)

    return reply


def test_draining() -> None:
    async def main() -> None:
        go = asyncio.Event()
        one, two = Server(waits(go, "one")), Server(says("two"))
        async with one, two, Upstreams([one.spec(), two.spec()], quick()) as upstreams:
            request = asyncio.create_task(answer(upstreams))
            await until(lambda: len(one.asked) == 1)
            upstreams.drain(one.url)
            assert [await answer(upstreams) for _ in range(3)] == ["two"] * 3
            assert upstreams.in_flight(one.url) == 1
            assert upstreams.states()[0].state == "draining"
            go.set()
            assert await request == "one"
            assert upstreams.in_flight(one.url) == 0
            upstreams.restore(f"{one.url}/v1/")
            upstreams.drain(two.url)
            assert await answer(upstreams) == "one"
            with pytest.raises(ValueError, match="no upstream at 'http://elsewhere'"):
                upstreams.drain("http://elsewhere")

    run(main)


def test_coming_and_going() -> None:
    async def main() -> None:
        go = asyncio.Event()
        one, two = Server(waits(go, "one")), Server(says("two"))
        async with one, two, Upstreams([one.spec()], quick()) as upstreams:
            request = asyncio.create_task(answer(upstreams))
            await until(lambda: len(one.asked) == 1)
            await upstreams.add(two.spec())
            await upstreams.add(two.spec("large"))
            with pytest.raises(ValueError, match="it comes twice"):
                await upstreams.add(two.spec())
            upstreams.remove(one.url)
            assert [state.url for state in upstreams.states()] == [two.url] * 2
            assert await answer(upstreams, size="large") == "two"
            go.set()
            assert await request == "one"
            seen = one.probes
            await asyncio.sleep(0.2)
            assert one.probes == seen
            upstreams.remove(two.url)
            assert upstreams.sizes == ("small", "large") and not upstreams.ready

    run(main)


def test_load_is_counted_here_and_told_there() -> None:
    async def main() -> None:
        go = asyncio.Event()
        async with Server(waits(go, *"abcd")) as server:
            async with Upstreams([server.spec()], quick()) as upstreams:
                request = asyncio.create_task(answer(upstreams))
                await until(lambda: upstreams.load() == Load(queued=1))
                go.set()
                await request
                assert upstreams.load("small").tokens_per_second == 5
                assert upstreams.load("large") == Load()
            server.metrics = FIGURES
            async with Upstreams([server.spec()], quick()) as upstreams:
                assert upstreams.load() == Load(queued=7, running=5, cache_used=0.25)

    run(main)


@pytest.mark.parametrize("bad", [status(500), sends(chat("half"), done=False)])
def test_failures_in_a_row_make_it_rest(bad: Reply) -> None:
    """Whether they fail at once or in the middle."""

    async def main() -> None:
        async with Server(bad) as bad_one, Server(says("good")) as good:
            specs = [bad_one.spec(), good.spec()]
            async with Upstreams(specs, quick(failures=2, rest_s=60)) as upstreams:
                for _ in range(10):
                    with suppress(AnswerFailed):
                        assert await answer(upstreams, asked(prompt=(1,))) == "good"
                assert len(bad_one.asked) == 2
                bad_one.reply = says("better")
                upstreams.drain(good.url)
                assert await answer(upstreams) == "better"  # nobody else is left

    run(main)


def test_a_conversation_stays_where_it_began() -> None:
    async def main() -> None:
        async with Server(says("0")) as one, Server(says("1")) as two, Server(says("2")) as three:
            specs = [server.spec() for server in (one, two, three)]
            async with Upstreams(specs, quick()) as upstreams:
                system = tuple(range(64))
                talks = [(*system, *range(n, n + 64)) for n in (1000, 2000, 3000)]
                first = [await answer(upstreams, asked(prompt=talk)) for talk in talks]
                for turn in range(3):
                    longer = [(*talk, *range(turn * 40)) for talk in talks]
                    again = [await answer(upstreams, asked(prompt=talk)) for talk in longer]
                    assert again == first
                other = asked(prompt=talks[0], salt="someone else")
                assert await answer(upstreams, other) in "012"

    run(main)


class Ticking:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pool_of(count: int, **changes: Any) -> Pool:
    pool, clock = Pool("small", changes.get("overload", 1.25)), Ticking()
    for n in range(count):
        spec = Spec("small", f"http://{n}")
        replica = Replica(spec, UpstreamSettings(**changes), clock, up=True, model="m")
        replica.model = "m"
        pool.replicas.append(replica)
    return pool


def test_the_fewest_in_flight_and_the_longest_unused() -> None:
    pool = pool_of(3)
    chosen = []
    for _ in range(7):
        replica = pool.choose(())
        assert replica is not None
        replica.in_flight += 1
        chosen.append(pool.replicas.index(replica))
    assert chosen == [0, 1, 2, 0, 1, 2, 0]


def test_a_popular_beginning_spills_over() -> None:
    """All prompts are alike: nobody gets more than its share, and all know it then."""
    pool, keys = pool_of(4, overload=1.5), keys_of(range(64), "")
    for _ in range(40):
        replica = pool.choose(keys)
        assert replica is not None
        replica.in_flight += 1
    assert max(each.in_flight for each in pool.replicas) <= 1.5 * 40 / 4 + 1
    quiet = pool_of(4)
    chosen = {quiet.choose(keys) for _ in range(20)}  # one after the other: always the same
    assert len(chosen) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60))
def test_no_replica_has_more_than_its_share(count: int, steps: list[tuple[int, bool]]) -> None:
    pool, random_ = pool_of(count), random.Random(0)
    for topic, ends in steps:
        keys = keys_of(range(topic, topic + 100), "")
        replica = pool.choose(keys)
        assert replica is not None
        total = sum(each.in_flight for each in pool.replicas)
        assert replica.in_flight <= 1.25 * (total + 1) / count
        replica.in_flight += 1
        if ends:
            busy = random_.choice([each for each in pool.replicas if each.in_flight])
            busy.in_flight -= 1


def test_others_requests_count_too() -> None:
    pool = pool_of(2)
    pool.replicas[0].probed_well(Figures(running=3, waiting=0, cache_used=0.0, others=3))
    assert [pool.choose(()) for _ in range(2)] == [pool.replicas[1]] * 2
    assert load_of(pool.replicas) == Load(running=3)


def test_who_said_when_is_left_alone_until_then() -> None:
    pool = pool_of(1)
    clock = pool.replicas[0].clock
    assert isinstance(clock, Ticking)
    pool.replicas[0].failed(Unusable("503", busy=True, retry_after_s=7))
    assert (pool.choose(()), pool.free_in_s()) == (None, 7)
    clock.now += 7
    assert (pool.choose(()), pool.free_in_s()) == (pool.replicas[0], None)


def test_what_is_remembered_has_a_size() -> None:
    prefixes = Prefixes(most=100)
    for n in range(50):
        prefixes.note(keys_of(range(n, n + 300), ""), n)
    assert len(prefixes) <= 100
    assert prefixes.homes(keys_of(range(49, 349), "")) == (49,)
    assert prefixes.homes(keys_of(range(300), "")) == ()  # the oldest went
    for n in range(6):
        prefixes.note(keys_of(range(300), ""), n)
    assert prefixes.homes(keys_of(range(10_000), "")) == (5, 4, 3, 2)
    prefixes.forget(5)
    assert prefixes.homes(keys_of(range(300), "")) == (4, 3, 2)
    assert keys_of(range(31), "") == ()
    assert len(keys_of(range(100_000), "")) == 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12b=http://host:8000", Spec("12b", "http://host:8000")),
        ("12b=http://host:8001/v1", Spec("12b", "http://host:8001")),
        ("a=https://Host/x/v1/#org/name:12b", Spec("a", "https://host/x", "org/name:12b")),
        ("a=http://h/v1?key_env=KEY#m", Spec("a", "http://h", "m", "abc")),
        ("a=http://[::1]:80/", Spec("a", "http://[::1]:80")),
    ],
)
def test_specs(text: str, expected: Spec) -> None:
    assert Spec.read(text, {"KEY": "abc\n"}) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("http://host", "not of the form SIZE=http"),
        ("=http://host", "not of the form"),
        ("a=host:8000", "not of the form"),
        ("a=ftp://host", "not of the form"),
        ("a=http://", "not of the form"),
        ("a=http://h:99999", "Port out of range"),
        ("a=http://h:x", "Port could not be cast"),
        ("a=http://user:s3cret@h:1", "no user or password here"),
        ("a=http://h?key=s3cret", r"only \?key_env=VARIABLE"),
        ("a=http://h?key_env=NONE", "environment variable 'NONE' is not set"),
        ("a=http://h?key_env=BAD", "is no header's value"),
    ],
)
def test_what_is_no_spec(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        Spec.read(text, {"BAD": "a\nb"})
    assert "upstream '" in str(caught.value)
    assert "user" not in text or "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"tries": 0}, "tries = 0: not above 0"), ({"overload": 0.5}, "overload = 0.5: below 1")],
)
def test_settings_are_checked(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        UpstreamSettings(**changes)
    with pytest.raises(ValueError, match="upstreams: none"):
        Upstreams([])


def test_after_the_end_nobody_answers() -> None:
    async def main() -> None:
        async with Server() as server:
            async with Upstreams([server.spec()], quick()) as upstreams:
                pass
            with pytest.raises(Exception, match="not watched any more"):
                await collect(upstreams.answers(asked(), "small"))

    run(main)


def test_many_at_once_among_servers_that_come_and_go() -> None:
    """Every request is answered in full or fails cleanly, and nothing is left behind."""

    async def main() -> None:
        drawn = random.Random(3)

        async def moody(writer: Writer) -> None:
            good = says(*"abc")
            kinds = [good, good, good, status(500), sends(chat("a"), done=False), sends()]
            await drawn.choice(kinds)(writer)

        servers = [Server(moody) for _ in range(3)]
        async with servers[0], servers[1], servers[2]:
            specs = [server.spec() for server in servers]
            async with Upstreams(specs, quick(failures=50)) as upstreams:
                wanted = [asked(prompt=(*range(64), n)) for n in range(100)]
                said = [answer(upstreams, each) for each in wanted]
                requests = asyncio.gather(*said, return_exceptions=True)
                upstreams.drain(servers[1].url)
                found = await requests
                kinds = {each if isinstance(each, str) else type(each) for each in found}
                assert kinds == {"abc", AnswerFailed}
                assert found.count("abc") > 50
                assert [state.in_flight for state in upstreams.states()] == [0, 0, 0]
                load = upstreams.load()
                assert (load.queued, load.running) == (0, 0)

    run(main)
