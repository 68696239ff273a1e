"""`examples/front-end`: two vLLM servers with a size each, out of one checkpoint, one address.

Tiny models in fp32: what comes through, and through the front end, is what stock transformers says
on the slice.
"""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ORDER, letters_tokenizer, tiny
from tokenizers import decoders
from transformers import AutoModelForCausalLM

from star_elastic.checkpoint import Checkpoint
from star_elastic.model import ElasticModel
from star_elastic.serve.answers import Asked, Piece
from star_elastic.serve.schema import ChatRequest, CompletionRequest, ThinkingBudget, read
from star_elastic.serve.upstream import Spec, UpstreamRefused, Upstreams
from star_elastic.slicing import slice_checkpoint
from star_elastic.submodel import ElasticSpace

EXAMPLE = Path(__file__).parent.parent / "examples" / "front-end" / "run.sh"
CONTEXT, NEW = 4096, 24  # tokens
CLOSE = 5e-5  # of a log probability in fp32
PROMPT = "3*(4+1)=15. so what is 15+1?"
SIZES: dict[str, dict[str, int]] = {
    "full": {},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1},
}


@dataclass(frozen=True)
class Said:
    """What stock transformers says after the prompt, and the log probability of each token."""

    text: str
    logprobs: list[float]


@dataclass(frozen=True)
class Served:
    """The front end, a server for each size, and what stock transformers says of the slices."""

    front: str
    urls: dict[str, str]
    says: dict[str, Said]


def tokenizer_of_tests() -> Any:
    """Letters, and the marks of a reasoning. Chats end in the first: vLLM counts from there."""
    tokenizer = letters_tokenizer(chat=True)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # what can be streamed has one
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template += "<think>"
    return tokenizer


def elastic_checkpoint(folder: Path) -> Path:
    tokenizer = tokenizer_of_tests()
    model = tiny(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        head_dim=32,
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=CONTEXT,
    ).float()
    model.config.dtype = torch.float32
    model.config.eos_token_id = tokenizer.eos_token_id
    elastic = ElasticModel(model, layer_order=ORDER["llama"])
    elastic.space = ElasticSpace.of(elastic.layout, SIZES, trained=True)
    elastic.save_pretrained(folder, overwrite=True)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def transformers_says(path: Path) -> Said:
    tokenizer = tokenizer_of_tests()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = made[:, prompt.shape[1] :]
    rows = model(made, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    chosen = rows.gather(1, new[0, :, None])[:, 0].tolist()
    return Said(tokenizer.decode(new[0], skip_special_tokens=True), chosen)


def free_ports(count: int) -> int:
    """The first of some, below those that the system hands out by itself: it takes a while."""
    while True:
        first = random.randrange(20_000, 32_000)
        if all(is_free(first + n) for n in range(count)):
            return first


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


# `vllm serve`, which the build for CPUs lacks: a core for each; one tells reasoning from the answer
_VLLM = """
import os, sys
full = "full" in str(sys.argv)
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(int(full) % os.cpu_count())
command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *sys.argv[1:]]
os.execv(command[0], command + ["--reasoning-parser", "nemotron_v3"] * full)
"""
_VLLM_ARGS = (
    f"--dtype float32 --enforce-eager --max-model-len {CONTEXT} --max-num-seqs 4 "
    "--enable-prefix-caching --enable-prompt-tokens-details"
)


@contextmanager
def running(folder: Path, port: int) -> Iterator[Callable[[], str]]:
    """The example, and what ran into its log if it has ended."""
    vllm, log = folder.parent / "vllm.py", folder.parent / "log"
    vllm.write_text(_VLLM)
    environ = {
        "VLLM": f"{sys.executable} {vllm}",
        "VLLM_ARGS": _VLLM_ARGS,
        "STAR_ELASTIC": f"{sys.executable} -m star_elastic",
        "FRONT_ARGS": "--name tiny",
        "PORT": str(port),
    }
    with open(log, "wb") as file:
        command = [str(EXAMPLE), str(folder)]
        script = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environ)
    try:
        yield lambda: "" if script.poll() is None else log.read_text()[-3000:] or "it ended"
    finally:
        script.terminate()
        script.wait(60)


def wait_for(url: str, ended: Callable[[], str]) -> None:
    for _ in range(240):
        assert not ended(), ended()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"{url} was not well in time")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    folder = elastic_checkpoint(place / "elastic")
    says = {}
    for size in SIZES:
        slice_checkpoint(Checkpoint.open(folder), place / size, size)
        says[size] = transformers_says(place / size)
    port = free_ports(3)
    at = "http://127.0.0.1"
    with running(folder, port) as ended:
        urls = {"small": f"{at}:{port + 1}", "full": f"{at}:{port + 2}"}  # the script's order
        wait_for(f"{at}:{port}/ready", ended)
        yield Served(f"{at}:{port}", urls, says)


def asked(body: dict[str, Any], thinking: ThinkingBudget | None = None) -> Asked:
    """A request with the prompt's own tokens."""
    said = {"model": "tiny", "temperature": 0, "max_tokens": NEW} | body
    request, _ = read(
        ChatRequest if "messages" in body else CompletionRequest, json.dumps(said).encode()
    )
    ids = tuple(tokenizer_of_tests()(PROMPT).input_ids)
    prompts = (ids,) * (request.answers // request.n)
    most = request.max_output_tokens or NEW
    return Asked(request=request, body=said, prompts=prompts, max_tokens=most, thinking=thinking)


def with_upstreams(served: Served, test: Callable[[Upstreams], Awaitable[None]]) -> None:
    async def main() -> None:
        specs = [Spec.read(f"{size}={url}") for size, url in served.urls.items()]
        async with asyncio.timeout(120), Upstreams(specs) as upstreams:
            await test(upstreams)

    asyncio.run(main())


def content(pieces: list[Piece], index: int = 0) -> str:
    return "".join(piece.parts.content for piece in pieces if piece.index == index)


@pytest.mark.parametrize("size", SIZES)
def test_a_completion_is_that_of_the_slice(size: str, served: Served) -> None:
    async def test(upstreams: Upstreams) -> None:
        assert upstreams.ready and upstreams.context_tokens() == CONTEXT
        answers = upstreams.answers(asked({"prompt": PROMPT}), size, confidence=True)
        pieces = [piece async for piece in answers]
        assert content(pieces) == served.says[size].text
        found = [each.logprob for piece in pieces for each in piece.logprobs]
        far = max(abs(a - b) for a, b in zip(found, served.says[size].logprobs, strict=True))
        print(f"{size}: {far:.1e}")
        assert far < CLOSE
        assert sum(piece.tokens for piece in pieces) == len(served.says[size].logprobs)
        assert pieces[-1].finish == "length"

    with_upstreams(served, test)


def test_a_chat_through_the_template(served: Served) -> None:
    """`:` + content + `=<think>` is what the template makes."""

    async def test(upstreams: Upstreams) -> None:
        drawn = {"n": 2, "temperature": 1, "seed": 5}  # vLLM refuses two that are alike
        for body in (
            {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, **drawn},
            {"prompt": f":{PROMPT}=<think>", "logprobs": 0, **drawn},
        ):
            pieces = [piece async for piece in upstreams.answers(asked(body), "small")]
            texts.append([content(pieces, 0), content(pieces, 1)])
            assert sum(piece.tokens for piece in pieces) <= 2 * NEW
            assert sorted(piece.index for piece in pieces if piece.finish) == [0, 1]

    texts: list[list[str]] = []
    with_upstreams(served, test)
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_who_goes_is_aborted(served: Served) -> None:
    """vLLM has it running, then not any more, long before all its tokens are made."""

    async def test(upstreams: Upstreams) -> None:
        long = asked({"prompt": PROMPT, "max_tokens": CONTEXT - 100})
        pieces = upstreams.answers(long, "small")
        await anext(pieces)
        assert upstreams.in_flight(served.urls["small"]) == 1
        await asyncio.sleep(2)  # a probe or two
        assert upstreams.load("small").running == 1
        assert upstreams.load("small").cache_used > 0
        await pieces.aclose()
        assert upstreams.in_flight(served.urls["small"]) == 0
        await asyncio.sleep(3)
        load = upstreams.load("small")
        assert (load.running, load.queued) == (0, 0), load

    with_upstreams(served, test)


def test_what_vllm_refuses_is_passed_on(served: Served) -> None:
    async def test(upstreams: Upstreams) -> None:
        with pytest.raises(UpstreamRefused) as caught:
            async for _ in upstreams.answers(
                asked({"prompt": PROMPT, "max_tokens": 9999}), "small"
            ):
                pass
        print(caught.value.body())
        assert caught.value.status == 400
        assert str(CONTEXT) in str(caught.value)

    with_upstreams(served, test)


def test_a_budget_of_thinking_that_nobody_asked_for_is_not_insisted_on(served: Served) -> None:
    """Without `--reasoning-parser` vLLM takes none."""

    async def test(upstreams: Upstreams) -> None:
        budget = ThinkingBudget(8, "the model's default")
        body = {"messages": [{"role": "user", "content": PROMPT}]}
        pieces = [piece async for piece in upstreams.answers(asked(body, budget), "small")]
        assert content(pieces)
        with pytest.raises(UpstreamRefused, match="thinking_token_budget"):
            said = asked(body | {"thinking_token_budget": 8}, budget)
            async for _ in upstreams.answers(said, "small"):
                pass

    with_upstreams(served, test)


def test_thinking_ends_at_its_budget(served: Served) -> None:
    async def test(upstreams: Upstreams) -> None:
        body = {
            "messages": [{"role": "user", "content": PROMPT}],
            "thinking_token_budget": 6,
            "logit_bias": {str(tokenizer_of_tests().eos_token_id): -100},
        }
        wanted = asked(body, ThinkingBudget(6, "thinking_token_budget"))
        pieces = [piece async for piece in upstreams.answers(wanted, "full")]
        thought = sum(piece.reasoning_tokens for piece in pieces)
        assert 0 < thought <= 8  # the marks may count
        assert sum(piece.tokens for piece in pieces) == NEW
        assert 0 < len("".join(piece.parts.reasoning for piece in pieces)) <= 7
        assert len(content(pieces)) > 4

    with_upstreams(served, test)


def test_a_prompt_is_computed_once(served: Served) -> None:
    async def test(upstreams: Upstreams) -> None:
        body = {"prompt": PROMPT * 10, "max_tokens": 2}
        twice = [[p async for p in upstreams.answers(asked(body), "small")] for _ in range(2)]
        assert sum(piece.cached_tokens for piece in twice[1]) >= 200

    with_upstreams(served, test)


def posted(served: Served, path: str, **body: Any) -> dict[str, Any]:
    """The front end's reply."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{served.front}/v1/{path}", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.parametrize("size", SIZES)
def test_the_front_end_says_what_the_slice_says(size: str, served: Served) -> None:
    wanted = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "logprobs": 0}
    reply = posted(served, "completions", model=f"tiny:{size}", **wanted)
    said, choice = served.says[size], reply["choices"][0]
    assert choice["text"] == said.text
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(said.logprobs, abs=CLOSE)
    assert reply["usage"]["completion_tokens"] == len(said.logprobs)
    assert reply["elastic"]["sizes"] == [size]


def test_the_front_end_chooses(served: Served) -> None:
    """Without a wish, the largest; it tells reasoning from the answer, and how much of each."""
    reply = posted(
        served,
        "chat/completions",
        model="tiny",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=NEW,
        temperature=0,
        thinking_token_budget=6,
        logit_bias={tokenizer_of_tests().eos_token_id: -100},
    )
    assert reply["elastic"]["sizes"] == ["full"]
    assert reply["elastic"]["thinking_budget"] == 6
    message = reply["choices"][0]["message"]
    assert message["reasoning"] and len(message["content"]) > 4
    assert reply["usage"]["completion_tokens"] == NEW
    assert 0 < reply["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 8


def test_the_front_end_streams(served: Served) -> None:
    body = {"model": "tiny:small", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    request = urllib.request.Request(
        f"{served.front}/v1/completions",
        json.dumps(body | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        events = [line[6:] for line in response.read().decode().splitlines() if line]
    assert events.pop() == "[DONE]"
    texts = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
    assert "".join(texts) == served.says["small"].text
    assert len(texts) > NEW // 2


def test_a_client_that_goes_frees_vllm(served: Served) -> None:
    body = {"model": "tiny:small", "prompt": PROMPT, "max_tokens": CONTEXT - 100, "stream": True}
    request = urllib.request.Request(
        f"{served.front}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.readline().startswith(b"data: ")
        assert running_at(served.urls["small"]) == 1
    deadline = time.monotonic() + 5
    while running_at(served.urls["small"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running_at(served.urls["small"]) == 0


def running_at(url: str) -> float:
    """Requests that vLLM computes now."""
    told = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    line = next(each for each in told.splitlines() if each.startswith("vllm:num_requests_running"))
    return float(line.split()[-1])


def test_what_vllm_refuses_the_front_end_refuses(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        posted(served, "completions", model="tiny:small", prompt=PROMPT, n=2, temperature=0)
    assert caught.value.code == 400
    assert "greedy" in json.load(caught.value)["error"]["message"]
