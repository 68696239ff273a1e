"""The symbols of named shapes under a config: fields, ratios and aliases as numbers."""

import re
from collections.abc import Mapping
from typing import Any

from star_elastic.families import FAMILIES, Family
from star_elastic.shapes import parse

DEPTH = "num_hidden_layers"  # the axis of the brace {layer} in a weight's name


def family_of(config: Any) -> Family:
    """The table of a config's `model_type`.

    Raises:
        ValueError: no table for this model type.
    """
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"config.json: model_type {config.model_type!r} has no table; known: {known}"
        ) from None


def resolve(family: Family, config: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """All symbols of a family under a config, some fields replaced. Fields set to none are absent.

    Raises:
        ValueError: a ratio that does not divide (heads that do not fill their groups).
    """
    sizes = {symbol: _field(config, symbol) for symbol in _symbols(family)}
    sizes = {symbol: value for symbol, value in sizes.items() if value is not None}
    sizes |= fields
    for symbol, text in family.derived.items():
        whole, _, groups = text.partition(" / ")
        if whole not in sizes:  # an alias, or an axis this model does not have
            continue
        values = sizes[whole] if isinstance(sizes[whole], list) else [sizes[whole]]
        for value in values:
            if value % sizes[groups]:
                raise ValueError(
                    f"{whole} = {value} does not divide into {groups} = {sizes[groups]} groups"
                )
        ratios = [value // sizes[groups] for value in values]
        sizes[symbol] = ratios if isinstance(sizes[whole], list) else ratios[0]
    return sizes


def head_dim(config: Any) -> int:
    """Width of an attention head. Some configs leave it out; a submodel keeps its parent's."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def symbol_of(family: Family, field: str) -> str:
    """The symbol that shrinks with an axis: `num_attention_heads` shrinks `queries`."""
    for symbol, text in family.derived.items():
        if text.startswith(f"{field} / "):
            return symbol
    return field


def _field(config: Any, field: str) -> Any:
    return head_dim(config) if field == "head_dim" else getattr(config, field, None)


def _symbols(family: Family) -> set[str]:
    texts = [text for part in family.parts.values() for text in part.values()]
    texts += family.outside.values()
    texts += [text for part in family.cache.values() for text in part.values()]
    named = {symbol for text in texts for dim in parse(text) for seg in dim for symbol in seg}
    ratios = {name for text in family.derived.values() for name in re.split(r" / | or ", text)}
    return {s for s in named | ratios | set(family.axes) if not s.isdigit()} - set(family.derived)
