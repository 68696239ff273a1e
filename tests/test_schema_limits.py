"""A request held against what is served: how long it may think, which size, does it fit?"""

import json
from typing import Any

import pytest
from bodies import CHAT, COMPLETION, chat, completion, refused, refused_chat

from star_elastic.serve.schema import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    Limits,
    check_fits,
    read,
    size_of,
    thinking_budget,
)

LIMITS = Limits(context_tokens=1_000, vocab_size=500, logprobs=5_000)

# the budget of thinking


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_token_budget": 7},
        {"thinking_budget_tokens": 7},
        {"thinking_budget": 7},
        {"max_thinking_tokens": 7},
        {"reasoning": {"max_tokens": 7}},
        {"thinking": {"type": "enabled", "budget_tokens": 7}},
        {"thinking_budget": 7, "reasoning": {"max_tokens": 7}},
    ],
)
def test_every_alias_of_the_budget(fields: dict[str, Any]) -> None:
    request, ignored = read(ChatRequest, json.dumps({**CHAT, **fields}).encode())
    assert request.thinking_token_budget == 7 and ignored == []


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"thinking_budget": 7, "thinking_token_budget": 8}, "thinking_budget", "(8) and"),
        ({"thinking": {"type": "disabled"}, "thinking_budget": 7}, "thinking.type", "disagree"),
        (
            {"reasoning": {"effort": "low"}, "reasoning_effort": "high"},
            "reasoning.effort",
            "disagree",
        ),
        ({"reasoning": {"exclude": True}, "include_reasoning": True}, "reasoning", "disagree"),
        ({"thinking_budget": -2}, "thinking_budget", "it is -2"),
        ({"thinking_budget": 0.6}, "thinking_budget", "it is 0.6"),
        ({"thinking_budget": True}, "thinking_budget", "it is true"),
        ({"thinking_budget": 2**63}, "thinking_budget", "at most"),
        ({"thinking": True}, "thinking", "it is true"),
        ({"thinking": {"type": "adaptive"}}, "thinking", "it is 'adaptive'"),
        ({"reasoning": {"enabled": 1}}, "reasoning.enabled", "it is 1"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "it is 'huge'"),
        ({"reasoning_effort": 3}, "reasoning_effort", "it is 3"),
    ],
)
def test_budgets_refused(fields: dict[str, Any], param: str, says: str) -> None:
    error = refused_chat(**fields)
    assert error.param == param and says in error.message


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"chat_template_kwargs": {"thinking_budget": 7}}, "chat_template_kwargs.thinking_budget"),
        ({"custom_params": {"thinking_budget": 7}}, "custom_params.thinking_budget"),
        ({"elastic": {"thinking_token_budget": 7}}, "elastic.thinking_token_budget"),
        ({"extra_body": {"a": {"thinking_budget": 7}}}, "extra_body.a.thinking_budget"),
        (
            {"thinking": {"budget": 7, "budget_tokens": 7, "max_thinking_tokens": 7}},
            "thinking.max_thinking_tokens",
        ),
        ({"max_reasoning_tokens": 7}, "max_reasoning_tokens"),
        ({"budget_tokens": 7}, "budget_tokens"),
    ],
)
def test_a_misplaced_budget_is_refused_with_a_hint(fields: dict[str, Any], path: str) -> None:
    error = refused_chat(**fields)
    assert error.param == path
    assert "write thinking_token_budget at the root" in error.message


def test_thinking_turned_off_and_unlimited_and_hidden() -> None:
    assert chat(thinking={"type": "disabled"}).thinking_token_budget == 0
    assert chat(reasoning={"enabled": False}).thinking_token_budget == 0
    assert chat(reasoning={"enabled": True}).thinking_token_budget is None
    assert chat(thinking_token_budget=-1).thinking_token_budget == -1
    assert not chat(reasoning={"exclude": True}).include_reasoning
    assert (
        chat(chat_template_kwargs={"enable_thinking": False}).chat_template_kwargs.enable_thinking
        is False
    )


@pytest.mark.parametrize(
    ("said", "effort", "max_tokens", "tokens"),
    [
        (None, None, 1_000, 500),  # the default
        (None, "low", 1_000, 100),
        (7, "low", 1_000, 7),
        (0, "low", 1_000, 0),
        (-1, None, 1_000, 950),
        (970, None, 1_000, 950),
        (950, None, 1_000, 950),
        (7, None, 50, 0),
        (7, None, 3, 0),
    ],
)
def test_the_budget_that_holds(said: int, effort: Any, max_tokens: int, tokens: int) -> None:
    budget = thinking_budget(said, effort, {"low": 100}, 500, max_tokens, min_answer_tokens=50)
    assert budget.tokens == tokens
    clamped = said == -1 or (said or 0) > tokens
    assert budget.why.endswith("all but the 50 kept for the answer") == clamped


def test_an_effort_without_a_number() -> None:
    with pytest.raises(BadRequest, match="'high' has no budget here; low have"):
        thinking_budget(None, "high", {"low": 100}, 500, 1_000, 50)


# which size, and does it fit?


@pytest.mark.parametrize(
    ("model", "elastic", "size"),
    [
        ("nano", {}, None),
        ("nano:12b", {}, "12b"),
        ("nano", {"size": "12b"}, "12b"),
        ("nano:12b", {"size": "12b"}, "12b"),
    ],
)
def test_sizes_pinned(model: str, elastic: dict[str, Any], size: str | None) -> None:
    assert size_of(chat(model=model, elastic=elastic), "nano", ["30b", "12b"]) == size


def test_names_with_colons() -> None:
    assert size_of(chat(model="a/b:c"), "a/b:c", ["12b"]) is None
    assert size_of(chat(model="a/b:c:12b"), "a/b:c", ["12b"]) == "12b"


@pytest.mark.parametrize(
    ("model", "elastic", "param", "status"),
    [
        ("other", {}, "model", 404),
        ("nano:7b", {}, "model", 404),
        ("nano:", {}, "model", 404),
        ("other:12b", {}, "model", 404),
        ("nano", {"size": "7b"}, "elastic.size", 400),
        ("nano:12b", {"size": "30b"}, "elastic.size", 400),
    ],
)
def test_sizes_refused(model: str, elastic: dict[str, Any], param: str, status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        size_of(chat(model=model, elastic=elastic), "nano", ["30b", "12b"])
    assert (caught.value.param, caught.value.status) == (param, status)


def test_the_answer_fits_the_context() -> None:
    assert check_fits(chat(max_tokens=10), 990, LIMITS) == 10
    assert check_fits(chat(), 990, LIMITS) == 10
    for request, prompt in [(chat(max_tokens=11), 990), (chat(), 1_000), (chat(), 2_000)]:
        with pytest.raises(BadRequest) as caught:
            check_fits(request, prompt, LIMITS)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"499": 1, "500": 1}}, "logit_bias"),
        ({"stop_token_ids": [500]}, "stop_token_ids"),
        ({"prompt": [[1], [2, 500]]}, "prompt"),
        ({"logprobs": 4, "max_tokens": 501, "n": 2}, "logprobs"),
    ],
)
def test_what_the_model_does_not_have(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_fits(completion(**fields), 2, LIMITS)
    assert caught.value.param == param


def test_logprobs_are_bounded_by_what_they_cost() -> None:
    assert check_fits(completion(logprobs=4, max_tokens=500, n=2), 2, LIMITS) == 500
    assert check_fits(completion(max_tokens=900, n=100), 2, LIMITS) == 900


def test_answers_are_bounded_in_all() -> None:
    assert completion(prompt=["a"] * 64, n=2).answers == 128
    body = json.dumps({**COMPLETION, "prompt": ["a"] * 64, "n": 3}).encode()
    assert refused(body, CompletionRequest).param == "n"
