"""The API as clients that nobody wrote for it see it: openai's, lm-eval's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, THINKING, Server, model, served

MESSAGES: Any = [{"role": "user", "content": "What is 2 + 2?"}]
SIZES = ["full", "small", "prefix"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(model()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(server: Server, size: str, prompt: str, count: int) -> str:
    """What stock `generate` answers on the view, as text."""
    made = server.opened.model
    ids = made.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    view: Any = made[size]
    whole = view.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=2)
    answer = torch.Tensor.tolist(whole[0, ids.shape[1] :])
    return made.tokenizer.decode(answer, skip_special_tokens=True)


def test_every_size_is_a_model(client: OpenAI) -> None:
    names = [each.id for each in client.models.list()]
    assert names[0] == NAME
    assert set(names[1:]) == {f"{NAME}:{size}" for size in SIZES}
    assert client.models.retrieve(f"{NAME}:small").id == f"{NAME}:small"
    with pytest.raises(NotFoundError, match="not served"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("size", SIZES)
def test_each_size_answers_as_it_does_alone(server: Server, client: OpenAI, size: str) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=f"{NAME}:{size}", messages=MESSAGES, max_completion_tokens=12, temperature=0
    )
    reply = raw.parse()
    prompt = "<turn>user: What is 2 + 2?</turn><turn>assistant:"
    assert reply.choices[0].message.content == alone(server, size, prompt, 12)
    assert reply.choices[0].finish_reason == "length"
    assert raw.headers["x-elastic-size"] == size
    told: Any = reply.model_extra["elastic"] if reply.model_extra else None
    assert told["sizes"] == [size]
    assert told["tokens"] == {size: 12}
    assert told["routed_because"] == [f"pinned: the request names {size}"]
    assert reply.usage is not None and reply.usage.completion_tokens == 12


def test_the_policy_answers_with_the_largest(client: OpenAI) -> None:
    reply: Any = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=2)
    assert reply.elastic["sizes"] == ["full"]


@pytest.mark.parametrize("size", SIZES)
def test_a_stream_is_the_whole_in_pieces(client: OpenAI, size: str) -> None:
    wanted: Any = dict(
        model=f"{NAME}:{size}", messages=MESSAGES, max_tokens=40, temperature=0.8, seed=5, n=2,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    whole = client.chat.completions.create(**wanted)
    texts, finishes, usage, elastic = ["", ""], {}, None, None
    logprobs: list[list[Any]] = [[], []]
    options: Any = {"include_usage": True}
    for chunk in client.chat.completions.create(**wanted, stream=True, stream_options=options):
        usage, elastic = chunk.usage or usage, getattr(chunk, "elastic", None) or elastic
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += (choice.logprobs and choice.logprobs.content) or []
            if choice.finish_reason:
                assert choice.index not in finishes
                finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == {n: choice.finish_reason for n, choice in enumerate(whole.choices)}
    assert usage == whole.usage
    assert elastic == whole.model_extra["elastic"] if whole.model_extra else False
    for told, choice in zip(logprobs, whole.choices, strict=True):
        assert choice.logprobs is not None and told == choice.logprobs.content
    assert texts[0] != texts[1]  # two answers of one seed are two answers


def test_completions_of_texts_and_ids(server: Server, client: OpenAI) -> None:
    ids = server.opened.model.tokenizer("abc", add_special_tokens=False).input_ids
    for prompt in ("abc", ids):
        reply = client.completions.create(
            model=f"{NAME}:small", prompt=prompt, max_tokens=9, temperature=0, logprobs=2
        )
        choice = reply.choices[0]
        assert choice.text == alone(server, "small", "abc", 9)
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == 9
    many = client.completions.create(
        model=NAME, prompt=["abc", "de"], n=2, max_tokens=3, temperature=0
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text != many.choices[2].text
    chunks = client.completions.create(
        model=f"{NAME}:small", prompt="abc", max_tokens=9, temperature=0, stream=True
    )
    streamed = "".join(chunk.choices[0].text for chunk in chunks)
    assert streamed == alone(server, "small", "abc", 9)


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    wanted: Any = dict(model=NAME, prompt="abc", temperature=0, max_tokens=30)
    whole = client.completions.create(**wanted).choices[0].text
    stop = whole[4:7]
    reply = client.completions.create(**wanted, stop=[stop, "never this"])
    assert reply.choices[0].text == whole[: whole.find(stop)]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.completion_tokens < 30
    streamed = client.completions.create(**wanted, stop=stop, stream=True)
    assert "".join(each.choices[0].text for each in streamed) == whole[: whole.find(stop)]


def test_a_token_of_the_request_ends_it_too(server: Server, client: OpenAI) -> None:
    wanted: Any = dict(model=NAME, prompt="abc", temperature=0, max_tokens=30)
    first = client.completions.create(**wanted, logprobs=0).choices[0]
    assert first.logprobs and first.logprobs.tokens
    tokens = server.client.post("/tokenize", json={"prompt": first.text}).json()["tokens"]
    reply = client.completions.create(**wanted, extra_body={"stop_token_ids": tokens})
    assert reply.choices[0].finish_reason == "stop"
    assert len(reply.choices[0].text) < len(first.text)


def test_errors_are_openais(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=10**6)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model=f"{NAME}:huge", messages=MESSAGES)
    with pytest.raises(BadRequestError, match="quality 'best' is unknown"):
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, extra_headers={"x-elastic-quality": "best"}
        )


def test_what_is_ignored_is_told(client: OpenAI) -> None:
    reply: Any = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=1, extra_body={"mirostat": 2}
    )
    assert reply.elastic["ignored"] == ["mirostat"]


def test_thoughts_are_told_apart_and_bounded() -> None:
    with served(model(template=THINKING)) as server:
        openai = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        wanted: Any = dict(model=NAME, messages=MESSAGES, max_tokens=40, temperature=0)
        for budget in (0, 1, 7):
            body = {"thinking_token_budget": budget}
            reply: Any = openai.chat.completions.create(**wanted, extra_body=body)
            message, details = reply.choices[0].message, reply.usage.completion_tokens_details
            assert message.content and "</think>" not in message.content
            assert bool(message.reasoning) == bool(budget)
            assert message.reasoning == message.reasoning_content
            assert details.reasoning_tokens - len("</think>") in range(budget, budget + 4)
            assert reply.elastic["thinking_budget"] == budget
            assert reply.usage.completion_tokens == 40
        deltas = openai.chat.completions.create(
            **wanted, stream=True, extra_body={"thinking_token_budget": 7}
        )
        texts = {"reasoning": "", "content": ""}
        for chunk in deltas:
            for name in texts:
                texts[name] += getattr(chunk.choices[0].delta, name, None) or ""
        assert texts == {"reasoning": message.reasoning, "content": message.content}
        models = {each.id: each for each in openai.models.list()}
        told: Any = models[NAME]
        assert told.thinking_budgets["none"] == 0
        hidden: Any = openai.chat.completions.create(
            **wanted, extra_body={"thinking_token_budget": 7, "include_reasoning": False}
        )
        assert hidden.choices[0].message.reasoning is None
        assert hidden.choices[0].message.content == message.content


def test_the_rest_of_the_routes(server: Server) -> None:
    get = server.client.get
    assert get("/health").status_code == get("/ready").status_code == 200
    assert get("/version").json() == {"version": "0.1.0"}
    assert get("/nowhere").json()["error"]["message"] == "Not Found"
    tokens = server.client.post("/tokenize", json={"prompt": "naïve 😀"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    back = server.client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": "naïve 😀"}
    rendered = server.client.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    text = server.client.post("/detokenize", json={"tokens": rendered}).json()["prompt"]
    assert text == "<turn>user: What is 2 + 2?</turn><turn>assistant:"


def test_figures_are_told_by_size() -> None:
    with served(model()) as server:
        for size, count in (("small", 3), ("full", 5)):
            assert server.chat(model=f"{NAME}:{size}", max_tokens=count).status_code == 200
        server.wait_idle()
        families = text_string_to_metric_families(server.client.get("/metrics").text)
        samples = {(s.name, s.labels.get("size")): s.value for f in families for s in f.samples}
        assert samples["star_elastic_output_tokens_total", "small"] == 3
        assert samples["star_elastic_output_tokens_total", "full"] == 5
        assert samples["star_elastic_time_to_first_token_seconds_count", "full"] == 1
        assert samples["star_elastic_running_requests", None] == 0
        told = server.client.get("/status").json()
        assert {each["name"]: each["tokens"] for each in told["sizes"]} == {
            "small": 3, "full": 5, "prefix": 0,
        }  # fmt: skip
        assert told["requests"] == []


def test_lm_eval_measures_a_size(server: Server, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    target = server.chat("2 + 2", model=f"{NAME}:small", max_tokens=6).json()
    rows = [{"question": "2 + 2", "answer": target["choices"][0]["message"]["content"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {max_gen_toks: 6, until: []}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    found: Any = simple_evaluate(
        model="local-chat-completions",
        model_args={
            "model": f"{NAME}:small",
            "base_url": f"{server.url}/v1/chat/completions",
            "num_concurrent": 1,
        },
        tasks=["sums"],
        apply_chat_template=True,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    assert found["results"]["sums"]["exact_match,none"] == 1.0
