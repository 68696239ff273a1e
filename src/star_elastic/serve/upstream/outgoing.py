"""The body that a server behind is sent: what the request says, under the names that vLLM reads.

It is written from the request as it was read, not from the client's bytes: one reading decides
what was asked, and a field that nobody checked reaches no server.
"""

from typing import Any

from star_elastic.serve.answers import Asked
from star_elastic.serve.schema import ChatRequest

BUDGET = "thinking_token_budget"  # vLLM's; others may not know it, and then ignore it
# Read here and answered here. An effort was turned into a budget of tokens.
_OURS = {
    "elastic",
    "include_reasoning",
    "max_completion_tokens",
    "max_tokens",
    "model",
    "priority",
    "reasoning_effort",
    "stream",
    "stream_options",
    BUDGET,
}


def path_of(asked: Asked) -> str:
    """Where it is posted, below the server's address."""
    chat = isinstance(asked.request, ChatRequest)
    return "/v1/chat/completions" if chat else "/v1/completions"


def body_of(
    asked: Asked,
    model: str,
    confidence: bool,
    context_tokens: int | None = None,
    budget: bool = True,
) -> dict[str, Any]:
    """A streamed request with a count of its tokens.

    Args:
        model: its id at that server.
        confidence: ask for the log probability of every token, though the client did not.
        context_tokens: what that server's model holds, if it says so.
        budget: whether a budget of thinking may be sent.
    """
    request = asked.request
    body = request.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude=_OURS)
    body |= {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body["max_tokens"] = _max_tokens(asked, context_tokens)
    if request.priority:
        body["priority"] = request.priority
    if asked.salt:
        body["cache_salt"] = asked.salt
    if confidence and request.top is None:
        body["logprobs"] = True if isinstance(request, ChatRequest) else 0
    if asked.thinking is not None and budget:
        body[BUDGET] = asked.thinking.tokens
    if asked.thinking is not None and asked.thinking.tokens == 0:
        # the template was told so here, where nobody said otherwise
        body["chat_template_kwargs"] = {"enable_thinking": False} | body.get(
            "chat_template_kwargs", {}
        )
    return body


def _max_tokens(asked: Asked, context_tokens: int | None) -> int:
    """As asked; if nothing was, all that fits here and there."""
    if asked.request.max_output_tokens is not None or context_tokens is None:
        return asked.max_tokens
    left = context_tokens - max(map(len, asked.prompts))
    return max(1, min(asked.max_tokens, left))


def says_budget(asked: Asked) -> bool:
    """Whether the client itself said how much may be thought."""
    said = asked.request.thinking_token_budget, asked.request.reasoning_effort
    return any(each is not None for each in said)
