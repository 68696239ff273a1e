"""Stock transformers configs: read from JSON, shrunk to a size, written for every reader.

Needs no torch, so that cutting files does not. One fault of stock classes is worked round here:
`save_pretrained` drops the legacy layer pattern that older readers want; `config_json` does not.
"""

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from star_elastic.families import FAMILIES
from star_elastic.folder import one_line
from star_elastic.layout import Layout
from star_elastic.submodel import Fields, per_layer
from star_elastic.symbols import DEPTH, head_dim

_SMALLEST_STEP, _LARGEST_STEP = 1e-30, 3e38


def read_config(values: Mapping[str, Any]) -> Any:
    """The stock config of a `config.json`, whose code, if it names any, is not run.

    Raises:
        ValueError: a model type without a table, or values that the stock class refuses.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type {str(kind)[:80]!r} has no table; known: {known}")
    kept = {
        key: value for key, value in values.items() if key not in ("auto_map", "elastic_config")
    }
    try:
        stock = CONFIG_MAPPING[kind]
        return stock.from_dict(stock._decode_special_floats(kept))  # infinity, as it writes it
    except Exception as error:  # strict configs raise their own kinds
        raise ValueError(one_line(error)) from None


def child_config(layout: Layout, fields: Fields) -> Any:
    """The parent's config with some fields replaced, checked by the stock class.

    Raises:
        ValueError: the stock class cannot express this size.
    """
    config = layout.config
    if uneven := per_layer(fields):
        raise ValueError(
            f"{type(config).__name__} cannot express {min(uneven)} per layer; views can"
        )
    values = config.to_dict()
    values.pop("elastic_config", None)
    values["head_dim"] = head_dim(config)  # else a stock class derives it from the smaller widths
    alias = getattr(type(config), "attribute_map", {})
    values |= {alias.get(field, field): value for field, value in fields.items() if field != DEPTH}
    if DEPTH in fields:
        kept = layout.kept_layers(layout.sizes_of(fields))
        values |= layout.family.depth(config, kept)
    try:
        child = type(config).from_dict(values)
    except Exception as error:  # strict configs raise their own kinds
        reason = str(error).strip().splitlines()[-1]
        kind = type(config).__name__
        raise ValueError(f"{kind} cannot express {dict(fields)}: {reason}") from None
    child._attn_implementation = config._attn_implementation
    child._experts_implementation = config._experts_implementation
    return child


def config_json(config: Any) -> dict[str, Any]:
    """`config.json` that stock classes, old readers and other engines read alike."""
    values = config.to_dict()
    values.pop("_name_or_path", None)
    values.pop("elastic_config", None)
    values.pop("auto_map", None)  # remote code does not travel, and is never run
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    for published, inner in type(config).attribute_map.items():
        if inner in values and isinstance(values[inner], int):  # to_dict knows the inner name only
            values[published] = values[inner]
    if config.model_type == "nemotron_h":
        values["hybrid_override_pattern"] = config.hybrid_override_pattern
        values["num_hidden_layers"] = config.num_hidden_layers
        low, high = config.time_step_limit
        # Read by the stock mixer as the lower clamp of dt; otherwise only used to draw an initial
        # dt_bias. 0 would break that draw (log 0), and no softplus in fp32 falls below 1e-30.
        values["time_step_min"] = max(low, _SMALLEST_STEP)
        values.pop("time_step_limit")
        if (low, high) != (0.0, float("inf")):  # the default; infinity has no spelling in JSON
            values["time_step_limit"] = [low, min(high, _LARGEST_STEP)]
    return values
