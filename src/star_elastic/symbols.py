"""The symbols of named shapes under a config: fields, ratios and aliases as numbers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from star_elastic.families import FAMILIES, Family
from star_elastic.shapes import parse

DEPTH = "num_hidden_layers"  # the axis of the brace {layer} in a weight's name


# Ten times the layers of the deepest models published, and more tensors than a trillion parameters
# have: a file can claim any number, and what it claims is spelled out name by name.
MAX_LAYERS = 2**10
MAX_TENSORS = 2**17
MAX_VALUE = 2**31  # of a width or count; what multiplies them stays exact in 64 bits
_STRIDES = {"decoder_sparse_step"}  # numbers that others are divided by


def check_raw(family: Family, values: Mapping[str, Any], alias: Mapping[str, str]) -> None:
    """Refuse numbers and lists that a stock config would choke on, before there is one.

    Args:
        values: as `config.json` has them; alias: the stock class's other names of its fields.

    Raises:
        ValueError: naming the field.
    """
    experts = family.experts or ""
    limits = {DEPTH: MAX_LAYERS, alias.get(experts, experts): MAX_TENSORS}
    for key, value in values.items():
        field = alias.get(key, key)
        if field in values and values[field] != value:
            raise ValueError(f"{key} and {field} name one field and differ")
        limit = limits.get(field, MAX_VALUE)
        if isinstance(value, int) and abs(value) > limit:
            raise ValueError(f"{key} = {str(value)[:40]} is beyond {limit}")
        if type(value) is int and value < 1 and field in _positive(family):
            raise ValueError(f"{key} = {value} is not an integer from 1 up")
        if isinstance(value, list | str) and len(value) > 4 * MAX_LAYERS:
            raise ValueError(f"{key} has {len(value)} values; at most {4 * MAX_LAYERS} are read")


def check_numbers(family: Family, config: Any) -> None:
    """Hold every number that a shape is made of to what a number of things can be.

    Raises:
        ValueError: naming the field and its value.
    """
    for field in sorted(_symbols(family)):
        value, least = _field(config, field), int(field in _positive(family))
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{field} = {repr(value)[:40]} is not an integer from {least} up")


def check_count(family: Family, config: Any, blocks: Sequence[tuple[str, ...]]) -> None:
    """Count the tensors before they are named one by one.

    Raises:
        ValueError: more than any model has.
    """
    if len(blocks) > MAX_LAYERS:
        raise ValueError(f"{DEPTH} = {len(blocks)} is beyond {MAX_LAYERS}")
    experts = getattr(config, family.experts, 0) if family.experts else 0
    several = [part for parts in blocks for part in parts]
    named = sum("{" in name for part in several for name in family.parts[part]) * experts
    if named > MAX_TENSORS:
        raise ValueError(
            f"{family.experts} = {experts} in {len(blocks)} layers: more than {MAX_TENSORS} tensors"
        )


def _positive(family: Family) -> set[str]:
    """Fields without which there is no model, or by which others are divided."""
    groups = {text.partition(" / ")[2] for text in family.derived.values()} - {""}
    return groups | _STRIDES | {"vocab_size", "hidden_size", "num_attention_heads", DEPTH}


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
