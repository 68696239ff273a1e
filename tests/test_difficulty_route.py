"""Routing by difficulty: the policy, records and their grades, and the verb on a tiny model."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import elastic, letters_tokenizer
from policies import IDLE, LARGE, MIDDLE, SIZES, SMALL
from typer.testing import CliRunner, Result

from star_elastic.cli.route import route_app
from star_elastic.model import ElasticModel
from star_elastic.serve.difficulty import load, probe_of
from star_elastic.serve.difficulty.asking import ask
from star_elastic.serve.difficulty.graded import Graded, read_graded
from star_elastic.serve.engine import Engine, Request
from star_elastic.serve.policy import ByDifficulty, ByQuality, Chooser, Pinned, Size, Wish
from star_elastic.serve.sampling import Sampling

# the policy

BY = ByDifficulty({"23b": 0.1, "30b": 0.4})


@pytest.mark.parametrize(
    ("difficulty", "size"),
    [(-1.0, "12b"), (0.0, "12b"), (0.1, "23b"), (0.39, "23b"), (0.4, "30b"), (1.0, "30b")],
)
def test_the_harder_the_larger(difficulty: float, size: str) -> None:
    choice = Chooser(SIZES, [BY]).choose(Wish(difficulty=difficulty), IDLE)
    assert choice.size == size
    if size != "30b":
        assert choice.why == (f"difficulty: {difficulty:.2f} allows {size} at most",)


def test_what_nobody_knows_is_left_alone() -> None:
    assert BY.allow(Wish(), IDLE, SIZES).sizes == SIZES
    with pytest.raises(ValueError, match="of size 30b is no number"):
        ByDifficulty({"30b": math.nan})


def test_others_narrow_first() -> None:
    chooser = Chooser(SIZES, [ByQuality({"good": MIDDLE}), BY])
    assert chooser.choose(Wish(quality="good", difficulty=0.9), IDLE).size == "23b"
    above = BY.allow(Wish(difficulty=0.0), IDLE, (LARGE, MIDDLE))  # the small one is not allowed
    assert above.sizes == (MIDDLE,)


@given(st.floats(-1, 1), st.floats(-1, 1), st.lists(st.floats(-2, 2), min_size=2, max_size=2))
@settings(max_examples=200, deadline=None)
def test_properties_of_the_policy(one: float, other: float, least: list[float]) -> None:
    """It narrows, a pin stands, the same is chosen again, and harder is never smaller."""
    by = ByDifficulty({"23b": min(least), "30b": max(least)})
    chooser = Chooser(SIZES, [Pinned(), by])
    chosen: list[Size] = []
    for difficulty in sorted([one, other]):
        wish = Wish(difficulty=difficulty)
        allowed = by.allow(wish, IDLE, SIZES)
        assert allowed.sizes and SMALL in allowed.sizes and set(allowed.sizes) <= set(SIZES)
        assert allowed == by.allow(wish, IDLE, SIZES)
        chosen.append(allowed.sizes[0])
        for size in SIZES:
            pinned = chooser.choose(replace(wish, size=size.name), IDLE)
            assert pinned.size == size.name
            assert pinned.why == (f"pinned: the request names {size.name}",)
    assert chosen[0].active_params <= chosen[1].active_params


# records


def written(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_records_of_every_kind(tmp_path: Path) -> None:
    told = read_graded(
        written(
            tmp_path / "d.jsonl",
            {"prompt": "1+1?", "completion": "<think>.</think>2", "answer": "2", "task": "sum"},
            {"question": "2+2?", "answer": "two and two #### 4"},
            {"messages": [{"role": "user", "content": "3+3?"}], "answer": "6"},
        ),
        ["small"],
    )
    assert [each.text for each in told] == ["1+1?", "2+2?", "3+3?"]
    assert [each.answer for each in told] == ["2", "4", "6"]
    graded = {"prompt": "x", "outcomes": {"small": 1, "full": 0.5}, "tokens": {"full": 3}}
    assert read_graded(written(tmp_path / "g.jsonl", graded), ["small", "full"])[0].tokens


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "x"}, "neither an answer nor outcomes"),
        ({"answer": "x"}, "either a prompt or messages"),
        ({"prompt": "", "answer": "x"}, "prompt: String should have at least 1 character, not ''"),
        ({"prompt": 3, "answer": "x"}, "prompt: Input should be a valid string, not 3"),
        ({"prompt": "x", "outcomes": {"small": 2}}, "outcomes.small: .* less than .* 1, not 2"),
        ({"prompt": "x", "outcomes": {"small": math.nan}}, "outcomes.small: .*, not nan"),
        ({"prompt": "x", "outcomes": {"small": 1}}, "outcomes: none of size 'full'"),
        ({"prompt": "x", "outcomes": {}}, "outcomes: Dictionary should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "6"}], "answer": "6"}, "the last is the"),
        ([1], "valid dictionary"),
    ],
)
def test_no_record_is_one_line(tmp_path: Path, record: Any, complaint: str) -> None:
    good = {"prompt": "x", "answer": "y"}
    path = written(tmp_path / "d.jsonl", record, good)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_graded(path, ["small", "full"])
    assert str(caught.value).startswith(f"{path}: line 1: ") and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    mixed = written(
        tmp_path / "m.jsonl", {"prompt": "x", "answer": "y"}, {"prompt": "x", "outcomes": {"a": 1}}
    )
    with pytest.raises(ValueError, match="line 2: outcomes: some records have them"):
        read_graded(mixed, [])
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no records"):
        read_graded(tmp_path / "e.jsonl", [])
    (tmp_path / "j.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_graded(tmp_path / "j.jsonl", [])
    with pytest.raises(ValueError, match="not readable"):
        read_graded(tmp_path / "none.jsonl", [])


# the verb


PROMPTS = [f"{n}+{n * n}=" if n % 2 else f"say {n} please=" for n in range(160)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, and records of either kind: sums gain from the full size, words do not."""
    folder = tmp_path_factory.mktemp("route")
    model = elastic("llama")
    model.tokenizer = letters_tokenizer()
    model.save_pretrained(folder / "m")
    model = ElasticModel.from_pretrained(folder / "m")
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    engine = Engine(model, max_length=64)
    said = {}
    for size in ("small", "full"):
        answers = engine.generate(ids, size, 6)
        said[size] = [model.tokenizer.decode(a, skip_special_tokens=True) for a in answers]
    rows = [
        {"prompt": prompt, "answer": said["full" if n % 2 else "small"][n]}
        for n, prompt in enumerate(PROMPTS)
    ]
    written(folder / "asked.jsonl", *rows)
    outcomes = [{"small": 1 - n % 2, "prefix": 0.5, "full": 1} for n in range(len(PROMPTS))]
    told = zip(PROMPTS, outcomes, strict=True)
    written(folder / "graded.jsonl", *({"prompt": p, "outcomes": o} for p, o in told))
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(route_app, ["fit", *map(str, words)])


def test_every_size_is_asked_and_graded(made: Path) -> None:
    model = ElasticModel.from_pretrained(made / "m")
    records = read_graded(made / "asked.jsonl", [])[:20]
    told: list[tuple[str, int, int]] = []
    found = ask(model, records, ["full", "small"], 3, 6, 4, lambda *each: told.append(each))
    assert found.sizes == ("small", "full") and found.prices[0] < found.prices[1]
    assert found.quality_ns[1::2, 1].all() and found.quality_ns[::2, 0].all()
    assert found.tokens_ns.max() == 6 and {len(probe) for probe in found.probes} == {3}
    assert len(found.probes[0][0]) == 20
    assert told[-1] == ("full", 20, 20)


def test_graded_records_are_only_probed(made: Path) -> None:
    model = ElasticModel.from_pretrained(made / "m")
    records = [
        Graded(prompt="1+1", outcomes={"small": 0, "full": 0.5}, tokens={"full": 9}),
        Graded(prompt="2", outcomes={"small": 1, "full": 1}),
    ]
    found = ask(model, records, ["small", "full"], 2, 30)
    assert found.quality_ns.tolist() == [[0, 0.5], [1, 1]]
    assert found.tokens_ns.tolist() == [[30, 9], [30, 30]]
    assert [len(probe) for probe in found.probes] == [2, 2]
    assert not any(ask(model, records, ["small", "full"], 0).probes)


def test_route_fit_of_answers(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "difficulty.json"
    words = ("--sizes", "small,full", "--max-tokens", 6, "--probe-tokens", 2)
    done = run(made / "m", "--data", made / "asked.jsonl", "--out", out, *words)
    assert done.exit_code == 0, done.exception
    assert "random mixing" in done.stdout and "difference" in done.stdout
    found = load(out)
    assert found.sizes == ["small", "full"] and found.provenance.gained >= 70
    assert found.of("77+5929=", 8) > 0.5 > found.of("say 44 please=", 14)
    refused = run(made / "m", "--data", made / "asked.jsonl", "--out", out, *words)
    assert isinstance(refused.exception, FileExistsError)


def test_route_fit_of_graded_records(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "difficulty.json"
    done = run(made / "m", "--data", made / "graded.jsonl", "--out", out, "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["sizes"] == load(out).sizes
    assert set(load(out).sizes) == {"small", "prefix", "full"}
    assert load(out).provenance.auc["0"].mean > 0.95


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sizes", "small,huge"], "no size 'huge'; there are full, small, prefix"),
        (["--sizes", "small"], "a router chooses among two sizes"),
        (["--limit", "50"], "graded.jsonl: difficulty: 50 graded requests; it takes 100"),
    ],
)
def test_what_the_verb_refuses(
    made: Path, tmp_path: Path, words: list[str], complaint: str
) -> None:
    out = tmp_path / "d.json"
    done = run(made / "m", "--data", made / "graded.jsonl", "--out", out, *words)
    assert isinstance(done.exception, ValueError) and complaint in str(done.exception)
    assert not out.exists()


def test_a_prompt_that_cannot_be_asked_is_named(made: Path) -> None:
    model = ElasticModel.from_pretrained(made / "m")
    turns = [{"role": "user", "content": "1+1"}]
    records = [
        Graded.model_validate(each | {"answer": "2"})
        for each in ({"prompt": "1+1"}, {"messages": turns})
    ]
    with pytest.raises(ValueError, match="record 2: messages need a chat template"):
        ask(model, records, ["small", "full"], 2)
    model.tokenizer = letters_tokenizer(chat=True)
    assert records[1].ids(model.tokenizer) == records[0].ids(model.tokenizer)
    model.tokenizer = None
    with pytest.raises(ValueError, match="prompts need a tokenizer"):
        ask(model, records, ["small", "full"], 2)


def test_a_request_from_probe_to_choice(made: Path, tmp_path: Path) -> None:
    """What a server does; the probe is how the small size's own answer begins."""
    out = tmp_path / "difficulty.json"
    words = ("--sizes", "small,full", "--max-tokens", 6, "--probe-tokens", 2)
    assert run(made / "m", "--data", made / "asked.jsonl", "--out", out, *words).exit_code == 0
    found, model = load(out), ElasticModel.from_pretrained(made / "m")
    setting = found.setting(0.7)
    sizes = [Size(name, model.sizes[name].active_params) for name in found.sizes]
    chooser = Chooser(sizes, [Pinned(), ByDifficulty(found.thresholds(0.7))])
    engine, chosen = Engine(model, max_length=64), []
    for text in PROMPTS[20:40]:
        ids = model.tokenizer(text)["input_ids"]
        engine.submit(Request(ids, found.sizes[0], 2, Sampling(logprobs=20)))
        events = [event for _ in range(2) for event in engine.step()]
        probe = probe_of(events, setting.probe_tokens)
        known = found.of(text, len(ids), probe, setting.probe_tokens)
        chosen.append(chooser.choose(Wish(len(ids), 6, difficulty=known), IDLE).size)
        whole = engine.generate([ids], "small", 6)[0]
        assert [event.token for event in events] == whole[:2]
    assert chosen == ["small", "full"] * 10
