"""Model cards: what is in them, and that a licence goes along with the weights."""

import json
from pathlib import Path

import pytest
import yaml
from codes import form_of
from models import elastic
from test_quantize import parent_of, quantized

from star_elastic import card
from star_elastic.checkpoint import Checkpoint, declare
from star_elastic.evaluate import with_quality
from star_elastic.model import ElasticModel
from star_elastic.quantize import make_plan, quantize_checkpoint
from star_elastic.slicing import slice_checkpoint

LICENCE = {
    "license": "other",
    "license_name": "open: a 'model' licence",
    "license_link": "https://example.org/licence",
}
THEIRS = f"---\nlanguage: [en]\n{yaml.safe_dump(LICENCE)}---\n\n# A parent\n"


def front(folder: Path) -> dict:
    return yaml.safe_load((folder / card.CARD).read_text().split("---\n")[1])


def licensed(folder: Path, text: str = THEIRS) -> Checkpoint:
    """A parent whose publisher wrote a card."""
    parent_of("nemotron_h", folder)
    (folder / card.CARD).write_text(text)
    return Checkpoint.open(folder)


def test_the_licence_goes_along(tmp_path: Path) -> None:
    parent = licensed(tmp_path / "parent")
    slice_checkpoint(parent, tmp_path / "cut", size="small")
    coded = quantized(parent, tmp_path / "coded", "int8_groups")
    slice_checkpoint(coded, tmp_path / "four", size="small", bits=4)
    ElasticModel.from_pretrained(tmp_path / "parent").save_pretrained(tmp_path / "saved")
    declare(coded, coded.space)  # writes the card anew
    for name in ("cut", "coded", "four", "saved"):
        found = front(tmp_path / name)
        assert {key: found[key] for key in LICENCE} == LICENCE, name
        assert "star-elastic" in found["tags"] and found["library_name"] == "transformers"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# No front",
        "---\n",
        "---\n- a list\n---\n",
        "---\nlicense: [a, list]\n---\n",
        "---\nlicense: 'two\n\n  lines'\n---\n",
        "---\nlicense: " + "x" * 300 + "\n---\n",
        "---\nlicense: 2020-13-45\n---\n",
        "---\n" + "[" * 5000,
        "---\nlicense: !!python/object/apply:os.system ['false']\n---\n",
        "\0\ud7ff",
    ],
)
def test_cards_that_tell_no_licence(text: str, tmp_path: Path) -> None:
    parent = licensed(tmp_path / "parent", text)
    assert card.licence_of(tmp_path / "parent") == {}
    slice_checkpoint(parent, tmp_path / "cut", size="small")
    assert "license" not in front(tmp_path / "cut")


def test_a_card_tells_sizes_quality_and_engines(tmp_path: Path) -> None:
    model = elastic("llama")
    measured = {name: {"sums": {"accuracy": 0.25}} for name in model.sizes}
    model.space = with_quality(model.space, measured)
    model.save_pretrained(tmp_path / "e")
    text = (tmp_path / "e" / card.CARD).read_text()
    for size in model.space.submodels:
        assert (
            f"| {size.name} | {size.total_params:,} | {size.active_params:,} | yes | 0.250 |"
            in text
        )
    for words in (
        "star-elastic chat DIR --size prefix",
        'vllm serve DIR --hf-overrides \'{"elastic_size": "prefix"}\'',
        "star-elastic export DIR --size prefix --to gguf",
        "star-elastic slice DIR --size prefix",
        "AutoModelForCausalLM",
    ):
        assert words in text
    slice_checkpoint(Checkpoint.open(tmp_path / "e"), tmp_path / "cut", size="small")
    text = (tmp_path / "cut" / card.CARD).read_text()
    assert "vllm serve DIR\n" in text and "0.250" in text and "hidden_size = 24" in text


@pytest.mark.parametrize(
    "name, words",
    [
        ("fp8", "FP8 (layout of `compressed-tensors`)"),
        ("int8_groups", "INT8 in groups of 8 (layout of `compressed-tensors`)"),
        ("nvfp4", "W4A16_NVFP4 (layout of `modelopt`)"),
    ],
)
def test_a_card_tells_the_codes(name: str, words: str, tmp_path: Path) -> None:
    coded = quantized(licensed(tmp_path / "parent"), tmp_path / "q", name)
    text = (tmp_path / "q" / card.CARD).read_text()
    assert f"matrices stand in {words}" in text and "codes of experts anew" in text
    assert ("--to gguf --type nvfp4" in text) == (name == "nvfp4")
    assert ("--to gguf" in text) == (name == "nvfp4") and "AutoModelForCausalLM" not in text
    slice_checkpoint(coded, tmp_path / "cut", size="small")
    assert f"matrices stand in {words}" in (tmp_path / "cut" / card.CARD).read_text()
    values = json.loads((tmp_path / "parent/config.json").read_text())
    del values["elastic_config"]
    (tmp_path / "parent/config.json").write_text(json.dumps(values))
    plain = Checkpoint.open(tmp_path / "parent")
    quantize_checkpoint(make_plan(plain, form_of(name)), tmp_path / "plain")
    text = (tmp_path / "plain" / card.CARD).read_text()
    assert words in text and "# parent, quantized" in text
    assert front(tmp_path / "plain")["license"] == "other"
