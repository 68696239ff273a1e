"""Bodies of requests, by hand, as a client of the OpenAI API would send them."""

import json
from typing import Any

import pytest

from star_elastic.serve.schema import BadRequest, ChatRequest, CompletionRequest, Wanted, read

HI = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "nano", "messages": HI}
COMPLETION: dict[str, Any] = {"model": "nano", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return read(ChatRequest, json.dumps({**CHAT, **fields}).encode())[0]


def completion(**fields: Any) -> CompletionRequest:
    return read(CompletionRequest, json.dumps({**COMPLETION, **fields}).encode())[0]


def refused(body: bytes, kind: type[Wanted] = ChatRequest) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        read(kind, body)
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}
    assert len(caught.value.message) < 600
    return caught.value


def refused_chat(**fields: Any) -> BadRequest:
    return refused(json.dumps({**CHAT, **fields}).encode())
