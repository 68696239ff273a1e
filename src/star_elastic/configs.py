"""Stock transformers configs: read from JSON, shrunk to a size, written for every reader.

Needs no torch, so that cutting files does not. One fault of stock classes is worked round here:
`save_pretrained` drops the legacy layer pattern that older readers want; `config_json` does not.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from star_elastic.dtypes import ITEMSIZE
from star_elastic.families import FAMILIES
from star_elastic.folder import one_line
from star_elastic.layout import Layout
from star_elastic.submodel import Fields, per_layer
from star_elastic.symbols import DEPTH, check_numbers, check_raw, head_dim

_NOT_READ = {
    "auto_map",
    "custom_pipelines",
    "elastic_config",
    "transformers_weights",
    "attn_implementation",
    "experts_implementation",
    "id2label",  # what classifiers have
    "label2id",
    "num_labels",
}
_SMALLEST_STEP, _LARGEST_STEP = 1e-30, 3e38


def read_config(values: Mapping[str, Any]) -> Any:
    """The stock config of a `config.json`, whose code, if it names any, is not run.

    Raises:
        ValueError: a model type without a table, or values that the stock class or a shape refuses.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type {str(kind)[:80]!r} has no table; known: {known}")
    stock = CONFIG_MAPPING[kind]
    kept = {key: value for key, value in values.items() if _is_read(stock, key)}
    check_raw(FAMILIES[kind], kept, stock.attribute_map)
    _check_lists(kept)
    for key in ("dtype", "torch_dtype"):
        if kept.get(key) is not None and str(kept[key]) not in ITEMSIZE:
            raise ValueError(f"{key} {str(kept[key])[:80]!r} is no dtype of weights")
    try:
        config = stock.from_dict(stock._decode_special_floats(kept))  # infinity, as it writes it
    except Exception as error:  # strict configs raise their own kinds
        raise ValueError(one_line(error)) from None
    if (said := kept.get(DEPTH)) is not None and said != config.num_hidden_layers:
        raise ValueError(f"{DEPTH} = {said}, but {config.num_hidden_layers} layers are listed")
    check_numbers(FAMILIES[kind], config)
    return config


def _is_read(stock: Any, key: str) -> bool:
    """Stock configs set any key as an attribute: their methods, tables and privates are not for it.

    Nor is where weights and code come from, or which kernels run.
    """
    if key in _NOT_READ or key.startswith("_") or key.endswith("_file"):
        return False
    fields = {field.name for field in dataclasses.fields(stock)}
    own = {*fields, *stock.attribute_map, "model_type"}
    there = inspect.getattr_static(stock, key, None)
    return key in own or there is None or isinstance(there, property)


def _check_lists(values: Mapping[str, Any]) -> None:
    """Lists that no stock class checks."""
    pattern = str(values.get("hybrid_override_pattern") or "")
    if strange := {*pattern} - {*"M*E-"}:
        raise ValueError(f"hybrid_override_pattern: no layer is {min(strange)!r}")
    if values.get("per_layer_config"):
        raise ValueError("per_layer_config: layers of different configs have no table")
    limits = values.get("time_step_limit", [0, 1])
    if isinstance(limits, list) and len(limits) != 2:
        raise ValueError(f"time_step_limit has {len(limits)} values, not 2")


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
