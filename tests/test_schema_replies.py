"""Replies have the shapes that clients of the OpenAI API read."""

import json

import pytest

from star_elastic.serve.schema import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    ChunkChoice,
    Delta,
    ElasticReport,
    TokenLogprob,
    Usage,
    model_list,
)


def test_a_whole_answer() -> None:
    top = TokenLogprob.of("é".encode(), -0.5)
    chosen = ChatTokenLogprob(token="\ufffd", logprob=-1.0, bytes=[195], top_logprobs=[top])
    reply = ChatCompletion(
        id="chatcmpl-1",
        created=1,
        model="nano:12b",
        choices=[
            ChatChoice(
                index=0,
                message=Answer.of("yes", "hmm"),
                logprobs=ChatLogprobs(content=[chosen]),
                finish_reason="stop",
            )
        ],
        usage=Usage.of(prompt=3, completion=5, reasoning=2, cached=1),
        elastic=ElasticReport(sizes=["12b"], tokens={"12b": 5}, routed_because=["pinned"]),
    )
    sent = json.loads(reply.model_dump_json())
    assert sent["object"] == "chat.completion"
    message = sent["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == (
        "yes",
        "hmm",
        "hmm",
    )
    assert sent["usage"]["total_tokens"] == 8
    assert sent["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert sent["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == [
        {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    ]
    assert sent["elastic"] == {
        "sizes": ["12b"],
        "tokens": {"12b": 5},
        "switches": 0,
        "routed_because": ["pinned"],
        "ignored": [],
    }


def test_a_logprob_of_nothing_is_still_a_number() -> None:
    assert json.loads(TokenLogprob.of(b"a", float("-inf")).model_dump_json())["logprob"] == -9999.0


@pytest.mark.parametrize(
    ("delta", "sent"),
    [
        (Delta.of(first=True), {"role": "assistant", "content": ""}),
        (Delta.of("a"), {"content": "a"}),
        (Delta.of(reasoning="b"), {"reasoning": "b", "reasoning_content": "b"}),
        (Delta.of(), {}),
    ],
)
def test_chunks_carry_only_what_they_add(delta: Delta, sent: dict[str, str]) -> None:
    choice = ChunkChoice(index=0, delta=delta)
    chunk = json.loads(
        ChatChunk(id="x", created=1, model="nano", choices=[choice]).model_dump_json()
    )
    assert chunk["choices"][0]["delta"] == sent
    assert chunk["choices"][0]["finish_reason"] is None  # clients look for the key
    assert "usage" not in chunk and "elastic" not in chunk


def test_every_size_is_a_model_of_its_own() -> None:
    listed = json.loads(model_list("nano", ["30b", "12b"], created=1).model_dump_json())
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["nano", "nano:30b", "nano:12b"]
    assert [model.get("size") for model in listed["data"]] == [None, "30b", "12b"]
    assert all(model["object"] == "model" for model in listed["data"])
