"""A request's body to a model of it: JSON without its loopholes, then field by field.

What is unknown is not refused, as clients of the OpenAI API send more than any server knows (vLLM
lets it pass too, with a line in its log). It is named in the answer's `elastic.ignored`, so that
the caller can tell. What would change the answer and is not offered here is refused: nobody who
asked for JSON or for tools gets prose instead. A misplaced budget of thinking is refused too.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from star_elastic.serve.schema.errors import BadRequest, FieldError, shown
from star_elastic.serve.schema.requests import Known, Message
from star_elastic.serve.schema.thinking import fold

MAX_BYTES = 8 * 2**20
_MAX_OBJECTS, _MAX_KEYS, _MAX_IGNORED = 2**15, 2**12, 32
_ANY = ()  # no value of it is harmless
# Fields that this server does not offer -> their values that ask for nothing
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": _ANY,
    "prediction": _ANY,
    "web_search_options": _ANY,
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": _ANY,
    "prompt_logprobs": _ANY,
    "prompt_embeds": _ANY,
    "structured_outputs": _ANY,
    "guided_json": _ANY,
    "guided_regex": _ANY,
    "guided_choice": _ANY,
    "guided_grammar": _ANY,
    "chat_template": _ANY,  # templates come from the operator's checkpoint only
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": _ANY,
}
Request = TypeVar("Request", bound=Known)


def read(kind: type[Request], body: bytes, max_bytes: int = MAX_BYTES) -> tuple[Request, list[str]]:
    """The request, and the names of the fields that were ignored.

    A null is as good as nothing said.

    Raises:
        BadRequest: naming the field and its value.
    """
    data = {name: value for name, value in _parse(body, max_bytes).items() if value is not None}
    data = fold(data)
    for name, harmless in _NOT_OFFERED.items():
        if name in data and data[name] not in harmless:
            raise BadRequest(
                f"{name}: this server does not offer it", name, code="unsupported_parameter"
            )
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _first(error) from None
    return request, _ignored(kind, data)


def _parse(body: bytes, max_bytes: int) -> dict[str, Any]:
    if len(body) > max_bytes:
        raise BadRequest(
            f"the body has {len(body)} bytes; at most {max_bytes} are read", status=413
        )
    try:
        text = body.decode()  # bytes would be read as UTF-16 too, and with half pairs
        data = json.loads(text, object_pairs_hook=_Objects(), parse_constant=_constant)
        if b"\\ud" in body.lower():
            json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError:
        raise BadRequest("the body is nested too deep", code="invalid_json") from None
    except ValueError as error:
        raise BadRequest(f"the body is not read: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise BadRequest(f"the body is {shown(data)}, not an object", code="invalid_json")
    return data


class _Objects:
    """Counts the objects of a body, and gives up early on those that would take long."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self._count += 1
        if self._count > _MAX_OBJECTS:
            raise ValueError(f"more than {_MAX_OBJECTS} objects")
        if len(pairs) > _MAX_KEYS:
            raise ValueError(f"an object of more than {_MAX_KEYS} keys")
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key comes twice in one object")
        return made


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _first(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    steps = [*first["loc"], *([cause.field] if isinstance(cause, FieldError) else [])]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:80]}" for step in steps)
    param = path.removeprefix(".")
    if first["type"] == "missing":
        return BadRequest(f"{param}: it is required", param, code="missing_required_parameter")
    if cause is not None:
        return BadRequest(f"{param}: {cause}", param)
    return BadRequest(f"{param}: {first['msg']}; it is {shown(first['input'])}", param)


def _ignored(kind: type[Known], data: Mapping[str, Any]) -> list[str]:
    known = {*kind.model_fields, *_NOT_OFFERED}
    names = [name for name in data if name not in known]
    messages = data.get("messages") if "messages" in kind.model_fields else None
    inner = {name for message in messages or () for name in message} - Message.model_fields.keys()
    names += [f"messages[].{name}" for name in sorted(inner)]
    return [name[:80] for name in names[:_MAX_IGNORED]]
