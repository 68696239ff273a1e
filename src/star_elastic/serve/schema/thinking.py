"""How long a model may think: one budget under all the names that servers give it.

It is never ignored: two names that disagree, a name in the wrong place and a name nobody knows are
errors that say what to write.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from star_elastic.serve.schema.errors import BadRequest, shown

CANONICAL = "thinking_token_budget"
UNLIMITED = -1
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_MAX_BUDGET, _MAX_DEPTH = 2**20, 16
_NAMES = (
    CANONICAL,
    "thinking_budget_tokens",
    "thinking_budget",
    "max_thinking_tokens",
    "reasoning.max_tokens",
    "thinking.budget_tokens",
)
_OBJECTS = {
    "reasoning": {"effort", "max_tokens", "exclude", "enabled"},
    "thinking": {"type", "budget_tokens"},
}
_FOLDED = (*_OBJECTS, *_NAMES)


def fold(data: Mapping[str, Any]) -> dict[str, Any]:
    """The request with all it says about thinking under the names that `Wanted` has.

    Besides the budget, OpenRouter's `reasoning` {effort, exclude, enabled} and Anthropic's
    `thinking` {type}; thinking that is turned off has a budget of 0. What else these objects hold
    is left, under the name with the dot.

    Raises:
        BadRequest: values that disagree, or are no budget; names that are misplaced or unknown.
    """
    _refuse_misplaced(data)
    said = {name: value for name in _NAMES if (value := _at(data, name)) is not None}
    for name, value in said.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < UNLIMITED:
            raise BadRequest(f"{name}: an integer of 0 or more, or -1; it is {shown(value)}", name)
        if value > _MAX_BUDGET:
            raise BadRequest(f"{name}: at most {_MAX_BUDGET}; it is {shown(value)}", name)
    said |= {name: 0 for name in _turned_off(data)}
    folded = {name: value for name, value in data.items() if name not in _FOLDED}
    efforts = {name: _at(data, name) for name in ("reasoning_effort", "reasoning.effort")}
    _agree(folded, CANONICAL, said)
    _agree(folded, "reasoning_effort", {k: v for k, v in efforts.items() if v is not None})
    if _at(data, "reasoning.exclude") is not None:
        excluded = _boolean(data, "reasoning.exclude")
        if folded.setdefault("include_reasoning", not excluded) == excluded:
            raise BadRequest("reasoning.exclude and include_reasoning disagree", "reasoning")
    for outer, known in _OBJECTS.items():
        rest = data.get(outer, {}).keys() - known
        folded |= {f"{outer}.{name}": data[outer][name] for name in sorted(rest)}
    return folded


def _at(data: Mapping[str, Any], name: str) -> Any:
    outer, _, inner = name.partition(".")
    if not inner:
        return data.get(outer)
    holder = data.get(outer, {})
    if not isinstance(holder, dict):
        raise BadRequest(f"{outer}: an object; it is {shown(holder)}", outer)
    return holder.get(inner)


def _boolean(data: Mapping[str, Any], name: str) -> bool:
    value = _at(data, name)
    if not isinstance(value, bool):
        raise BadRequest(f"{name}: true or false; it is {shown(value)}", name)
    return value


def _turned_off(data: Mapping[str, Any]) -> Iterator[str]:
    kind = _at(data, "thinking.type")
    if kind not in (None, "enabled", "disabled"):
        raise BadRequest(f'thinking.type: "enabled" or "disabled"; it is {shown(kind)}', "thinking")
    if kind == "disabled":
        yield "thinking.type"
    if _at(data, "reasoning.enabled") is not None and not _boolean(data, "reasoning.enabled"):
        yield "reasoning.enabled"


def _agree(folded: dict[str, Any], name: str, said: Mapping[str, Any]) -> None:
    """One value for all that was said.

    Raises:
        BadRequest: two that disagree, naming both.
    """
    for (first, value), (other, another) in zip(said.items(), [*said.items()][1:], strict=False):
        if value != another:
            raise BadRequest(
                f"{first} ({shown(value)}) and {other} ({shown(another)}) disagree", other
            )
    for value in said.values():
        folded[name] = value


def _refuse_misplaced(data: Mapping[str, Any], where: str = "", depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise BadRequest(f"{where[:80]}: objects nested deeper than {_MAX_DEPTH}")
    for name, value in data.items():
        path = f"{where}{name}"
        if path not in _NAMES and _looks_like_a_budget(name):
            path = path[:160]
            raise BadRequest(
                f"{path}: no budget of thinking is read here; write {CANONICAL} at the root of "
                "the request",
                path,
                code="unsupported_parameter",
            )
        if isinstance(value, dict):
            _refuse_misplaced(value, f"{path}.", depth + 1)


def _looks_like_a_budget(name: str) -> bool:
    name = name.lower()
    thinks = "think" in name or "reason" in name
    return thinks and ("budget" in name or "tokens" in name) or name == "budget_tokens"


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """Tokens that the reasoning may have, and where the number is from."""

    tokens: int
    why: str


def thinking_budget(
    said: int | None,
    effort: Effort | None,
    efforts: Mapping[str, int],
    default: int,
    max_tokens: int,
    min_answer_tokens: int,
) -> ThinkingBudget:
    """What was said outright, else by its effort, else the model's default; -1 is no limit.

    It counts inside `max_tokens`, of which the last `min_answer_tokens` are the answer's.

    Raises:
        BadRequest: an effort for which the operator has no number.
    """
    if said is not None:
        tokens, why = said, CANONICAL
    elif effort is not None:
        if effort not in efforts:
            known = ", ".join(efforts)
            raise BadRequest(
                f"reasoning_effort: {effort!r} has no budget here; {known} have", "reasoning_effort"
            )
        tokens, why = efforts[effort], f"reasoning_effort {effort}"
    else:
        tokens, why = default, "the model's default"
    room = max(0, max_tokens - min_answer_tokens)
    if tokens == UNLIMITED or tokens > room:
        return ThinkingBudget(room, f"{why}, all but the {min_answer_tokens} kept for the answer")
    return ThinkingBudget(tokens, why)
