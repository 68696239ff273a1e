"""The command line, driven as a user drives it: real checkpoints, real processes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import Command, cli
from transformers import AutoModelForCausalLM
from waiting import until

from demo.problems import make_problems, write_jsonl
from demo.tokenizer import build_tokenizer

SIZES = {"full": {}, "small": {"hidden_size": 32, "moe_intermediate_size": 16}}
CONFIG = {
    "model_type": "nemotron_h",
    "vocab_size": 320,
    "hidden_size": 48,
    "hybrid_override_pattern": "ME*",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
KEYS = {
    "name",
    "total_params",
    "active_params",
    "disk_bytes",
    "resident_bytes",
    "cache_bytes_per_token",
    "trained",
    "quality",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent made by `train`, its data and recipe, and an elastic run of it."""
    folder = tmp_path_factory.mktemp("run")
    problems = make_problems(300, "train", seed=0)
    write_jsonl(folder / "train.jsonl", problems)
    write_jsonl(folder / "heldout.jsonl", make_problems(12, "heldout", seed=0))
    texts = (problem["prompt"] + problem["completion"] for problem in problems)
    build_tokenizer(texts, 320).save_pretrained(folder / "tokenizer")
    data = {"train": f"{folder}/train.jsonl", "heldout": f"{folder}/heldout.jsonl"}
    stage = {"steps": 4, "sequence_length": 128, "rows": 4, "learning_rate": 1e-3}
    train = {"stages": [{**stage, "warmup_steps": 1}]}
    init = {"config": CONFIG, "tokenizer": f"{folder}/tokenizer"}
    parent = {"init": init, "data": data, "train": train, "balance": {"rate": 1e-3}}
    elastic = {"parent": f"{folder}/p/parent", "data": data, "sizes": SIZES, "train": train}
    (folder / "parent.yaml").write_text(yaml.safe_dump(parent))
    (folder / "elastic.yaml").write_text(yaml.safe_dump(elastic))
    cli("train", folder / "parent.yaml", "--out", folder / "p")
    cli("train", folder / "elastic.yaml", "--out", folder / "e")
    return folder


def test_inspect_lists_every_size_with_the_promised_keys(run: Path) -> None:
    rows = json.loads(cli("inspect", run / "e/elastic", "--json").stdout)
    assert [row["name"] for row in rows] == ["full", "small"]
    assert all(set(row) >= KEYS for row in rows)
    assert rows[1]["total_params"] < rows[0]["total_params"]
    weights = run / "e/elastic/model.safetensors"
    assert 0 < weights.stat().st_size - rows[0]["disk_bytes"] < 20_000  # the header
    table = cli("inspect", run / "e/elastic").stdout
    assert "small" in table and "yes" in table


def test_inspect_says_that_a_sorted_parent_is_not_elastic(run: Path) -> None:
    rows = json.loads(cli("inspect", run / "e/sorted", "--json").stdout)
    assert [row["trained"] for row in rows] == [True, False]  # the full size is the parent itself
    assert "never trained" in cli("inspect", run / "e/sorted").stdout
    done = cli("slice", run / "e/sorted", "--size", "small", "--out", run / "s0")
    assert "never trained" in done.stderr


def test_slice_by_name_and_by_fields_loads_in_stock_transformers(run: Path) -> None:
    cli("slice", run / "e/elastic", "--size", "small", "--out", run / "s1")
    cli("slice", run / "e/elastic", "--set", "hidden_size=40", "--out", run / "s2")
    assert AutoModelForCausalLM.from_pretrained(run / "s1").config.hidden_size == 32
    assert AutoModelForCausalLM.from_pretrained(run / "s2").config.hidden_size == 40
    assert (run / "s1/tokenizer.json").is_file() and (run / "s1/README.md").is_file()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--size", "huge"], "no size 'huge'; there are full, small"),
        (["--set", "hidden_size=64"], "hidden_size = 64 is larger than the parent's 48"),
        (["--set", "mamba_num_heads=3"], "mamba_num_heads = 3 does not divide"),
        (["--set", "vocab_size=8"], "vocab_size is no axis"),
        (["--set", "hidden_size=many"], "not of the form field=number"),
        ([], "say one of --size, --set"),
    ],
)
def test_bad_slices_are_one_line(run: Path, words: list[str], complaint: str) -> None:
    done = cli("slice", run / "e/elastic", *words, "--out", run / "bad", check=False)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run / "bad").exists()


def test_evaluate_measures_every_size_and_stores_it_when_told(run: Path) -> None:
    words = ["evaluate", run / "e/elastic", "--data", run / "heldout.jsonl", "--json"]
    rows = json.loads(cli(*words, "--max-new-tokens", 8, "--write").stdout)
    assert {task for row in rows for task in row["quality"]} == {"mathematics", "code", "knowledge"}
    stored = json.loads(cli("inspect", run / "e/elastic", "--json").stdout)
    assert [row["quality"] for row in stored] == [row["quality"] for row in rows]
    losses = json.loads(cli(*words, "--nll-only").stdout)
    assert all("accuracy" not in task for row in losses for task in row["quality"].values())


def test_evaluate_measures_the_baselines_when_given_the_recipe(run: Path) -> None:
    words = ["evaluate", run / "e/elastic", "--data", run / "heldout.jsonl", "--json"]
    words += ["--nll-only", "--baselines", run / "elastic.yaml"]
    rows = json.loads(cli(*words).stdout)
    assert all(set(row["baselines"]) == {"sorted", "alone"} for row in rows)
    full, small = rows
    words = ["evaluate", run / "e/sorted", "--data", run / "heldout.jsonl", "--json", "--nll-only"]
    for row, again in zip(rows, json.loads(cli(*words).stdout), strict=True):
        assert row["baselines"]["sorted"] == again["quality"]
    for task, quality in small["baselines"]["alone"].items():
        assert quality["nll"] > 0 and quality != small["quality"][task]
    table = cli(*[word for word in words if word != "--json"]).stdout
    assert "mathematics" in table and full["name"] in table


def test_chat_changes_its_size_in_mid_conversation(run: Path) -> None:
    words = [sys.executable, "-m", "star_elastic", "chat", run / "e/elastic", "--max-new-tokens", 4]
    said = "What is 1+1?\n/size small\n/size nope\nAnd 2+2?\n/quit\n"
    done = subprocess.run(
        [str(word) for word in words], input=said, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("full>") == 2 and done.stdout.count("small>") == 3
    assert "sizes: full, small" in done.stdout


def test_chat_with_an_unknown_size_lists_those_there_are(run: Path) -> None:
    done = cli("chat", run / "e/elastic", "--size", "tiny", check=False)
    assert done.returncode == 1 and "there are full, small" in done.stderr


def test_a_run_that_is_interrupted_says_how_to_go_on_and_does(run: Path) -> None:
    out = run / "interrupted"
    words = ["train", run / "elastic.yaml", "--out", out, "--set", "train.stages.0.steps=400"]
    process = Command(*words)
    metrics = out / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, 120)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    done = json.loads(metrics.read_text().splitlines()[-1])["step"]
    cli(*words[:-1], f"train.stages.0.steps={done + 2}", "--resume")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, done + 3))
    assert (out / "elastic/config.json").is_file()


def test_a_run_is_never_overwritten(run: Path) -> None:
    done = cli("train", run / "elastic.yaml", "--out", run / "e", check=False)
    assert done.returncode == 1 and "--resume goes on" in done.stderr


def test_an_unknown_recipe_key_names_the_closest(run: Path) -> None:
    words = [
        "train",
        run / "elastic.yaml",
        "--out",
        run / "x",
        "--set",
        "train.stages.0.learning_rat=1",
    ]
    done = cli(*words, check=False)
    assert done.returncode == 1
    assert "train.stages.0.learning_rat: unknown key; did you mean 'learning_rate'?" in done.stderr
