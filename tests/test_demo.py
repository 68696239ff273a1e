"""The demo line end to end at a reduced size, on the parent that ships."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_elastic import ElasticModel
from star_elastic.evaluate import evaluate_size, mean
from star_elastic.records import read_records

ROOT = Path(__file__).parents[1]
STEPS = 60


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the line."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    words = ["--out", folder, "--train-records", 3000, "--heldout-records", 45]
    words += ["--set", f"train.stages.0.steps={STEPS}", "--set", "train.stages.0.warmup_steps=6"]
    words += ["--set", "rank.samples=128"]
    command = [sys.executable, "-m", "demo.run", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_parent_that_ships_is_small_and_stock() -> None:
    folder = ROOT / "demo" / "parent"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert {"linear_attention", "full_attention", "moe"} <= set(model.config.layers_block_type)
    assert AutoTokenizer.from_pretrained(folder).chat_template is not None


@pytest.mark.slow
def test_the_line_leaves_what_it_promises(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["sizes"]] == ["full", "middle", "small"]
    assert all(row["trained"] for row in report["sizes"])
    full, middle, small = (row["active_params"] for row in report["sizes"])
    assert 0.65 <= middle / full <= 0.75
    assert 0.35 <= small / full <= 0.45
    for name in ("middle", "small"):
        AutoModelForCausalLM.from_pretrained(out / "slices" / name)
        assert report["slices"][name]["max_difference_to_view"] == 0
    assert report["resident"]["ratio"] <= 1.01
    text = (out / "report.md").read_text()
    assert "Masking the whole parent instead would have cost" in text
    assert (out / "quality.png").stat().st_size > 5000 and (out / "training.png").exists()


@pytest.mark.slow
def test_training_makes_the_small_size_better_than_sorting_does(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    trained, untrained = report["elastic"]["small"], report["sorted"]["small"]
    assert mean(trained, "nll") < 0.2 * mean(untrained, "nll")
    parent = mean(report["parent"], "nll")
    assert mean(report["sorted"]["full"], "nll") == pytest.approx(parent, rel=1e-3)


@pytest.mark.slow
def test_the_readme_runs(out: Path) -> None:
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    for block in blocks:
        code = block.split("```")[0].replace("runs/demo/elastic", str(out / "elastic"))
        names: dict[str, Any] = {}
        exec(code, names)
        assert names["small"].config.hidden_size < names["model"].parent.config.hidden_size


@pytest.mark.slow
def test_reported_quality_can_be_measured_again_from_the_files(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    model = ElasticModel.from_pretrained(out / "slices" / "small")
    heldout = read_records(out / "data" / "heldout.jsonl")
    again = evaluate_size(model.parent, model.tokenizer, heldout, generate=False)
    for task, quality in report["elastic"]["small"].items():
        assert again[task]["nll"] == pytest.approx(quality["nll"], abs=1e-4)
