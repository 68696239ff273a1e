"""The demonstration's problems have the right answers, and their two sides share nothing."""

import contextlib
import importlib.util
import io
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

DEMO = Path(__file__).parent.parent / "demo"
SPLITS = ("train", "heldout")


def load(name: str) -> ModuleType:
    """Import a file of the demonstration, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


problems = load("problems")
tokenizer_module = load("tokenizer")


@pytest.fixture(scope="module")
def made() -> dict[str, list[dict[str, str]]]:
    return {
        "train": problems.make_problems(3000, "train", 0),
        "heldout": problems.make_problems(600, "heldout", 0),
    }


@pytest.fixture(scope="module")
def tokenizer(made: dict[str, list[dict[str, str]]]) -> PreTrainedTokenizerFast:
    texts = (f"{p['prompt']}\n{p['completion']}" for p in made["train"])
    return tokenizer_module.build_tokenizer(texts, 512)


def of_task(made: dict[str, list[dict[str, str]]], task: str) -> list[dict[str, str]]:
    return [p for split in SPLITS for p in made[split] if p["task"] == task]


def thinking_of(problem: dict[str, str]) -> str:
    match = re.fullmatch(r"<think>(.*)</think>(.*)", problem["completion"], re.DOTALL)
    assert match is not None
    assert match[2] == problem["answer"]
    return match[1]


def asked_facts(prompt: str) -> list[tuple[str, str, str]]:
    """Answer a knowledge question from the world, reading the question itself."""
    asked = prompt.removeprefix("What is ").removesuffix("?").removeprefix("the ")
    words = asked.split("'s ") if "'s " in asked else re.split(" of (?:the )?", asked)[::-1]
    facts = problems.world()
    chain, thing = [], words[0]
    for relation in words[1:]:
        chain.append((thing, relation, facts[thing, relation]))
        thing = chain[-1][2]
    return chain


def test_files_are_the_same_for_a_seed_and_differ_between_seeds(tmp_path: Path) -> None:
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        out = str(tmp_path / folder)
        problems.main(["--out", out, "--train", "90", "--heldout", "30", "--seed", str(seed)])
    for split, count in (("train", 90), ("heldout", 30)):
        first, second, other = (
            (tmp_path / folder / f"{split}.jsonl").read_bytes() for folder in "abc"
        )
        assert first == second != other
        lines = [json.loads(line) for line in first.splitlines()]
        assert len(lines) == count
        assert all(set(p) == {"task", "prompt", "completion", "answer"} for p in lines)


def test_the_heldout_side_is_balanced_and_has_no_prompt_twice(
    made: dict[str, list[dict[str, str]]],
) -> None:
    tasks = [p["task"] for p in made["heldout"]]
    assert [tasks.count(task) for task in problems.TASKS] == [200, 200, 200]
    assert len({p["prompt"] for p in made["heldout"]}) == 600


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (2, 0)])
def test_the_two_sides_share_no_prompt_whatever_the_seed(seeds: tuple[int, int]) -> None:
    train = problems.make_problems(3000, "train", seeds[0])
    heldout = problems.make_problems(300, "heldout", seeds[1])
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in heldout}


def test_heldout_pairs_of_facts_are_never_chained_in_training() -> None:
    pairs: dict[str, list[set[tuple]]] = {}
    for split in SPLITS:
        chains = [asked_facts(p["prompt"]) for p in problems.knowledge_problems(split)]
        pairs[split] = [set(itertools.pairwise(chain)) for chain in chains]
    trained = set().union(*pairs["train"])
    assert all(asked - trained for asked in pairs["heldout"])


def test_every_single_fact_is_asked_in_training() -> None:
    facts = {(*key, value) for key, value in problems.world().items()}
    chains = [asked_facts(p["prompt"]) for p in problems.knowledge_problems("train")]
    assert {chain[0] for chain in chains if len(chain) == 1} == facts


def test_mathematics_answers_are_right(made: dict[str, list[dict[str, str]]]) -> None:
    for problem in of_task(made, "mathematics"):
        thinking, prompt, answer = thinking_of(problem), problem["prompt"], problem["answer"]
        if prompt.startswith("What is "):
            forms = thinking.split("=")
            assert forms[0] == prompt[8:-1]
            assert [len(re.findall(r"[-+*]", form)) for form in forms] == [3, 2, 1, 0]
            assert {eval(form) for form in forms} == {int(answer)}
        else:
            steps = [step.split("=") for step in thinking.split(", ")]
            assert len(steps) == 3
            assert all(eval(left) == int(right) for left, right in steps)
            assert told(prompt) == int(answer)


def told(story: str) -> int:
    """Work a story out from its words alone."""
    first, *parts = story.removesuffix(". How many?").split(", ")
    value = int(first.split()[2])
    for part in parts:
        verb, number = part.split()
        if number == "them":
            value *= {"doubled": 2, "tripled": 3}[verb]
        else:
            value += int(number) * {"found": 1, "got": 1, "ate": -1, "lost": -1}[verb]
    return value


def test_programs_print_their_answers(made: dict[str, list[dict[str, str]]]) -> None:
    for problem in of_task(made, "code"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(problem["prompt"].removeprefix("Run:\n"), {})
        assert printed.getvalue() == problem["answer"] + "\n"
        assert f"={problem['answer']}" in thinking_of(problem)


def test_knowledge_answers_follow_from_the_world(
    made: dict[str, list[dict[str, str]]],
) -> None:
    for problem in of_task(made, "knowledge"):
        chain = asked_facts(problem["prompt"])
        assert problem["answer"] == chain[-1][2]
        recalled = " ".join(
            f"{relation} of {thing} is {value}." for thing, relation, value in chain
        )
        assert thinking_of(problem) == recalled


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        problems.make_problems(3, "test", 0)
    with pytest.raises(ValueError, match="heldout knowledge problems"):
        problems.make_problems(3 * 10**4, "heldout", 0)
    with pytest.raises(ValueError, match="at least 262"):
        tokenizer_module.build_tokenizer(["a"], 100)


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encoding(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_problems_survive_encoding_and_digits_stand_alone(
    tokenizer: PreTrainedTokenizerFast, made: dict[str, list[dict[str, str]]]
) -> None:
    for problem in made["heldout"]:
        ids = tokenizer(problem["completion"])["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == problem["completion"]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert tokens.count("<think>") == tokens.count("</think>") == 1
        assert all(len(token) == 1 for token in tokens if re.search(r"\d", token))


def test_the_tokenizer_comes_back_from_a_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer) <= 512
    assert (again.pad_token_id, again.eos_token) == (0, "<|end|>")
    question = {"role": "user", "content": "What is (1+2)*3?"}
    reply = {"role": "assistant", "content": "<think>1+2=3</think>9"}
    asked = again.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = again.apply_chat_template([question, reply], tokenize=False)
    assert asked == "<|user|>What is (1+2)*3?<|end|><|assistant|>"
    assert whole == asked + "<think>1+2=3</think>9<|end|>"
    assert again(whole)["input_ids"] == tokenizer(whole)["input_ids"]
    assert again.decode(again(whole)["input_ids"], skip_special_tokens=True) == (
        "What is (1+2)*3?<think>1+2=3</think>9"
    )
