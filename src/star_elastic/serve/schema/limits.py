"""A request held against what is served here: which model and size, and does it fit?"""

from collections.abc import Collection
from dataclasses import dataclass

from star_elastic.serve.schema.errors import BadRequest, shown
from star_elastic.serve.schema.requests import Wanted


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may take: the model's, and the operator's.

    `logprobs` bounds the (token, log probability) pairs of all answers together: they are kept
    until the answer is sent, and tokens times alternatives is what they cost.
    """

    context_tokens: int
    vocab_size: int
    logprobs: int = 2**20


def size_of(request: Wanted, served: str, sizes: Collection[str]) -> str | None:
    """The size that the request pins, by `model` ("name:12b") or `elastic.size`; None if neither.

    Raises:
        BadRequest: another model (404), a size that is not served, two sizes that disagree.
    """
    pinned = None
    if request.model != served:
        name, _, pinned = request.model.rpartition(":")
        if name != served or pinned not in sizes:
            known = ", ".join([served, *(f"{served}:{size}" for size in sizes)])
            raise BadRequest(
                f"model: {shown(request.model)} is not served here; these are: {known}",
                "model",
                code="model_not_found",
                status=404,
            )
    asked = request.elastic.size
    if asked is None:
        return pinned
    if asked not in sizes:
        raise BadRequest(
            f"elastic.size: {shown(asked)} is not served; {', '.join(sizes)} are", "elastic.size"
        )
    if pinned is not None and asked != pinned:
        raise BadRequest(f"elastic.size: {asked}, but model pins {pinned}", "elastic.size")
    return asked


def check_fits(request: Wanted, prompt_tokens: int, limits: Limits) -> int:
    """The most tokens that each answer may have: what was asked for, else all that is left.

    Args:
        prompt_tokens: of the longest prompt.

    Raises:
        BadRequest: prompt and answer exceed the context; a token id the model does not have; more
            log probabilities than are kept.
    """
    left = limits.context_tokens - prompt_tokens
    asked = request.max_output_tokens
    if left < 1 or (asked or 1) > left:
        raise BadRequest(
            f"the prompt has {prompt_tokens} tokens and the answer may have {asked or 1}; "
            f"together at most {limits.context_tokens} fit",
            "messages" if "messages" in type(request).model_fields else "prompt",
            code="context_length_exceeded",
        )
    _check_ids(request, limits.vocab_size)
    most = left if asked is None else asked
    if request.top is not None and (request.top + 1) * most * request.answers > limits.logprobs:
        raise BadRequest(
            f"logprobs: {request.answers} answers of {most} tokens with {request.top + 1} each; at "
            f"most {limits.logprobs} are kept, so ask for fewer tokens",
            "logprobs",
        )
    return most


def _check_ids(request: Wanted, vocab_size: int) -> None:
    named = {"logit_bias": request.logit_bias, "stop_token_ids": request.stop_token_ids}
    prompts = getattr(request, "prompt", [])
    named["prompt"] = [n for ids in prompts if not isinstance(ids, str) for n in ids]
    for field, ids in named.items():
        if (largest := max(ids, default=0)) >= vocab_size:
            raise BadRequest(
                f"{field}: token id {largest}; this model has {vocab_size} tokens", field
            )
