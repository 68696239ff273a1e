"""Streams out of bytes: events however they are cut, chunks of both APIs, what is no stream."""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_server import asked, chat, text, usage

from star_elastic.serve.answers import AnswerFailed, Piece
from star_elastic.serve.text import Parts
from star_elastic.serve.upstream.chunks import Transcript, parsed
from star_elastic.serve.upstream.errors import Garbled
from star_elastic.serve.upstream.figures import Figures, read_figures
from star_elastic.serve.upstream.outgoing import body_of
from star_elastic.serve.upstream.sse import Event, SseParser

LINES = st.sampled_from(
    ["data: {}", "data:x", "data", "data: é東😀", ": comment", "", "", "event: error", "id: 1", "x"]
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
STREAMS = st.lists(st.tuples(LINES, ENDS), max_size=30).map(
    lambda lines: "".join(line + end for line, end in lines).encode()
)


def events(*chunks: bytes, **limits: int) -> list[Event]:
    parser = SseParser(**limits)
    return [event for chunk in chunks for event in parser.feed(chunk)]


def until_garbled(*chunks: bytes) -> tuple[list[Event], str]:
    """The events before the parser gives up on lines of more than 8 bytes, and why."""
    parser, found = SseParser(max_line=8), []
    try:
        for chunk in chunks:
            for event in parser.feed(chunk):
                found.append(event)
    except Garbled as error:
        return found, str(error)
    return found, ""


def by_the_book(stream: str) -> list[Event]:
    """The same, of a whole stream, as the standard words it."""
    found, data, name = [], "", ""
    for line in re.split("\r\n|\n|\r", stream)[:-1]:
        if not line:
            if data:
                found.append(Event(data[:-1], name or "message"))
            data = name = ""
        field, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        data += f"{value}\n" if field == "data" else ""
        name = value if field == "event" else name
    return [event for event in found if event.data]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    at = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[a:b] for a, b in zip(at, at[1:], strict=False)]


@settings(max_examples=200, deadline=None)
@given(STREAMS, st.lists(st.integers(0, 400), max_size=20))
def test_events_do_not_depend_on_where_bytes_are_cut(stream: bytes, places: list[int]) -> None:
    whole = by_the_book(stream.decode())
    assert events(stream) == whole
    assert events(*cut(stream, places)) == whole
    assert events(*(bytes([byte]) for byte in stream)) == whole
    assert until_garbled(*cut(stream, places)) == until_garbled(stream)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=10))
def test_any_bytes_are_read(stream: bytes, places: list[int]) -> None:
    assert events(*cut(stream, places), max_line=1000) == events(stream)


def test_marks_and_halves() -> None:
    assert events(b"\xef\xbb\xbfdata: a\n\n") == [Event("a")]
    assert events(b"data: a\n\ndata: b\n") == [Event("a")]  # cut off: no event
    assert events(b"data: a\xff\n\n") == [Event("a\ufffd")]
    assert events(b"data: a\r", b"", b"\n\r", b"\n") == [Event("a")]


def test_nothing_is_held_without_bound() -> None:
    with pytest.raises(Garbled, match="a line of more than 100 bytes"):
        events(b"data: ", *([b"x" * 10] * 10), max_line=100)
    with pytest.raises(Garbled, match="an event of more than"):
        events(*([b"data: xxxxxxxxxx\n"] * 20), max_line=100)
    with pytest.raises(Garbled, match="in one stream"):
        events(*([b": still here\n"] * 20), max_stream=200)


def read_all(chunks: list[Any], answers: int = 1, is_chat: bool = True) -> list[Piece]:
    transcript = Transcript(answers, is_chat)
    found = [piece for chunk in chunks for piece in transcript.read(chunk)]
    return found + transcript.end()


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_and_answers(name: str) -> None:
    thought: Any = {name: "hm"}
    found = read_all(
        [
            chat("", role="assistant"),
            chat(**thought),
            chat(**thought, finish_reason=None),
            chat("yes"),
            chat(finish_reason="stop"),
            usage(9, reasoning=4, cached=64),
        ]
    )
    assert [piece.parts for piece in found] == [
        Parts("hm"),
        Parts("hm"),
        Parts(content="yes"),
        Parts(),
    ]
    assert [piece.tokens for piece in found] == [1, 1, 1, 6]
    assert [piece.reasoning_tokens for piece in found] == [1, 1, 0, 2]
    assert [piece.finish for piece in found] == [None, None, None, "stop"]
    assert [piece.cached_tokens for piece in found] == [0, 0, 0, 64]


def test_without_a_count_chunks_are_counted() -> None:
    found = read_all([chat("a"), chat("b", finish_reason="length")])
    assert sum(piece.tokens for piece in found) == 2
    assert found[-1].finish == "length"


def test_a_token_in_two_chunks_is_taken_back() -> None:
    found = read_all([chat("a"), chat("b"), chat("c", finish_reason="stop"), usage(2)])
    assert sum(piece.tokens for piece in found) == 2


def test_several_answers_end_each_by_itself() -> None:
    chunks = [
        text("a", 1),
        text("b", 0, finish_reason="stop"),
        text("late", 0),
        text("c", 1, finish_reason="content_filter"),
    ]
    found = read_all([*chunks, usage(5)], 2, is_chat=False)
    said = [(piece.index, piece.parts.content, piece.finish) for piece in found]
    assert said == [
        (1, "a", None),
        (0, "b", None),
        (0, "", "stop"),
        (1, "c", None),
        (1, "", "stop"),
    ]
    assert sum(piece.tokens for piece in found) == 5


def test_log_probabilities_of_both_apis() -> None:
    entry = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    other = {"token": "x", "logprob": -math.inf, "bytes": None}
    content = [entry | {"top_logprobs": [entry, other]}, other]
    newer = read_all([chat("éx", logprobs={"content": content})])
    lists = {
        "tokens": ["é", "x"],
        "token_logprobs": [-0.5, None],
        "top_logprobs": [{"é": -0.5, "x": -9999.0}, None],
        "text_offset": [0, 1],
    }
    older = read_all([text("éx", logprobs=lists)], is_chat=False)
    assert newer == older
    assert newer[0].tokens == 2
    first, second = newer[0].logprobs
    assert (first.token, first.logprob, first.bytes) == ("é", -0.5, [195, 169])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("é", -0.5), ("x", -9999.0)]
    assert (second.token, second.logprob, second.top_logprobs) == ("x", -9999.0, [])


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": {}},
        {"choices": ["a"]},
        {"choices": [], "usage": 3},
        chat("a", index=1),
        chat("a", index=-1),
        {"choices": [{"index": True, "delta": {}}]},
        {"choices": [{"index": 0, "delta": {"content": 7}}]},
        {"choices": [{"index": 0, "delta": []}]},
        chat("a", logprobs={"content": [{"token": 1, "logprob": 0}]}),
        chat("a", logprobs={"content": [{"token": "a", "logprob": 0, "bytes": 2**60}]}),
        chat("a", logprobs={"content": [{"token": "a", "logprob": 0, "bytes": [256]}]}),
        chat("a", logprobs={"content": [{"token": "a"}]}),
        chat("a", logprobs={"content": 5}),
    ],
    ids=lambda chunk: json.dumps(chunk)[:60],
)
def test_chunks_of_the_wrong_shape(chunk: Any) -> None:
    with pytest.raises(Garbled):
        read_all([chunk])


@pytest.mark.parametrize("data", ["", "{", "[]", "3", "[" * 100_000, '{"n": ' + "9" * 5000 + "}"])
def test_data_that_is_no_object(data: str) -> None:
    with pytest.raises(Garbled):
        parsed(data)


def test_half_a_pair_becomes_text() -> None:
    assert parsed(r'{"a": "\ud83d"}') == {"a": "?"}
    assert parsed(r'{"a": "\ud83d\ude00"}') == {"a": "😀"}


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_given_up_is_no_answer(reason: str) -> None:
    with pytest.raises(AnswerFailed) as caught:
        read_all([chat("a"), chat(finish_reason=reason)])
    assert caught.value.status == 502


def test_only_what_a_server_knows_is_sent() -> None:
    wanted = asked(
        thinking=7,
        salt="a key",
        temperature=0.5,
        stop="x",
        logit_bias={"5": 1},
        elastic={"quality": "high"},
        reasoning_effort="low",
        max_completion_tokens=20,
        stream=True,
        stream_options={"include_usage": False},
        include_reasoning=False,
        surprise=1,
        max_tokens=20,
    )
    assert body_of(wanted, "theirs", confidence=True) == {
        "model": "theirs",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "stop": ["x"],
        "logit_bias": {"5": 1.0},
        "max_tokens": 20,
        "stream": True,
        "stream_options": {"include_usage": True},
        "thinking_token_budget": 7,
        "logprobs": True,
        "cache_salt": "a key",
    }


def test_what_was_not_said_is_filled_in() -> None:
    wanted = asked(chat=False, max_tokens=500, prompt=tuple(range(30)))
    assert body_of(wanted, "m", confidence=True)["logprobs"] == 0
    assert body_of(wanted, "m", confidence=False)["max_tokens"] == 500
    assert body_of(wanted, "m", confidence=False, context_tokens=100)["max_tokens"] == 70
    assert body_of(wanted, "m", confidence=False, context_tokens=10)["max_tokens"] == 1
    assert "thinking_token_budget" not in body_of(wanted, "m", confidence=False)


def test_thinking_that_is_off_is_told_to_the_template() -> None:
    off = body_of(asked(thinking=0), "m", confidence=False)
    assert off["chat_template_kwargs"] == {"enable_thinking": False}
    said = asked(thinking=0, chat_template_kwargs={"enable_thinking": True})
    assert body_of(said, "m", False)["chat_template_kwargs"] == {"enable_thinking": True}


def test_figures_of_vllm() -> None:
    told = """
# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="a b}"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.25
"""
    assert read_figures(told, ours=4) == Figures(4, 2, 0.375, others=2)
    assert read_figures("go_goroutines 8\n", ours=0) is None
    assert read_figures("vllm:num_requests_running\nvllm:num_requests_waiting nan", 0) is None
