"""A front end without weights, over servers that have them: the same answers, policies, errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import NAME, THINKING, Server, model, served, upstreams

from star_elastic.checkpoint import Checkpoint
from star_elastic.serve.keys import Key, Keys, digest_of, new_key
from star_elastic.serve.settings import Settings

SIZES = ["full", "small"]


@pytest.fixture(scope="module")
def behind() -> Iterator[Server]:
    with served(model()) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("front") / "nano"
    model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def front(behind: Server, folder: Path) -> Iterator[Server]:
    both = upstreams(full=behind, small=behind)
    with served(Checkpoint.open(folder), upstreams=both) as running:
        yield running


def tokens(reply: dict[str, Any]) -> dict[str, Any]:
    """The usage, but for what a server had in its cache."""
    return {name: n for name, n in reply["usage"].items() if name != "prompt_tokens_details"}


@pytest.mark.parametrize("size", SIZES)
def test_it_says_what_the_server_behind_says(front: Server, behind: Server, size: str) -> None:
    for ask in ("chat", "complete"):
        said = {"model": f"{NAME}:{size}", "max_tokens": 20, "n": 2, "logprobs": 2}
        said |= {"logprobs": True, "top_logprobs": 2} if ask == "chat" else {}
        here, there = (getattr(server, ask)("abc", **said).json() for server in (front, behind))
        assert here["choices"] == there["choices"]
        assert tokens(here) == tokens(there)
        assert here["elastic"]["sizes"] == [size]


def test_it_streams_the_same(front: Server, behind: Server) -> None:
    body = {"model": f"{NAME}:small", "prompt": "abc", "max_tokens": 20, "temperature": 0}
    texts = [
        "".join(event["choices"][0]["text"] for event in server.events("/v1/completions", body))
        for server in (front, behind)
    ]
    assert texts[0] == texts[1] != ""


def test_the_policy_chooses_here(front: Server) -> None:
    assert front.chat().json()["elastic"]["sizes"] == ["full"]
    tokens = front.chat().json()["usage"]["total_tokens"]
    little = front.opened.service.sizes["small"].price * tokens * 1.001
    assert front.chat(elastic={"max_cost": little}).json()["elastic"]["sizes"] == ["small"]


def test_doubt_climbs_over_servers(folder: Path, behind: Server) -> None:
    settings = Settings.model_validate({"cascade": {"below": 0.999}})
    both = upstreams(full=behind, small=behind)
    with served(Checkpoint.open(folder), settings=settings, upstreams=both) as front:
        told = front.chat().json()
        assert told["elastic"]["sizes"] == ["small", "full"]
        assert told["choices"][0]["message"] == behind.chat().json()["choices"][0]["message"]


def test_one_size_here_and_one_elsewhere(behind: Server) -> None:
    with served(model(), sizes=["small"], upstreams=upstreams(full=behind)) as front:
        assert [each["id"] for each in front.client.get("/v1/models").json()["data"]] == [
            NAME, f"{NAME}:full", f"{NAME}:small",
        ]  # fmt: skip
        for size in SIZES:
            name = f"{NAME}:{size}"
            here, there = front.chat(model=name).json(), behind.chat(model=name).json()
            assert here["choices"] == there["choices"]


def test_thoughts_pass_through(tmp_path: Path) -> None:
    model(template=THINKING).save_pretrained(tmp_path / "nano")
    with served(model(template=THINKING)) as behind:
        both = upstreams(full=behind)
        with served(Checkpoint.open(tmp_path / "nano"), upstreams=both) as front:
            said = {"thinking_token_budget": 5, "max_tokens": 40}
            here, there = front.chat(**said).json(), behind.chat(**said).json()
            assert here["choices"] == there["choices"]
            assert here["choices"][0]["message"]["reasoning"]
            assert tokens(here) == tokens(there)


def test_a_server_that_dies_is_not_asked_again(folder: Path) -> None:
    with served(model()) as lasting:
        with served(model()) as dying:
            pair = upstreams(full=[dying, lasting])
            front_end = served(Checkpoint.open(folder), upstreams=pair)
            front = front_end.__enter__()
            try:
                assert front.chat().status_code == 200
                dying.opened.service.draining = True  # it answers 503 from now on
                assert [front.chat(f"{n}").status_code for n in range(8)] == [200] * 8
            except BaseException:
                front_end.__exit__(None, None, None)
                raise
        try:
            assert [front.chat(f"{n}").status_code for n in range(8)] == [200] * 8
        finally:
            front_end.__exit__(None, None, None)


def test_without_any_server_it_says_so(folder: Path) -> None:
    with served(model()) as behind:
        gone = upstreams(full=behind)
    with served(Checkpoint.open(folder), upstreams=gone) as front:
        assert front.client.get("/ready").status_code == 503
        reply = front.chat()
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1


def test_a_client_that_goes_away_is_gone_behind_too(front: Server, behind: Server) -> None:
    body = {"model": f"{NAME}:full", "prompt": "a", "max_tokens": 190, "stream": True}
    body |= {"logit_bias": {"2": -100}}
    with front.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_bytes())
    front.wait_idle()
    behind.wait_idle()


def test_keys_of_clients_are_not_sent_on(folder: Path, behind: Server) -> None:
    """Not a header of the client reaches the servers behind; theirs has no keys, and is asked."""
    key = new_key()
    keys = Keys([Key(name="a", sha256=digest_of(key))])
    with served(Checkpoint.open(folder), keys=keys, upstreams=upstreams(full=behind)) as front:
        assert front.chat().status_code == 401
        front.client.headers = {"authorization": f"Bearer {key}"}
        assert front.chat().status_code == 200


def test_a_size_that_the_checkpoint_does_not_have(folder: Path, behind: Server) -> None:
    with (
        pytest.raises(ValueError, match="upstream huge: .* has no such size, but full"),
        served(Checkpoint.open(folder), upstreams=upstreams(huge=behind)),
    ):
        pass


def test_servers_come_and_go(folder: Path, behind: Server) -> None:
    both = upstreams(full=behind)
    with (
        served(model()) as other,
        served(Checkpoint.open(folder), upstreams=both, administers=True, open_admin=True) as front,
    ):
        put, post = front.client.put, front.client.post
        wanted = {"upstream": f"full={other.url}#{NAME}:full"}
        assert put("/admin/upstreams", json=wanted).status_code == 200
        assert put("/admin/upstreams", json=wanted).status_code == 400  # it comes twice
        assert put("/admin/upstreams", json={"upstream": "huge=http://a"}).status_code == 400
        assert post("/admin/upstreams/drain", json={"url": behind.url}).status_code == 200
        states = {
            each["url"]: each["state"] for each in front.client.get("/status").json()["upstreams"]
        }
        assert states == {behind.url: "draining", other.url: "up"}
        before = other.opened.service.tokens["full"]
        assert [front.chat(f"{n}").status_code for n in range(4)] == [200] * 4
        assert other.opened.service.tokens["full"] == before + 32
        assert post("/admin/upstreams/restore", json={"url": behind.url}).status_code == 200
        gone = front.client.request("DELETE", "/admin/upstreams", json={"url": other.url})
        assert gone.status_code == 200
        assert front.chat().status_code == 200
        assert post("/admin/upstreams/drain", json={"url": other.url}).status_code == 404
