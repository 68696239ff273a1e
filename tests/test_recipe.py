"""Recipes: what they hold, and that a slip in one is named."""

from pathlib import Path

import pytest
from models import tiny_config

from star_elastic.layout import Layout
from star_elastic.train.recipe import Recipe, RecipeError, load_recipe
from star_elastic.train.sizes import by_fraction, named_sizes

TEXT = """
parent: some/folder
data: {train: train.jsonl, heldout: heldout.jsonl}
sizes: {full: {}, small: {hidden_size: 16}}
train: {stages: [{steps: 10}]}
"""
ROOT = Path(__file__).parents[1]
STAGE = "train.stages.0"


def recipe(tmp_path: Path, text: str = TEXT, *overrides: str) -> Recipe:
    (tmp_path / "tiny.yaml").write_text(text)
    return load_recipe(tmp_path / "tiny.yaml", overrides)


def refused(tmp_path: Path, message: str, text: str = TEXT, *overrides: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        recipe(tmp_path, text, *overrides)
    assert "\n" not in str(error.value)


def test_a_recipe(tmp_path: Path) -> None:
    found = recipe(tmp_path)
    assert found.name == "tiny"
    assert found.sizes == {"full": {}, "small": {"hidden_size": 16}}
    assert found.train.steps == 10
    assert found.train.stages[0].accumulate == 1
    assert [*found.data.corpora] == ["train"] and found.data.corpora["train"].weight == 1


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        f"{STAGE}.steps=7",
        "train.betas=[0.8, 0.9]",
        "sizes.small.hidden_size=8",
        "name=x",
    ]
    found = recipe(tmp_path, TEXT, *overrides, "train.dtype=bfloat16")
    assert (found.train.steps, found.train.betas, found.name) == (7, (0.8, 0.9), "x")
    assert found.sizes["small"] == {"hidden_size": 8}
    assert found.train.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stages.0.step=7", r"tiny\.yaml: train\.stages\.0\.step: .* did you mean 'steps'\?"),
        ("train.stages.0.lerning_rate=1", r"lerning_rate: .* did you mean 'learning_rate'"),
        ("train.stage=[]", r"train\.stage: .* did you mean 'stages'"),
        ("balance={rat: 1}", r"balance\.rat: .* did you mean 'rate'"),
        ("router={axes: {}, metrics: active}", r"router\.metrics: .* did you mean 'metric'"),
        ("data.train={a: {pth: x}}", r"data\.train\.a\.pth: .* did you mean 'path'"),
        ("data.heldot=x", r"data\.heldot: .* did you mean 'heldout'"),
        ("rank.sample=1", r"rank\.sample: .* did you mean 'samples'"),
        ("parrent=x", r"parrent: .* did you mean 'parent'"),
    ],
)
def test_an_unknown_key_names_the_closest(tmp_path: Path, override: str, message: str) -> None:
    refused(tmp_path, message, TEXT, override)


def test_an_unknown_key_of_an_optional_part_names_the_closest(tmp_path: Path) -> None:
    text = TEXT.replace("parent: some/folder", "init: {config: {}, tokenzer: x}")
    refused(tmp_path, r"init\.tokenzer: .* did you mean 'tokenizer'", text + "\n")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        *(
            (f"{STAGE}.{key}={value}", f"{STAGE}.{key}")
            for key, values in {
                "steps": (0, 1.5, "ten"),
                "sequence_length": (7,),
                "rows": (0,),
                "accumulate": (0,),
                "learning_rate": (0, -1),
                "min_lr_ratio": (1.1,),
                "warmup_steps": (-1,),
            }.items()
            for value in values
        ),
        (f"{STAGE}.learning_rate=.inf", f"{STAGE}.learning_rate"),
        (f"{STAGE}.size_probs={{small: .nan}}", f"{STAGE}.size_probs"),
        ("train.stages=[]", "train.stages"),
        ("train.clip=0", "train.clip"),
        ("train.between=1", "train.between"),
        ("train.same_size=0", "train.same_size"),
        ("train.sizes_per_batch=0", "train.sizes_per_batch"),
        ("balance.rate=-1", "balance.rate"),
        ("balance.aux_loss=-1", "balance.aux_loss"),
        ("distil.temperature=0", "distil.temperature"),
        ("router={axes: {hidden_size: [8]}, every: 0}", "router.every"),
        ("router={axes: {hidden_size: [8]}, metric: speed}", "router.metric"),
        ("data.train={a: {path: x, weight: 0}}", "data.train.a.weight: "),
        ("rank.order=best", "rank.order"),
        ("train.weight_decay=-1", "train.weight_decay"),
        ("train.dtype=float16", "train.dtype"),
        ("train.save_every=0", "train.save_every"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        ("router={axes: {}}", "router.axes"),
        ("router={axes: {hidden_size: [8]}, temperature: [1, 0]}", "router.temperature"),
        ("data.train={}", "data.train"),
        ("data.train={a: {path: x, weight: .inf}}", "data.train.a.weight: "),
        ("report_to=[tensorboard]", "report_to"),
        ("data.loss_on=prompt", "data.loss_on"),
        ("data.train=1", "data.train"),
        ("rank.samples=0", "rank.samples"),
        ("sizes.small.hidden_size=wide", "sizes.small.hidden_size: "),
    ],
)
def test_a_value_out_of_bounds_is_named(tmp_path: Path, override: str, field: str) -> None:
    refused(tmp_path, rf"tiny\.yaml: {field}", TEXT, override)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_fraction_that_is_none_is_named(tmp_path: Path, fraction: float) -> None:
    layout = Layout(tiny_config("llama", hidden_size=128))
    with pytest.raises(RecipeError, match=r"sizes\.small"):
        named_sizes(layout, recipe(tmp_path, TEXT, f"sizes.small={fraction}"))


def test_a_value_that_json_does_not_know_is_named(tmp_path: Path) -> None:
    refused(tmp_path, r"tiny\.yaml: .*date", TEXT, "name=2026-01-01")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("parent: some/folder", ""), "either parent or init"),
        (TEXT + "init: {config: {}, tokenizer: x}", "either parent or init"),
        (TEXT.replace("train: {stages: [{steps: 10}]}", ""), "train"),
        ("- a", "not a mapping"),
        ("a: [", "tiny.yaml"),
        ("", "not a mapping"),
    ],
)
def test_a_recipe_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    refused(tmp_path, message, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{STAGE}.size_probs={{huge: 1}}", "size_probs names 'huge'; there are full, small"),
        (f"{STAGE}.size_probs={{small: -1}}", "size_probs must be positive"),
        (f"{STAGE}.size_probs={{small: 0}}", "size_probs must be positive"),
        (f"{STAGE}.mix={{other: 1}}", "mix names 'other'; there are train"),
        (f"{STAGE}.tokens=100", r"yaml: train\.stages\.0: say either steps or tokens$"),
        (f"{STAGE}.steps=null", r"yaml: train\.stages\.0: say either steps or tokens$"),
        ("train.sizes_per_batch=3", r"yaml: train\.sizes_per_batch: 3 of 2 sizes$"),
        ("router={axes: {hidden_size: [8, 16]}}", r"yaml: router: no size is given as a share"),
        ("train={stages: [{steps: 1}], between: 0.1}", "sizes.between: "),
        ("train.steps", "not of the form key=value"),
        (f"{STAGE}.steps.more=1", "not a mapping"),
        ("train.stages.first.steps=1", "no number of a list"),
        ("train.stages.4.steps=1", "index out of range"),
    ],
)
def test_an_override_that_cannot_be(tmp_path: Path, override: str, message: str) -> None:
    text = TEXT.replace("small:", "between: 0.5, small:") if "sizes.between" in message else TEXT
    refused(tmp_path, message, text, override)


def test_an_override_that_is_no_yaml(tmp_path: Path) -> None:
    refused(tmp_path, "train.steps", TEXT, "train.steps=[")


def test_tokens_make_steps(tmp_path: Path) -> None:
    text = TEXT.replace("{steps: 10}", "{tokens: 1000, sequence_length: 16, rows: 4}, {steps: 2}")
    train = recipe(tmp_path, text).train
    assert [stage.length for stage in train.stages] == [16, 2] and train.steps == 18
    assert train.stages[0].tokens_per_step == 64


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_that_ship_are_recipes(path: Path) -> None:
    assert load_recipe(path).train.steps >= 1


def test_the_published_recipe_has_the_published_tokens() -> None:
    found = load_recipe(ROOT / "recipes" / "nemotron-3-nano-30b.yaml")
    tokens = [stage.length * stage.tokens_per_step for stage in found.train.stages]
    assert tokens == pytest.approx([100e9, 60e9], rel=1e-3)
    assert [stage.sequence_length for stage in found.train.stages] == [8192, 49152]


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("family", ["nemotron_h", "llama", "qwen3_moe"])
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8])
def test_a_fraction_is_met_by_the_widths(family: str, fraction: float) -> None:
    widths = {"hidden_size": 128, "intermediate_size": 192}
    widths |= {"moe_intermediate_size": 64} if family != "llama" else {}
    layout = Layout(tiny_config(family, **widths))
    fields = by_fraction(layout, fraction, {"hidden_size": 16})
    share = layout.count_active(layout.sizes_of(fields)) / layout.count_active()
    assert abs(share - fraction) <= 0.1
    assert fields["hidden_size"] % 16 == 0
    assert all(value % 8 == 0 or value == layout.sizes[f] for f, value in fields.items())
    assert all(value <= layout.sizes[field] for field, value in fields.items())


def test_sizes_are_fields_or_fractions(tmp_path: Path) -> None:
    layout = Layout(tiny_config("llama", hidden_size=128))
    found = named_sizes(layout, recipe(tmp_path, TEXT, "sizes.half=0.5", "sizes.full=1.0"))
    assert found["full"] == {}
    assert found["small"] == {"hidden_size": 16}
    assert found["half"] == by_fraction(layout, 0.5, {})


def test_a_fraction_out_of_reach_is_named() -> None:
    with pytest.raises(RecipeError, match="sizes.tiny: no size is near 0.01"):
        by_fraction(Layout(tiny_config("llama")), 0.01, {}, "sizes.tiny")
