"""Slips in a recipe, told so that they are found at once: the path, the value, the closest key."""

import difflib
from typing import Any

from pydantic import ValidationError

_SCALARS = ("str", "int", "float")  # pydantic names the members of unions in its paths


def put(values: Any, path: list[str], value: Any) -> None:
    """Set the value at a path of keys, as `--set` names it.

    Raises:
        TypeError, IndexError: no such path.
    """
    key, *rest = path
    if isinstance(values, list):
        if not key.isdigit():
            raise TypeError(f"{key} is no number of a list of {len(values)}")
        place: Any = int(key)
    elif isinstance(values, dict):
        place = key
        values.setdefault(key, {})
    else:
        raise TypeError(f"{key}: what holds it is not a mapping")
    if rest:
        put(values[place], rest, value)
    else:
        values[place] = value


def first_line(error: ValidationError, model: Any) -> str:
    """The error that most likely is the slip, in one line: path, value, and the closest key."""
    errors = error.errors()  # a misspelt key that is required is missing, too: say the misspelling
    deepest = max(errors, key=lambda error: len(error["loc"]))  # of a union: the likeliest meant
    first = next((e for e in errors if e["type"] == "extra_forbidden"), deepest)
    loc = [str(part) for part in first["loc"]]
    where = ".".join(part for part in loc if "[" not in part and part not in _SCALARS)
    if first["type"] == "value_error":  # our own words
        return f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    if first["type"] != "extra_forbidden":
        return f"{where or 'recipe'}: {first['msg']} (got {first['input']!r:.80})"
    known = _keys_beside(model, first["loc"])
    close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0)
    return f"{where}: unknown key; did you mean {close[0]!r}?"


def _keys_beside(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """The keys of the (inner) model in which the last part of a path is unknown."""
    for part in path[:-1]:
        fields = getattr(model, "model_fields", {})
        if part in fields:
            model = _model_in(fields[str(part)].annotation)
    return list(model.model_fields)


def _model_in(annotation: Any) -> Any:
    """The strict model that an annotation mentions: `Init | None`, `list[Stage]`, ..."""
    if hasattr(annotation, "model_fields"):
        return annotation
    inner = (_model_in(each) for each in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model is not None), None)
