"""Requests are read strictly; errors name the field and its value."""

import json
import random
from typing import Any

import pytest
from bodies import CHAT, COMPLETION, HI, chat, completion, refused, refused_chat
from hypothesis import given, settings
from hypothesis import strategies as st

from star_elastic.serve.schema import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    Wanted,
    read,
)

# bodies as clients send them


def test_the_shortest_request() -> None:
    request = chat()
    assert (request.n, request.stream, request.max_output_tokens, request.top) == (
        1,
        False,
        None,
        None,
    )
    assert request.messages[0].content == "hi"


def test_what_openai_client_and_evaluation_harness_send() -> None:
    body = {
        **CHAT,
        "max_completion_tokens": 64,
        "temperature": 0,
        "stop": ["\n\n", "Q:"],
        "seed": 1234,
        "logprobs": True,
        "top_logprobs": 5,
        "logit_bias": {"12": -100, "13": 1.5},
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "frequency_penalty": None,
        "user": "someone",
    }
    request, ignored = read(ChatRequest, json.dumps(body).encode())
    assert ignored == []
    assert request.max_output_tokens == 64 and request.top == 5 and request.temperature == 0.0
    assert request.logit_bias == {12: -100.0, 13: 1.5}
    assert request.stream_options is not None and request.stream_options.include_usage
    assert request.stop == ["\n\n", "Q:"]


def test_extras_are_ignored_and_named() -> None:
    messages = [{"role": "user", "content": "hi", "id": 1}]
    body = {**CHAT, "messages": messages, "store": True, "metadata": {"a": "b"}, "x" * 200: 1}
    body["reasoning"] = {"summary": "auto", "effort": "low"}
    request, ignored = read(ChatRequest, json.dumps(body).encode())
    assert ignored == ["store", "metadata", "x" * 80, "reasoning.summary", "messages[].id"]
    assert request.reasoning_effort == "low"
    many = {**CHAT, **{f"field{n}": n for n in range(1_000)}}
    assert len(read(ChatRequest, json.dumps(many).encode())[1]) == 32


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"guided_json": {}},
        {"best_of": 2},
        {"echo": True},
        {"min_tokens": 5},
        {"chat_template": "{{ 1 }}"},
    ],
)
def test_what_would_change_the_answer_is_refused(asked: dict[str, Any]) -> None:
    error = refused_chat(**asked)
    assert (error.param, error.code) == (next(iter(asked)), "unsupported_parameter")


def test_content_is_text_or_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    error = refused_chat(messages=[*HI, {"role": "user", "content": image}])
    assert error.param == "messages[1].content" and "'image_url'" in error.message
    assert refused_chat(messages=[{"role": "user"}]).param == "messages[0].content"
    assert refused_chat(messages=[{"role": "user", "content": [{"type": "text"}]}])
    error = refused_chat(messages=[{"role": "assistant", "content": "", "tool_calls": [1]}])
    assert error.param == "messages[0].tool_calls"
    assert refused_chat(messages=[{"role": "tool", "content": "x"}]).param == "messages[0].role"


@pytest.mark.parametrize(
    ("prompt", "read_as"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt: Any, read_as: Any) -> None:
    assert completion(prompt=prompt).prompt == read_as


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], [[-1]], [[2**31]], [True], 1, {}, ["a"] * 129]
)
def test_prompts_refused(prompt: Any) -> None:
    body = json.dumps({**COMPLETION, "prompt": prompt}).encode()
    assert refused(body, CompletionRequest).param == "prompt"


# bounds


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", 2**63),
        ("n", True),
        ("n", "1"),
        ("n", 1.0),
        ("max_tokens", 0),
        ("max_tokens", 10**30),
        ("temperature", -0.1),
        ("temperature", 999999),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_p", -1),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("repetition_penalty", 1e-300),
        ("seed", 2**63),
        ("top_logprobs", 21),
        ("logit_bias", {"-1": 0}),
        ("logit_bias", {"x": 0}),
        ("logit_bias", {"9999999999": 0}),
        ("logit_bias", {str(n): 0 for n in range(1025)}),
        ("stop", ["x"] * 17),
        ("stop_token_ids", list(range(65))),
        ("messages", []),
        ("messages", "hi"),
        ("messages", HI * 4097),
        ("stream", "true"),
        ("stream_options", {}),
        ("user", "x" * 257),
        ("priority", 2**31),
        ("model", ""),
        ("model", 1),
        ("chat_template_kwargs", []),
        ("elastic", "12b"),
    ],
)
def test_a_value_out_of_bounds_is_named(field: str, value: Any) -> None:
    error = refused_chat(**{field: value})
    assert error.param == field and error.message.startswith(f"{field}: ")
    assert error.status == 400


@pytest.mark.parametrize(
    ("fields", "param", "quoted"),
    [
        ({"n": 12345}, "n", "it is 12345"),
        ({"logit_bias": {"7": 101}}, "logit_bias[7]", "it is 101"),
        ({"stop": [""]}, "stop[0]", "it is ''"),
        ({"stop": ["a", "x" * 257]}, "stop[1]", "at most 256"),
        ({"elastic": {"max_cost": -1}}, "elastic.max_cost", "it is -1"),
        ({"elastic": {"sise": "12b"}}, "elastic.sise", "it is '12b'"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs.tokenize",
            "it is true",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "only with logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "is 5"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "it is 'king'"),
    ],
)
def test_errors_name_the_field_and_quote_the_value(
    fields: dict[str, Any], param: str, quoted: str
) -> None:
    error = refused_chat(**fields)
    assert error.param == param and quoted in error.message


def test_a_missing_field() -> None:
    error = refused(b'{"model": "nano", "messages": null}')
    assert (error.param, error.code) == ("messages", "missing_required_parameter")


def test_a_temperature_close_to_none() -> None:
    asked = [0, 1e-9, 1e-5, 0.009, 0.01, 2]
    assert [chat(temperature=t).temperature for t in asked] == [0.0, 0.0, 0.01, 0.01, 0.01, 2.0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not read"),
        (b"[]", "an array of 0, not an object"),
        (b"{", "not read"),
        (b'{"n": NaN}', "NaN is no number"),
        (b'{"n": -Infinity}', "Infinity is no number"),
        (b'{"n": 1, "n": 2}', "a key comes twice"),
        (b"\xff\xfe{", "not read"),
        (b'{"model": "\\uD800"}', "surrogates not allowed"),
        (b'{"\xed\xa0\x80": 1}', "invalid continuation byte"),
        ('{"model": "nano"}'.encode("utf-16"), "not read"),
        (b'{"a": [' + b"{}," * 2**15 + b"{}]}", "more than 32768 objects"),
        (json.dumps(dict.fromkeys(map(str, range(4097)))).encode(), "more than 4096 keys"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "not read"),
    ],
)
def test_json_without_loopholes(body: bytes, says: str) -> None:
    error = refused(body)
    assert says in error.message and error.code == "invalid_json"


def test_objects_nested_too_deep_to_look_into() -> None:
    for depth in (18, 300):
        assert "deeper than 16" in refused(b'{"a":' * depth + b"1" + b"}" * depth).message
    lists = [[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]  # nobody looks into these
    assert chat(a=lists) == chat()


def test_a_body_too_long_is_not_parsed() -> None:
    with pytest.raises(BadRequest, match="at most 10 are read") as caught:
        read(ChatRequest, b"{" * 11, max_bytes=10)
    assert caught.value.status == 413


VALUES = [
    *(-(2**63), -1, 0, 1, 2**31, 2**63, 10**400, 0.5, 1e308, -0.0),
    *(None, True, "1", "", "x" * 5_000, [], {}, [[]], [None], {"a": 1}, [1] * 2_000, "\u0000"),
]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_field_times_every_value_is_read_or_refused(kind: type[Wanted]) -> None:
    start = CHAT if kind is ChatRequest else COMPLETION
    fields = [*kind.model_fields, "thinking", "reasoning", "max_thinking_tokens", "tools", "other"]
    outcomes = {"read": 0, "refused": 0}
    for field in fields:
        for value in VALUES:
            for wrapped in (value, {"effort": value, "type": value}, [value], {"1": value}):
                body = json.dumps({**start, field: wrapped}).encode()
                try:
                    read(kind, body)
                    outcomes["read"] += 1
                except BadRequest as error:
                    json.dumps(error.body(), ensure_ascii=False).encode()
                    outcomes["refused"] += 1
    assert min(outcomes.values()) > 200


JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "reasoning", "tools"]), JSONS))
@settings(max_examples=600, deadline=None)
def test_any_json_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        request, _ = read(ChatRequest, json.dumps({**CHAT, **fields}).encode())
    except BadRequest as error:
        assert error.status == 400
    else:
        assert 1 <= request.n <= 128 and len(request.stop) <= 16


def test_any_bytes_are_read_or_refused() -> None:
    draw = random.Random(0)
    body = bytearray(json.dumps({**CHAT, "stop": ["a"], "logit_bias": {"1": 2}}).encode())
    for _ in range(5_000):
        broken = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        try:
            read(ChatRequest, bytes(broken))
        except BadRequest as error:
            json.dumps(error.body(), ensure_ascii=False).encode()
