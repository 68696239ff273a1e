"""What a submodel costs, the numbers people write, the sizes on offer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, SMALL, layout_of
from pydantic import ValidationError

from star_elastic.budget import (
    LatencyTable,
    Metric,
    choices,
    parse_bytes,
    parse_count,
    parse_field,
    parse_milliseconds,
    parse_tokens,
    value_on,
)
from star_elastic.submodel import check_fields

METRICS = [
    Metric(kind="params"),
    Metric(kind="active"),
    Metric(kind="memory", context=100, batch=3, dtype="float32"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_what_the_layout_counts(family: str) -> None:
    layout = layout_of(family)
    for fields in ({}, SMALL[family]):
        sizes = layout.sizes_of(fields)
        params, active, memory = (metric.cost(layout, sizes) for metric in METRICS)
        assert params == layout.count(sizes) and active == layout.count_active(sizes)
        assert memory == layout.memory(100, 3, sizes, "float32")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.kind)
def test_costs_have_the_gradient_of_a_finite_difference(metric: Metric) -> None:
    layout = layout_of("nemotron_h")
    width = torch.tensor(28.0, dtype=torch.float64, requires_grad=True)
    metric.cost(layout, layout.sizes | {"hidden_size": width}).backward()
    above, below = (
        metric.cost(layout, layout.sizes_of({"hidden_size": width})) for width in (29, 27)
    )
    assert width.grad is not None and width.grad.item() == pytest.approx((above - below) / 2)


def test_a_metric_round_trips_through_json() -> None:
    table = LatencyTable(
        device="d",
        dtype="float32",
        mode="decode",
        batch=1,
        context=8,
        axes={"hidden_size": [24, 32]},
        milliseconds=[1.0, 2.5],
    )
    for metric in (*METRICS, Metric(kind="latency", table=table)):
        assert Metric.model_validate_json(metric.model_dump_json()) == metric
    with pytest.raises(ValidationError, match="table: latency needs one"):
        Metric(kind="latency")
    with pytest.raises(ValidationError, match="table: latency needs one"):
        Metric(kind="params", table=table)


def test_metrics_speak_to_people() -> None:
    assert METRICS[0].amount(17_000_000) == "17,000,000 parameters"
    assert METRICS[2].amount(3 * 2**30) == "3.00 GiB" and METRICS[2].amount(100) == "100 B"
    assert METRICS[2].describe() == "memory at context 100, batch 3, float32"


@pytest.mark.parametrize(
    ("parse", "text", "number"),
    [
        (parse_count, "17B", 17_000_000_000),
        (parse_count, "2.5b", 2_500_000_000),
        (parse_count, "350M", 350_000_000),
        (parse_count, "1_000_000", 1_000_000),
        (parse_bytes, "24GiB", 24 * 2**30),
        (parse_bytes, "24 GB", 24 * 10**9),
        (parse_bytes, "1.5kib", 1536),
        (parse_tokens, "32k", 32768),
        (parse_tokens, "4096", 4096),
        (parse_milliseconds, "20", 20.0),
        (parse_milliseconds, "0.5ms", 0.5),
        (parse_milliseconds, "1.5s", 1500.0),
    ],
)
def test_numbers_as_people_write_them(parse, text: str, number: float) -> None:
    assert parse(text, "--flag") == number


@pytest.mark.parametrize("parse", [parse_count, parse_bytes, parse_tokens, parse_milliseconds])
@pytest.mark.parametrize("text", ["", "many", "-3", "1e9", "17Q", "1.B", "nan", "0B", "9" * 99])
def test_other_numbers_are_one_line_that_names_flag_and_value(parse, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text, "--flag")
    assert f"--flag {text}: " in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_without_a_unit_are_refused() -> None:
    with pytest.raises(ValueError, match="--memory 24: not a number of memory, such as 24GiB"):
        parse_bytes("24", "--memory")


def test_fields_as_flags() -> None:
    assert parse_field("hidden_size=96", "--set") == ("hidden_size", 96)
    with pytest.raises(ValueError, match="--set hidden_size: not of the form field=number"):
        parse_field("hidden_size", "--set")


@given(st.integers(1, 10**12))
def test_plain_counts_are_exact(number: int) -> None:
    assert parse_count(str(number), "--params") == number
    assert parse_count(f"{number:_}", "--params") == number


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_fill_the_range_in_steps_that_groups_allow(family: str) -> None:
    layout = layout_of(family)
    declared = {field: [value] for field, value in SMALL[family].items()}
    offered = choices(layout, declared, {"hidden_size": 4})
    assert offered["hidden_size"] == [24, 28, 32]
    heads = layout.sizes["num_key_value_heads"]
    for field, values in offered.items():
        assert values[0] == SMALL[family][field] and values[-1] == layout.sizes[field]
        assert values == sorted(set(values))
        for value in values:
            check_fields(layout, {**SMALL[family], field: value})
    assert all(value % heads == 0 for value in offered["num_attention_heads"])


def test_choices_keep_what_was_declared_and_name_what_cannot_be() -> None:
    layout = layout_of("llama")
    assert choices(layout, {"hidden_size": [25]}, {"hidden_size": 8})["hidden_size"] == [25, 32]
    with pytest.raises(ValueError, match="vocab_size is no axis"):
        choices(layout, {"vocab_size": [8]})
    with pytest.raises(ValueError, match="hidden_size = 0 is not a positive"):
        choices(layout, {"hidden_size": [24]}, {"hidden_size": 0})


def test_the_value_on_an_axis_comes_from_the_symbols_that_shapes_use() -> None:
    layout = layout_of("nemotron_h")
    sizes = layout.sizes_of(SMALL["nemotron_h"])
    for field, value in SMALL["nemotron_h"].items():
        assert value_on(layout, sizes, field) == value
    chance = torch.full((6,), 0.5, requires_grad=True)
    soft = layout.sizes | {"layer": list(chance), "queries": torch.tensor(3.0)}
    assert value_on(layout, soft, "num_hidden_layers").item() == 3
    assert value_on(layout, soft, "num_attention_heads").item() == 6


def test_of_values_per_layer_it_is_the_mean_over_layers_that_have_the_axis() -> None:
    layout = layout_of("nemotron_h")  # MEM*-E: experts in layers 1 and 5
    widths = [1, 8, 1, 1, 1, 16]
    assert (
        value_on(
            layout, layout.sizes_of({"moe_intermediate_size": widths}), "moe_intermediate_size"
        )
        == 12
    )
    top_k = [1, 2, 1, 1, 1, 1]
    assert math.isclose(
        value_on(layout, layout.sizes_of({"num_experts_per_tok": top_k}), "num_experts_per_tok"),
        1.5,
    )
