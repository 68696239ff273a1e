"""Sizes for budgets nobody trained for: by search and between named sizes."""

import itertools
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, SMALL, elastic, layout_of, letters_tokenizer

from star_elastic.between import interpolate
from star_elastic.budget import LatencyTable, Metric, choices
from star_elastic.evaluate import evaluate_size
from star_elastic.grid import holds
from star_elastic.records import Record
from star_elastic.search import calibration_loss, search
from star_elastic.submodel import Fields

HYBRID, LLAMA = layout_of("nemotron_h"), layout_of("llama")
PARAMS = Metric(kind="params")
Table = dict[str, dict[int, float]]  # axis -> value -> what shrinking to it loses


def separable(table: Mapping[str, Mapping[int, float]]) -> Callable[[Fields], float]:
    """A loss that is a sum over axes, 0 at the parent."""
    return lambda fields: sum(table[axis].get(value, 0.0) for axis, value in fields.items())


def cost_of(metric: Metric, fields: Fields, layout=HYBRID) -> float:
    return float(metric.cost(layout, layout.sizes_of(fields)))


def brute_force(axes: Mapping[str, list[int]], metric: Metric, budget: float, loss) -> float:
    points = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return min(loss(point) for point in points if cost_of(metric, point) <= budget)


def falling(axes: Mapping[str, list[int]], drops: list[int]) -> Table:
    """What is lost at every value: the sum of the drops from there to the parent's."""
    left = iter(drops)
    table: Table = {}
    for axis, values in axes.items():
        lost = 0.0
        table[axis] = {values[-1]: 0.0}
        for value in reversed(values[:-1]):
            lost += next(left)
            table[axis][value] = lost
    return table


TWO = {"hidden_size": [16, 20, 24, 28, 32], "moe_intermediate_size": [8, 10, 12, 14, 16]}
THREE = {
    "hidden_size": [29, 30, 31, 32],
    "moe_intermediate_size": [13, 14, 15, 16],
    "intermediate_size": [21, 22, 23, 24],
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=8, max_size=8), st.floats(0.0, 1.0))
def test_it_finds_the_optimum_of_two_axes(drops: list[int], share: float) -> None:
    loss = separable(falling(TWO, drops))
    least = cost_of(PARAMS, {axis: values[0] for axis, values in TWO.items()})
    budget = least + share * (cost_of(PARAMS, {}) - least)
    found = search(HYBRID, TWO, PARAMS, [budget], loss)[budget]
    assert found.loss == brute_force(TWO, PARAMS, budget, loss) == loss(found.fields)
    assert found.cost == cost_of(PARAMS, found.fields) <= budget


def unit_costs() -> Metric:
    """Every step down any axis saves one millisecond."""
    times = [float(1 + sum(place)) for place in itertools.product(range(4), repeat=3)]
    table = LatencyTable(
        device="d", dtype="float32", mode="decode", batch=1, context=1, axes=THREE,
        milliseconds=times,
    )  # fmt: skip
    return Metric(kind="latency", table=table)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=9, max_size=9), st.integers(1, 10))
def test_it_finds_the_optimum_of_convex_losses_at_equal_costs(drops: list[int], cost: int) -> None:
    convex = [drop for n in range(0, 9, 3) for drop in sorted(drops[n : n + 3])]
    loss, metric = separable(falling(THREE, convex)), unit_costs()
    found = search(HYBRID, THREE, metric, [cost], loss)[cost]
    assert found.loss == brute_force(THREE, metric, cost, loss)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 99), min_size=80, max_size=80),
    st.lists(st.floats(0, 1), max_size=3),
    st.integers(3, 60),
)
def test_every_budget_is_kept_groups_too_and_twice_is_the_same(
    drops: list[int], shares: list[float], evaluations: int
) -> None:
    axes = choices(HYBRID, {field: [value] for field, value in SMALL["nemotron_h"].items()})
    table, asked = falling(axes, drops), []

    def loss(fields: Fields) -> float:
        asked.append(tuple(sorted(fields.items())))
        return separable(table)(fields)

    least = cost_of(PARAMS, SMALL["nemotron_h"])
    budgets = [least + share * (cost_of(PARAMS, {}) - least) for share in shares]
    found = search(HYBRID, axes, PARAMS, budgets, loss, evaluations)
    assert len(asked) == len(set(asked)) <= evaluations
    assert list(found) == list(dict.fromkeys(budgets))
    for budget, size in found.items():
        assert size.cost <= budget and holds(HYBRID, size.fields)
        assert size.fields.get("mamba_num_heads", 8) % 2 == 0
        assert size.evaluated <= evaluations
    assert search(HYBRID, axes, PARAMS, budgets, separable(table), evaluations) == found


def test_the_whole_budget_is_the_parent_and_the_least_is_the_smallest_size() -> None:
    loss = separable(falling(TWO, [1] * 8))
    smallest = {axis: values[0] for axis, values in TWO.items()}
    full, least = cost_of(PARAMS, {}), cost_of(PARAMS, smallest)
    found = search(HYBRID, TWO, PARAMS, [least, full], loss)
    assert found[full].fields == {} and found[least].fields == smallest


def test_a_loss_that_is_no_number_is_never_chosen() -> None:
    axes = {"hidden_size": [24, 28, 32], "moe_intermediate_size": [8, 16]}

    def loss(fields: Fields) -> float:
        return float("nan") if "hidden_size" in fields else float(len(fields))

    budget = cost_of(PARAMS, {"moe_intermediate_size": 8})
    assert search(HYBRID, axes, PARAMS, [budget], loss)[budget].fields == {
        "moe_intermediate_size": 8
    }


@pytest.mark.parametrize(
    ("axes", "budget", "evaluations", "complaint"),
    [
        (TWO, 100, 9, r"budget 100 parameters \(total parameters\): even the smallest size takes "),
        (TWO, 10**9, 0, "evaluations = 0: fewer than the 1 budgets"),
        ({}, 10**9, 9, "no axis to shrink"),
        ({"vocab_size": [8]}, 10**9, 9, "vocab_size is no axis"),
        ({"hidden_size": [8, 64]}, 10**9, 9, "hidden_size = 64 is larger than the parent's 32"),
        ({"mamba_num_heads": [2, 3]}, 10**9, 9, "mamba_num_heads = 3 does not divide"),
    ],
)
def test_what_cannot_be_searched_is_one_line(axes, budget, evaluations, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        search(HYBRID, axes, PARAMS, [budget], lambda fields: 0.0, evaluations)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["params", "active", "memory"])
def test_between_named_sizes_every_field_grows_with_the_budget(family: str, kind) -> None:
    layout, metric = layout_of(family), Metric(kind=kind)
    sizes = {"full": {}, "small": SMALL[family]}
    low, high = (cost_of(metric, sizes[name], layout) for name in ("small", "full"))
    assert interpolate(layout, sizes, metric, low) == SMALL[family]
    assert interpolate(layout, sizes, metric, high) == {}
    assert interpolate(layout, sizes, metric, 2 * high) == {}
    before = SMALL[family]
    for n in range(1, 12):
        budget = low + n / 12 * (high - low)
        fields = interpolate(layout, sizes, metric, budget, {"hidden_size": 4})
        assert cost_of(metric, fields, layout) <= budget and holds(layout, fields)
        for axis, least in before.items():
            assert least <= fields.get(axis, layout.sizes[axis]) <= layout.sizes[axis]
        assert fields.get("hidden_size", 32) % 4 == 0
        before = {axis: fields.get(axis, layout.sizes[axis]) for axis in SMALL[family]}
    assert before != SMALL[family]


def test_between_is_between_the_two_that_enclose_the_budget() -> None:
    sizes = {"full": {}, "middle": {"hidden_size": 28}, "small": {"hidden_size": 16}}
    budget = cost_of(PARAMS, {"hidden_size": 28}) - 1
    assert interpolate(HYBRID, sizes, PARAMS, budget) == {"hidden_size": 27}
    with pytest.raises(ValueError, match="budget 5 parameters .* even the smallest size takes"):
        interpolate(HYBRID, sizes, PARAMS, 5)


def test_between_sizes_that_differ_per_layer() -> None:
    low = {"intermediate_size": [8, 16]}
    budget = cost_of(PARAMS, {"intermediate_size": [16, 20]}, LLAMA)
    found = interpolate(LLAMA, {"full": {}, "low": low}, PARAMS, budget)
    assert found == {"intermediate_size": [16, 20]}


RECORDS = [
    Record("1+1=", "2", "sums", "2"),
    Record("2+3=", "5", "sums", "5"),
    Record("", "the cat sat on the mat", "text", ""),
]


def test_the_calibration_loss_is_what_evaluate_measures() -> None:
    model = elastic("nemotron_h")
    model.tokenizer = letters_tokenizer()
    loss = calibration_loss(model, RECORDS)
    for fields in ({}, SMALL["nemotron_h"]):
        view = model.submodel(**fields)
        measured = evaluate_size(view, model.tokenizer, RECORDS, generate=False)
        # every sum is two tokens (with the end), the text is 22 and its first is given
        mean = (4 * measured["sums"]["nll"] + 22 * measured["text"]["nll"]) / 26
        assert loss(fields) == pytest.approx(mean, rel=1e-5)
    assert loss({}) != loss(SMALL["nemotron_h"])


def test_a_sample_without_a_completion_is_refused() -> None:
    model = elastic("llama")
    model.tokenizer = letters_tokenizer()
    with pytest.raises(ValueError, match="no completion starts within 4 tokens"):
        calibration_loss(model, RECORDS[:2], max_length=4)


def test_a_search_by_measured_loss_beats_the_line_between() -> None:
    model = elastic("llama")
    model.tokenizer = letters_tokenizer()
    loss = calibration_loss(model, RECORDS)
    sizes = {"full": {}, "small": {"hidden_size": 24, "intermediate_size": 16}}
    axes = choices(model.layout, {"hidden_size": [24], "intermediate_size": [16]})
    budget = (cost_of(PARAMS, {}, model.layout) + cost_of(PARAMS, sizes["small"], model.layout)) / 2
    found = search(model.layout, axes, PARAMS, [budget], loss)[budget]
    assert found.loss <= loss(interpolate(model.layout, sizes, PARAMS, budget))
