"""Tables of measured latency: what they say between their points, and how they come about."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SMALL, elastic, layout_of
from pydantic import ValidationError

from star_elastic.budget import LatencyTable, Metric
from star_elastic.folder import CheckpointError
from star_elastic.latency import load, measure, save, spot_grid

AXES = {"hidden_size": [16, 24, 32], "num_attention_heads": [4, 8], "num_hidden_layers": [1, 2]}
TIMES = [1.0, 1.5, 1.25, 2.0, 2.0, 2.75, 2.5, 4.0, 3.0, 4.5, 3.5, 6.0]
LAYOUT = layout_of("llama")


def table_of(axes: dict[str, list[int]] = AXES, times: list[float] = TIMES) -> LatencyTable:
    return LatencyTable(
        device="d",
        dtype="float32",
        mode="decode",
        batch=1,
        context=8,
        axes=axes,
        milliseconds=times,
    )


def at(fields: dict[str, int]) -> float:
    return table_of().at(LAYOUT, LAYOUT.sizes_of(fields))


def test_it_is_exact_at_its_points() -> None:
    for values, time in zip(itertools.product(*AXES.values()), TIMES, strict=True):
        assert at(dict(zip(AXES, values, strict=True))) == time


@given(st.integers(16, 32), st.sampled_from([4, 6, 8]), st.sampled_from([1, 2]))
def test_between_points_it_is_the_mean_of_the_corners_weighted(
    hidden: int, heads: int, layers: int
) -> None:
    low = 0 if hidden < 24 else 1
    share = (hidden - AXES["hidden_size"][low]) / 8
    expected = 0.0
    for up, more in itertools.product((0, 1), (0, 1)):
        weight = (share if up else 1 - share) * ((heads - 4) / 4 if more else (8 - heads) / 4)
        expected += weight * TIMES[4 * (low + up) + 2 * more + layers - 1]
    fields = dict(hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers)
    assert at(fields) == pytest.approx(expected, rel=1e-12)


def test_outside_it_is_flat() -> None:
    assert at({"hidden_size": 8, "num_attention_heads": 4}) == at(
        {"hidden_size": 16, "num_attention_heads": 4}
    )


def test_it_is_differentiable_and_depth_is_the_layers_that_are_there() -> None:
    width = torch.tensor(20.0, requires_grad=True)
    there = torch.tensor([1.0, 0.5], requires_grad=True)
    sizes = LAYOUT.sizes | {"hidden_size": width, "layer": list(there)}
    time = table_of().at(LAYOUT, sizes)
    time.backward()
    # 8 heads: (16, 1 layer) 1.25, (16, 2) 2.0, (24, 1) 2.5, (24, 2) 4.0
    assert time.item() == pytest.approx((1.25 + 2.0 + 2.5 + 4.0) / 4)
    assert width.grad is not None and there.grad is not None
    assert width.grad.item() == pytest.approx(((2.5 + 4.0) - (1.25 + 2.0)) / 2 / 8)
    assert there.grad.tolist() == pytest.approx([((2.0 - 1.25) + (4.0 - 2.5)) / 2] * 2)


def test_it_is_a_metric() -> None:
    metric = Metric(kind="latency", table=table_of())
    assert metric.cost(LAYOUT, LAYOUT.sizes) == TIMES[-1]
    assert metric.amount(6.0) == "6 ms" and "decode" in metric.describe()


def test_it_comes_back_from_json(tmp_path: Path) -> None:
    save(table_of(), tmp_path / "latency.json")
    assert load(tmp_path / "latency.json", LAYOUT) == table_of()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mode": "both"}, "mode: "),
        ({"batch": 0}, "batch: "),
        ({"spare": 1}, "spare: "),
        ({"milliseconds": [1.0]}, "milliseconds: 1 values for 12 points"),
        ({"milliseconds": [-1.0] * 12}, "milliseconds: -1.0 is no time"),
        ({"milliseconds": [1.0] * 11 + ["2"]}, "milliseconds.11: "),
        ({"axes": {"hidden_size": [32, 16]}}, "not positive and ascending"),
        ({"axes": {"vocab_size": [1], "hidden_size": list(range(1, 13))}}, "vocab_size is no axis"),
        ({"axes": {"hidden_size": list(range(30, 42))}}, "larger than the parent's 32"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(table_of().model_dump() | change))
    with pytest.raises(CheckpointError) as caught:
        load(path, LAYOUT)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and complaint in message and "\n" not in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="latency.json: no such file"):
        load(tmp_path / "latency.json", LAYOUT)


def test_no_time_is_infinite() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        table_of({"hidden_size": [32]}, [float("inf")])


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_measuring_times_every_point_of_the_grid(mode: Any) -> None:
    model = elastic("nemotron_h")
    axes = {"hidden_size": [32, 24], "num_hidden_layers": [5, 6]}
    told = []
    table = measure(model, axes, mode, 2, 5, repeats=2, on_point=lambda *n: told.append(n))
    assert table.axes == {"hidden_size": [24, 32], "num_hidden_layers": [5, 6]}
    assert len(table.milliseconds) == 4 and min(table.milliseconds) > 0
    assert (table.mode, table.batch, table.context, table.dtype) == (mode, 2, 5, "float32")
    assert told == [(n, 8) for n in range(1, 9)]
    assert table.at(model.layout, model.layout.sizes) == table.milliseconds[-1]


def test_a_grid_too_large_says_which_axes_to_thin() -> None:
    axes = {
        "intermediate_size": [23, 24],
        "hidden_size": list(range(1, 33)),
        "num_hidden_layers": [1, 2],
        "num_attention_heads": [2, 4, 6],
    }
    with pytest.raises(ValueError, match=r"256 points; thin hidden_size \(32 choices\), num_att"):
        measure(elastic("llama"), axes)
    with pytest.raises(ValueError, match="no axis to time"):
        measure(elastic("llama"), {})
    with pytest.raises(ValueError, match="latency: hidden_size = 64 is larger"):
        measure(elastic("llama"), {"hidden_size": [64]})


def test_a_grid_nobody_chose_is_small_and_keeps_the_ends() -> None:
    layout = layout_of("nemotron_h")
    offered = {field: [value, layout.sizes[field]] for field, value in SMALL["nemotron_h"].items()}
    grid = spot_grid(layout, offered)
    assert len(grid) == 6 and "hidden_size" in grid  # 2 to the 6th is 64
    assert all(values == offered[field] for field, values in grid.items())
    assert spot_grid(layout, {"hidden_size": [24, 26, 28, 30, 32]}) == {"hidden_size": [24, 28, 32]}
