"""Declarations (`elastic_config`) that nobody vouches for: each lie is named by its field."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import WEIGHTS, edit_elastic, edit_json
from hostile import refuses

Change = Callable[[dict[str, Any]], Any]


def axis(field: str = "hidden_size", **changes: Any) -> Change:
    return lambda e: e["axes"][field].update(changes)


def small(**changes: Any) -> Change:
    """The second size, changed."""
    return lambda e: e["submodels"][1].update(changes)


def cut(field: str, value: Any) -> Change:
    """One field of the second size, changed."""
    return lambda e: e["submodels"][1]["config"].update({field: value})


def top(**changes: Any) -> Change:
    return lambda e: e.update(changes)


def without(*path: str | int) -> Change:
    def change(declared: Any) -> None:
        for step in path[:-1]:
            declared = declared[step]
        del declared[path[-1]]

    return change


def both(*changes: Change) -> Change:
    return lambda e: [change(e) for change in changes]


SHA = "sha256:" + "0" * 64
# id -> what is changed, what the error names beside the file
CASES: dict[str, tuple[Change, tuple[str, ...]]] = {
    # the whole
    "no-version": (without("format_version"), ("elastic_config.format_version: unknown", "None")),
    "version-2": (top(format_version=2), ("elastic_config.format_version: unknown version 2",)),
    "version-text": (top(format_version="1"), ("format_version: unknown version '1'",)),
    "version-float": (top(format_version=1.5), ("format_version: unknown version 1.5",)),
    "version-list": (top(format_version=[1] * 9999), ("format_version: unknown version [1, 1",)),
    "no-axes": (without("axes"), ("elastic_config.axes: Field required",)),
    "no-sizes": (without("submodels"), ("elastic_config.submodels: Field required",)),
    "empty-sizes": (top(submodels=[]), ("elastic_config.submodels: List should have at least 1",)),
    "sizes-map": (top(submodels={}), ("elastic_config.submodels: Input should be a valid list",)),
    "size-text": (
        top(submodels=["full"]),
        ("elastic_config.submodels.0: Input should be a valid",),
    ),
    "axes-list": (top(axes=[]), ("elastic_config.axes: Input should be a valid dictionary",)),
    "unknown-key": (top(router="x"), ("elastic_config.router: Extra inputs are not permitted",)),
    "unknown-key-of-two-lines": (top(**{"a\nb": 1}), ("elastic_config.a b: Extra inputs",)),
    "unknown-key-that-clears-the-screen": (top(**{"\x1b[2J": 1}), ("elastic_config.\\x1b[2J:",)),
    "half-a-surrogate": (
        top(**{"\ud800": 1}),
        ("elastic_config: Input should be a valid string, unable to parse",),
    ),
    "200000-keys": (top(axes={str(n): 1 for n in range(200_000)}), ("more than 65536 keys",)),
    "training-of-nothing": (top(training={}), ("elastic_config.training.recipe: Field required",)),
    "training-steps-negative": (
        top(training={"recipe": "a", "steps": -1, "tokens": 0}),
        ("elastic_config.training.steps: Input should be greater than or equal to 0",),
    ),
    # an axis
    "axis-of-no-family": (
        lambda e: e["axes"].update(head_dim={"choices": [4], "multiple_of": 1}),
        ("elastic_config: head_dim is no axis of this nemotron_h model",),
    ),
    "axis-of-another-model": (
        lambda e: e["axes"].update(moe_latent_size={"choices": [4], "multiple_of": 1}),
        ("elastic_config: moe_latent_size is no axis",),
    ),
    "axis-with-a-path": (
        lambda e: e["axes"].update({"../x": {"choices": [4], "multiple_of": 1}}),
        ("elastic_config: ../x is no axis",),
    ),
    "axis-unknown-key": (axis(step=8), ("axes.hidden_size.step: Extra inputs",)),
    "no-choices": (without("axes", "hidden_size", "choices"), ("hidden_size.choices: Field req",)),
    "empty-choices": (axis(choices=[]), ("hidden_size.choices: List should have at least 1",)),
    "choices-number": (axis(choices=32), ("hidden_size.choices: Input should be a valid list",)),
    "choice-text": (axis(choices=["24", 32]), ("hidden_size.choices.0: Input should be a valid",)),
    "choice-float": (axis(choices=[24.0, 32]), ("hidden_size.choices.0: Input should be a valid",)),
    "choice-bool": (axis(choices=[True, 32]), ("hidden_size.choices.0: Input should be a valid",)),
    "choice-nan": (axis(choices=[float("nan")]), ("hidden_size.choices.0: Input should be",)),
    "choice-0": (axis(choices=[0, 24, 32]), ("hidden_size = 0 is not a positive integer",)),
    "choice-negative": (axis(choices=[-8, 32]), ("hidden_size = -8 is not a positive integer",)),
    "choice-above": (
        axis(choices=[24, 32, 40]),
        ("hidden_size = 40 is larger than the parent's 32",),
    ),
    "choice-2^63": (axis(choices=[24, 2**63]), (f"hidden_size = {2**63} is larger than",)),
    "choice-of-2000-digits": (
        axis(choices=[24, 10**2000]),
        ("hidden_size = 1000", "is larger than"),
    ),
    "choices-descending": (axis(choices=[32, 24]), ("axes.hidden_size.choices: not ascending",)),
    "choice-twice": (axis(choices=[24, 24, 32]), ("axes.hidden_size.choices: not ascending",)),
    "million-choices": (axis(choices=[24] * 10**6), ("axes: 1000", "choices; at most 4096 are")),
    "million-bad-choices": (axis(choices=["x"] * 10**6), ("hidden_size.choices.0: Input should",)),
    "multiple-of-0": (axis(multiple_of=0), ("hidden_size.multiple_of: Input should be greater",)),
    "multiple-of-negative": (axis(multiple_of=-8), ("multiple_of: Input should be greater",)),
    "multiple-of-2^63": (
        axis(multiple_of=2**63),
        (f"hidden_size = 24 is not a multiple of {2**63}",),
    ),
    "not-a-multiple": (axis(multiple_of=16), ("hidden_size = 24 is not a multiple of 16",)),
    "heads-that-fill-no-group": (
        axis("num_attention_heads", choices=[3, 4, 8]),
        ("num_attention_heads = 3 does not divide into num_key_value_heads = 2 groups",),
    ),
    "mamba-heads-that-fill-no-group": (
        axis("mamba_num_heads", choices=[3, 4, 8]),
        ("mamba_num_heads = 3 does not divide into n_groups = 2 groups",),
    ),
    # a size
    "size-twice": (small(name="full"), ("submodels: two have the same name",)),
    "name-empty": (small(name=""), ("submodels.1.name: String should match pattern",)),
    "name-path": (small(name="../out"), ("submodels.1.name: String should match pattern",)),
    "name-slash": (small(name="a/b"), ("submodels.1.name: String should match pattern",)),
    "name-hidden": (small(name=".git"), ("submodels.1.name: String should match pattern",)),
    "name-option": (small(name="-rf"), ("submodels.1.name: String should match pattern",)),
    "name-of-200": (small(name="x" * 200), ("submodels.1.name: String should match pattern",)),
    "name-newline": (small(name="a\n"), ("submodels.1.name: String should match pattern",)),
    "name-nul": (small(name="a\0"), ("submodels.1.name: String should match pattern",)),
    "name-unicode": (small(name="größe"), ("submodels.1.name: String should match pattern",)),
    "name-number": (small(name=7), ("submodels.1.name: Input should be a valid string",)),
    "no-name": (without("submodels", 1, "name"), ("submodels.1.name: Field required",)),
    "unknown-key-of-a-size": (small(script="x"), ("submodels.1.script: Extra inputs",)),
    "trained-text": (
        small(trained="yes"),
        ("submodels.1.trained: Input should be a valid boolean",),
    ),
    "field-not-declared": (
        without("axes", "hidden_size"),
        ("submodels.small: hidden_size is not among the axes declared",),
    ),
    "field-off-the-choices": (
        cut("hidden_size", 16),
        ("submodels.small: hidden_size = 16 is not among its choices",),
    ),
    "field-above": (cut("hidden_size", 64), ("small: hidden_size = 64 is not among its choices",)),
    "field-text": (cut("hidden_size", "24"), ("submodels.1.config.hidden_size",)),
    "field-null": (cut("hidden_size", None), ("submodels.1.config.hidden_size",)),
    "field-map": (cut("hidden_size", {}), ("submodels.1.config.hidden_size",)),
    "width-per-layer": (
        cut("hidden_size", [24] * 6),
        ("hidden_size = [24, 24, 24, 24, 24, 24]: it takes one value",),
    ),
    "depth-per-layer": (cut("num_hidden_layers", [5] * 6), ("num_hidden_layers = [5", "one value")),
    "layers-too-few": (
        cut("intermediate_size", [16] * 5),
        ("intermediate_size = [16, 16, 16, 16, 16]: it takes 6 values, one per layer",),
    ),
    "no-layers": (cut("intermediate_size", []), ("intermediate_size = []: it takes 6 values",)),
    "million-layers": (
        cut("intermediate_size", [16] * 10**6),
        ("intermediate_size = [16, 16", "it takes 6 values, one per layer"),
    ),
    "million-bad-layers": (cut("intermediate_size", ["x"] * 10**6), ("config.intermediate_size",)),
    "layer-off-the-choices": (
        cut("intermediate_size", [16, 16, 16, 16, 16, 8]),
        ("submodels.small: intermediate_size = [16", "is not among its choices"),
    ),
    "fewer-experts-than-a-token-uses": (
        both(
            axis("n_routed_experts", choices=[1, 4, 6]),
            cut("n_routed_experts", 1),
            cut("num_experts_per_tok", 2),
        ),
        ("n_routed_experts = 1 is fewer than num_experts_per_tok = 2",),
    ),
    "total-that-lies": (small(total_params=1), ("small: total_params says 1, the shapes say",)),
    "active-that-lies": (small(active_params=0), ("small: active_params says 0, the shapes say",)),
    "total-negative": (small(total_params=-1), ("small: total_params says -1, the shapes say",)),
    "total-2^63": (small(total_params=2**63), (f"total_params says {2**63}, the shapes say",)),
    "total-of-2000-digits": (
        small(total_params=10**2000),
        ("total_params says 1000", "shapes say"),
    ),
    "total-text": (small(total_params="1"), ("submodels.1.total_params: Input should be a valid",)),
    "total-nan": (small(total_params=float("nan")), ("submodels.1.total_params: Input should",)),
    "no-total": (without("submodels", 1, "total_params"), ("total_params: Field required",)),
    "quality-nan": (
        small(quality={"a": {"b": float("nan")}}),
        ("submodels.1.quality.a.b: Input should be a finite number",),
    ),
    "quality-infinite": (
        small(quality={"a": {"b": float("inf")}}),
        ("submodels.1.quality.a.b: Input should be a finite number",),
    ),
    "quality-text": (
        small(quality={"a": {"b": "1"}}),
        ("quality.a.b: Input should be a valid num",),
    ),
    "quality-flat": (small(quality={"a": 1}), ("quality.a: Input should be a valid dictionary",)),
    "quality-list": (small(quality=[]), ("quality: Input should be a valid dictionary",)),
    "too-many-sizes": (
        lambda e: e.update(submodels=[{**e["submodels"][1], "name": f"s{n}"} for n in range(2000)]),
        ("submodels: 2000 sizes of 43 tensors are too many to count",),
    ),
    # the order of layers
    "order-short": (top(layer_order=[0, 1]), ("layer_order: not an order of 6 layers",)),
    "order-empty": (top(layer_order=[]), ("layer_order: not an order of 6 layers",)),
    "order-twice": (top(layer_order=[0, 0, 1, 2, 3, 4]), ("layer_order: not an order of 6",)),
    "order-beyond": (top(layer_order=[1, 2, 3, 4, 5, 6]), ("layer_order: not an order of 6",)),
    "order-negative": (top(layer_order=[-1, 1, 2, 3, 4, 5]), ("layer_order: not an order of 6",)),
    "order-2^63": (top(layer_order=[2**63, 1, 2, 3, 4, 5]), ("layer_order: not an order of 6",)),
    "order-bool": (top(layer_order=[False, True, 2, 3, 4, 5]), ("layer_order.0: Input should be",)),
    "order-text": (top(layer_order="012345"), ("layer_order: Input should be a valid list",)),
    "order-million": (top(layer_order=[0] * 10**6), ("layer_order: not an order of 6 layers",)),
    "depth-without-order": (
        top(layer_order=None),
        ("num_hidden_layers: this model has no layer_order",),
    ),
    # digests
    "digest-of-nothing": (top(digests={"x.safetensors": SHA}), ("digests: 'x.safetensors'",)),
    "digest-outside": (top(digests={"../elastic/config.json": SHA}), ("digests: '../elastic",)),
    "digest-absolute": (top(digests={"/etc/passwd": SHA}), ("digests: '/etc/passwd'",)),
    "digest-of-the-folder": (top(digests={".": SHA}), ("digests: '.'",)),
    "digest-nul": (top(digests={"a\0b": SHA}), ("digests: 'a\\x00b'",)),
    "digest-half-a-surrogate": (top(digests={"\ud800": SHA}), ("digests: '\\ud800'",)),
    "digest-of-1000": (top(digests={"x" * 1000: SHA}), ("digests: 'xxx",)),
    "digest-short": (
        top(digests={WEIGHTS: "sha256:0"}),
        (f"digests.{WEIGHTS}: String should match",),
    ),
    "digest-upper-case": (top(digests={WEIGHTS: SHA[:-1] + "A"}), ("String should match pattern",)),
    "digest-of-another-kind": (top(digests={WEIGHTS: "md5:0"}), ("String should match pattern",)),
    "digest-null": (top(digests={WEIGHTS: None}), ("Input should be a valid string",)),
    "digests-list": (top(digests=[]), ("digests: Input should be a valid dictionary",)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_declaration_that_lies(folder: Path, name: str) -> None:
    change, named = CASES[name]
    edit_elastic(folder, change)
    refuses(folder, "elastic/config.json: elastic_config", *named)


def test_a_digest_that_differs(folder: Path) -> None:
    edit_elastic(folder, top(digests={WEIGHTS: SHA}))
    refuses(folder, f"elastic/{WEIGHTS}: digest differs from elastic_config.digests")


@pytest.mark.parametrize("declared", [None, [], "elastic", 1, True, 0.5], ids=repr)
def test_a_declaration_of_another_kind(folder: Path, declared: Any) -> None:
    edit_json(folder / "config.json", lambda config: config.update(elastic_config=declared))
    refuses(folder, "elastic/config.json: elastic_config: Input should be a valid dictionary")
