"""How a server chooses, request by request: pins, qualities, costs, load, doubt; and new sizes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from serving import NAME, Server, model, served
from waiting import until

from star_elastic.serve.difficulty.file import (
    Difficulty,
    Feature,
    Interval,
    Provenance,
    Router,
    Setting,
    save,
)
from star_elastic.serve.keys import Key, Keys, digest_of, new_key
from star_elastic.serve.opening import Capacity
from star_elastic.serve.settings import LoadSettings, Settings

KEYS = {name: new_key() for name in ("rich", "poor", "rare", "root")}


def entries() -> Keys:
    said: dict[str, dict[str, Any]] = {
        "rich": {"tier": "gold"},
        "poor": {"tier": "tin", "budget_per_minute": 0.01},
        "rare": {"requests_per_minute": 2},
        "root": {"admin": True},
    }
    return Keys([Key(name=n, sha256=digest_of(KEYS[n]), **more) for n, more in said.items()])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = Settings(quality={"gold": "full", "tin": "prefix", "routine": "small"})
    with served(model(), settings=settings, keys=entries(), administers=True) as running:
        yield running


def by(server: Server, key: str | None, **fields: Any) -> Any:
    server.client.headers = {} if key is None else {"authorization": f"Bearer {KEYS[key]}"}
    return server.chat(**fields)


def sizes(reply: Any) -> list[str]:
    assert reply.status_code == 200, reply.text
    return reply.json()["elastic"]["sizes"]


def test_a_tier_is_the_most_a_key_may_have(server: Server) -> None:
    assert sizes(by(server, "rich")) == ["full"]
    assert sizes(by(server, "poor")) == ["prefix"]
    assert sizes(by(server, "poor", elastic={"quality": "routine"})) == ["small"]
    refused = by(server, "poor", model=f"{NAME}:full")
    assert refused.status_code == 400
    assert "tier: tin allows prefix at most" in refused.json()["error"]["message"]


def test_nobody_without_a_key(server: Server) -> None:
    assert by(server, None).status_code == 401
    routes = server.client.get
    assert [routes(path).status_code for path in ("/health", "/ready")] == [200, 200]
    for path in ("/metrics", "/status", "/v1/models", "/openapi.json", "/version", "/nowhere"):
        assert routes(path).status_code == 401


def test_a_rate_is_held_to_and_says_when_to_come_again(server: Server) -> None:
    assert [by(server, "rare").status_code for _ in range(2)] == [200, 200]
    refused = by(server, "rare")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_a_budget_is_spent_and_what_was_not_used_comes_back(server: Server) -> None:
    tokens = 150  # of which the answer may have so many, and takes few
    small = next(iter(server.opened.service.sizes.values())).price * 180
    assert small < 0.01
    answers = [by(server, "poor", max_tokens=tokens, stop=["", " "][1:]) for _ in range(3)]
    assert answers[0].status_code == 200
    spent = sum(
        server.opened.service.sizes[size].price * n
        for answer in answers
        if answer.status_code == 200
        for size, n in answer.json()["elastic"]["tokens"].items()
    )
    left = server.opened.service._budgets["poor"].left
    assert 0 < left < 0.01 - spent


def test_a_request_with_little_to_spend_gets_a_small_size(server: Server) -> None:
    tokens = by(server, "rich").json()["usage"]["total_tokens"]
    price = server.opened.service.sizes["small"].price
    reply = by(server, "rich", elastic={"max_cost": price * tokens * 1.001})
    assert sizes(reply) == ["small"]
    assert "max_cost" in reply.json()["elastic"]["routed_because"][-1]
    assert by(server, "rich", elastic={"max_cost": 1e-12}).status_code == 400


def test_sizes_come_change_and_go_while_others_answer(server: Server) -> None:
    """Each answer is that of the size that it was begun with."""
    server.client.headers = {"authorization": f"Bearer {KEYS['rich']}"}
    assert server.client.put("/admin/sizes/tiny", json={}).status_code == 403
    server.client.headers = {"authorization": f"Bearer {KEYS['root']}"}
    put, made = server.client.put, server.opened.model
    assert put("/admin/sizes/tiny", json={"config": {"hidden_size": 4096}}).status_code == 400
    assert put("/admin/sizes/tiny", json={}).status_code == 400  # no such named size
    reply = put("/admin/sizes/tiny", json={"config": {"intermediate_size": 8}})
    assert reply.status_code == 200
    first = made.submodel(intermediate_size=8)
    with ThreadPoolExecutor(6) as pool:
        with server.held():
            asked = [
                pool.submit(server.complete, "abc", model=f"{NAME}:tiny", max_tokens=90)
                for _ in range(6)
            ]
            until(lambda: len(server.opened.service.live) == 6)
        reply = put("/admin/sizes/tiny", json={"config": {"intermediate_size": 16}})
        assert reply.status_code == 200
        after = server.complete("abc", model=f"{NAME}:tiny", max_tokens=90)
        assert server.client.delete("/admin/sizes/tiny").status_code == 200
        assert server.complete("abc", model=f"{NAME}:tiny").status_code == 404
        texts = {answer.result().json()["choices"][0]["text"] for answer in asked}
    second = made.submodel(intermediate_size=16)
    assert text_of(after) == greedy(made, second, 90)
    assert texts == {greedy(made, first, 90)} != {text_of(after)}
    assert "tiny" not in server.client.get("/v1/models").text
    assert server.client.delete("/admin/sizes/tiny").status_code == 404
    # one that the settings name is not taken away
    assert server.client.delete("/admin/sizes/small").status_code == 400
    assert sizes(server.chat(model=f"{NAME}:small")) == ["small"]


def text_of(reply: Any) -> str:
    return reply.json()["choices"][0]["text"]


def greedy(made: Any, view: Any, count: int) -> str:
    ids = made.tokenizer("abc", return_tensors="pt", add_special_tokens=False).input_ids
    whole = view.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=2)
    answer = torch.Tensor.tolist(whole[0, ids.shape[1] :])
    return made.tokenizer.decode(answer, skip_special_tokens=True)


def test_who_is_not_sure_is_followed_by_a_larger_size() -> None:
    with served(model(), settings=Settings.model_validate({"cascade": {"below": 0.999}})) as server:
        reply = server.chat().json()
        assert reply["elastic"]["sizes"] == ["small", "prefix", "full"]
        assert reply["elastic"]["switches"] == 2
        assert reply["elastic"]["tokens"] == {"small": 8, "prefix": 8, "full": 8}
        assert reply["usage"]["completion_tokens"] == 8
        assert reply["choices"][0]["logprobs"] is None
        pinned = server.chat(model=f"{NAME}:full").json()
        assert pinned["choices"][0]["message"] == reply["choices"][0]["message"]
        events = server.events("/v1/chat/completions", {
            "model": NAME, "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 8, "temperature": 0,
        })  # fmt: skip
        text = "".join(each["choices"][0]["delta"].get("content", "") for each in events)
        assert text == reply["choices"][0]["message"]["content"]
    with served(model(), settings=Settings.model_validate({"cascade": {"below": 1e-6}})) as server:
        assert server.chat().json()["elastic"]["sizes"] == ["small"]


def test_under_load_smaller_sizes_answer_and_a_pin_holds() -> None:
    settings = Settings.model_validate(
        {"load": {"queue": 4, "tick_s": 0.01, "down_ticks": 1, "up_ticks": 3}}
    )
    with served(model(), Capacity(slots=2, max_length=200), settings) as server:
        with ThreadPoolExecutor(24) as pool:
            names = [NAME, NAME, f"{NAME}:full"] * 16
            replies = list(pool.map(lambda name: server.chat(model=name, max_tokens=60), names))
        used = [sizes(reply)[0] for reply in replies]
        assert set(used[2::3]) == {"full"}
        assert "small" in used
        whys = [each for reply in replies for each in reply.json()["elastic"]["routed_because"]]
        assert any(why.startswith("load: at most") for why in whys)


def test_load_is_seen_between_requests_too() -> None:
    """Nobody comes while a queue is worked off; the next one is told a smaller size."""
    settings = Settings.model_validate({"load": {"queue": 1, "tick_s": 0.05, "down_ticks": 5}})
    small_room = Capacity(slots=1, max_length=200)
    with served(model(), small_room, settings) as server, ThreadPoolExecutor(13) as pool:
        service = server.opened.service
        with ExitStack() as later:
            with server.held():
                for _ in range(12):
                    pool.submit(server.chat, model=f"{NAME}:full", max_tokens=20)
                until(lambda: len(service.live) == 12)
                later.enter_context(server.held())
            until(lambda: service.load().queued > 1)  # they queue, and the engine is held again
            by_load = service._policies.by_load
            until(lambda: by_load is not None and by_load.level == 2)
            asked = pool.submit(server.chat, max_tokens=1)
            until(lambda: len(service.live) == 13)
        assert sizes(asked.result()) == ["small"]


def test_a_full_queue_says_when_to_come_again() -> None:
    settings = Settings.model_validate({"overload": {"queue": 2}, "load": None})
    with served(model(), Capacity(slots=1, max_length=200), settings) as server:
        with ThreadPoolExecutor(24) as pool:
            replies = list(pool.map(lambda _: server.chat(max_tokens=60), range(48)))
        assert {reply.status_code for reply in replies} == {200, 429}
        for reply in replies:
            if reply.status_code == 429:
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("text, field", [
    ("load: {queue: 0}", "load.queue"),
    ("cascade: {below: 2}", "cascade.below"),
    ("speed: fast", "speed"),
    ("thinking: {efforts: {huge: 1}}", "thinking.efforts.huge"),
    ("- 1", "the whole"),
    ("a: [", "not YAML"),
])  # fmt: skip
def test_settings_that_cannot_be_are_named(tmp_path: Any, text: str, field: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=field) as caught:
        Settings.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_settings_that_name_no_size() -> None:
    with (
        pytest.raises(ValueError, match="policy quality: size 'huge' is not among"),
        served(model(), settings=Settings(quality={"high": "huge"})),
    ):
        pass


def test_a_policy_of_a_gpu_that_tells_nothing() -> None:
    with (
        pytest.raises(ValueError, match="policy load.device 0.9: no GPU tells"),
        served(model(), settings=Settings(load=LoadSettings(device=0.9))),
    ):
        pass


def difficulty(probe_tokens: int) -> Difficulty:
    """Long prompts gain from the full size, says this router, whatever the probe tells."""
    long = Feature(name="log_characters", mean=3.0, scale=0.1, weights=[0.0, 8.0])
    probe = Feature(name="first_logprob", mean=-1.0, scale=1.0, weights=[0.0, 0.0])
    used = [long, probe] if probe_tokens else [long]
    router = Router(probe_tokens=probe_tokens, bias=[0.0, 0.0], features=used)
    none = Interval(low=0, mean=0, high=0)
    setting = Setting(
        share=0.5, probe_tokens=probe_tokens, thresholds=[0.2], cost_share=0.5, accuracy=1,
        random=1, difference=none,
    )  # fmt: skip
    told = Provenance(
        checkpoint="", fitted=1, held_out=1, gained=1, seed=0, auc={}, calibration_error={}
    )
    return Difficulty(sizes=["small", "full"], routers=[router], table=[setting], provenance=told)


@pytest.mark.parametrize("probe_tokens", [0, 3])
def test_routine_requests_go_to_the_small_size(tmp_path: Any, probe_tokens: int) -> None:
    save(difficulty(probe_tokens), tmp_path / "difficulty.json")
    said = {"file": str(tmp_path / "difficulty.json"), "share": 0.5}
    settings = Settings.model_validate({"difficulty": said})
    with served(model(), settings=settings, sizes=["full", "small"]) as server:
        for ask in (server.chat, server.complete):
            assert sizes(ask("hi")) == ["small"]
            assert sizes(ask("hi " * 20)) == ["full"]
            assert sizes(ask("hi", model=f"{NAME}:full")) == ["full"]
        assert sizes(server.complete([5, 6, 7])) == ["full"]  # ids have no features
        why = server.chat("hi").json()["elastic"]["routed_because"]
        assert why[0].startswith("difficulty: ")
        probed = server.opened.worker.engine.stats.sizes["small"].output_tokens
        assert (probed > 8 * 3) == bool(probe_tokens)


def test_a_router_of_sizes_that_nobody_serves(tmp_path: Any) -> None:
    save(difficulty(0), tmp_path / "difficulty.json")
    said = {"file": str(tmp_path / "difficulty.json"), "share": 0.5}
    with (
        pytest.raises(ValueError, match="policy difficulty: size 'full' is not among"),
        served(model(), settings=Settings.model_validate({"difficulty": said}), sizes=["small"]),
    ):
        pass
