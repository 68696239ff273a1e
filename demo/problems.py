"""Make short problems whose solutions think step by step before they answer.

Three kinds of problem, each written as one JSON object with the keys ``task``, ``prompt``,
``completion`` (``<think>...</think>`` and then the answer) and ``answer``:

* ``mathematics``: an expression or a short story that takes three steps of arithmetic;
* ``code``: what a small Python program prints, with its variables traced line by line;
* ``knowledge``: questions that chain two or three facts of one invented, fixed world.

A problem belongs to the training or the held-out side by a hash of what it asks, so that the two
sides cannot share a prompt whatever the seed. For ``knowledge`` the hash is taken over pairs of
facts: a pair kept for the held-out side is never chained in a training problem, while every
single fact is asked on the training side.

    python demo/problems.py --out data --train 20000 --heldout 600 --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TASKS = ("mathematics", "code", "knowledge")
SPLITS = ("train", "heldout")

_MAX_VALUE = 60
_HELDOUT_ONE_IN = 8
_WORLD_SEED = 2718

_PERSON_LINKS = ("friend", "teacher")
_LINKS = {"town": ("river", "crop"), "guild": ("tool", "color"), "pet": ("food", "trick")}
_COUNTS = {
    "person": 32, "town": 8, "guild": 8, "pet": 8,
    "river": 6, "crop": 6, "tool": 6, "color": 6, "food": 6, "trick": 6,
}  # fmt: skip


def completion_of(thinking: str, answer: str) -> str:
    """Return the text a model should write: the thinking, closed, and then the answer."""
    return f"<think>{thinking}</think>{answer}"


def _problem(task: str, prompt: str, thinking: str, answer: str) -> dict[str, str]:
    completion = completion_of(thinking, answer)
    return {"task": task, "prompt": prompt, "completion": completion, "answer": answer}


def _split_of(key: str) -> str:
    """Return the side a key belongs to; it depends on nothing but the key."""
    digest = hashlib.sha256(key.encode()).digest()
    return "heldout" if digest[0] % _HELDOUT_ONE_IN == 0 else "train"


# --- mathematics -------------------------------------------------------------------------------


def _apply(left: int, op: str, right: int) -> int | None:
    """Return the value of one step, or None where the step is not allowed."""
    if op == "*":
        fits = min(left, right) in range(2, 6) and max(left, right) <= 12
        value = left * right if fits else -1
    else:
        value = left + right if op == "+" else left - right
    return value if 0 <= value <= _MAX_VALUE else None


# A number, or an operator between two expressions.
Expression = int | tuple["Expression", str, "Expression"]


def _value(expression: Expression) -> int | None:
    """Return the value of an expression, or None where one of its steps is not allowed."""
    if isinstance(expression, int):
        return expression
    left, right = _value(expression[0]), _value(expression[2])
    return None if left is None or right is None else _apply(left, expression[1], right)


def _text(expression: Expression, inner: bool = False) -> str:
    if isinstance(expression, int):
        return str(expression)
    left, op, right = expression
    text = f"{_text(left, True)}{op}{_text(right, True)}"
    return f"({text})" if inner else text


def _step(expression: Expression) -> Expression:
    """Return the expression with its first bracket that holds two numbers worked out."""
    assert not isinstance(expression, int)
    left, op, right = expression
    if not isinstance(left, int):
        return _step(left), op, right
    if not isinstance(right, int):
        return left, op, _step(right)
    value = _apply(left, op, right)
    assert value is not None
    return value


def _random_expression(rng: random.Random, ops: int) -> Expression:
    if ops == 0:
        return rng.randint(1, 12)
    left = rng.randrange(ops)
    return (
        _random_expression(rng, left),
        rng.choice("+-*"),
        _random_expression(rng, ops - 1 - left),
    )


def _expression_problem(rng: random.Random) -> dict[str, str]:
    expression = _random_expression(rng, 3)
    while _value(expression) is None:
        expression = _random_expression(rng, 3)
    forms = [expression]
    while not isinstance(forms[-1], int):
        forms.append(_step(forms[-1]))
    texts = [_text(form) for form in forms]
    return _problem("mathematics", f"What is {texts[0]}?", "=".join(texts), texts[-1])


_VERBS = (("found", "+"), ("got", "+"), ("ate", "-"), ("lost", "-"))
_MULTIPLES = (("doubled", 2), ("tripled", 3))


def _story_step(rng: random.Random, value: int) -> tuple[str, str, int] | None:
    """Return one step of a story: its words, the step as arithmetic, and the value after it."""
    if rng.random() < 0.3:
        verb, number = rng.choice(_MULTIPLES)
        op, words = "*", f"{verb} them"
    else:
        verb, op = rng.choice(_VERBS)
        number = rng.randint(1, 12)
        words = f"{verb} {number}"
    after = _apply(value, op, number)
    return None if after is None else (words, f"{value}{op}{number}={after}", after)


def _story_problem(rng: random.Random) -> dict[str, str]:
    value = rng.randint(2, 20)
    words = [f"I had {value} {rng.choice(('figs', 'nuts', 'eggs'))}"]
    steps: list[str] = []
    while len(steps) < 3:
        step = _story_step(rng, value)
        if step is not None:
            words.append(step[0])
            steps.append(step[1])
            value = step[2]
    prompt = ", ".join(words) + ". How many?"
    return _problem("mathematics", prompt, ", ".join(steps), str(value))


def mathematics_problem(rng: random.Random) -> dict[str, str]:
    """Return one problem of three arithmetic steps, as an expression or as a short story."""
    return rng.choice((_expression_problem, _story_problem))(rng)


# --- code --------------------------------------------------------------------------------------


@dataclass
class _Program:
    """A program under construction, which changes one variable and leaves another alone."""

    target: str
    other: str
    values: dict[str, int]
    lines: list[str]
    trace: list[str]

    def run(self, op: str, operand: str) -> bool:
        """Run ``target = target op operand``; False where its value is not an allowed one."""
        left = self.values[self.target]
        right = self.values[operand] if operand in self.values else int(operand)
        value = _apply(left, op, right)
        if value is None:
            return False
        self.values[self.target] = value
        self.trace.append(f"{self.target}={self.target}{op}{operand}={left}{op}{right}={value}")
        return True


def _assign(rng: random.Random, program: _Program, indent: str = "") -> tuple[str, str]:
    """Write the line of a random change to the target and return its operator and operand."""
    operand = program.other if rng.random() < 0.5 else str(rng.randint(1, 9))
    op = rng.choice("+-")
    program.lines.append(f"{indent}{program.target}={program.target}{op}{operand}")
    return op, operand


def _plain_block(rng: random.Random, program: _Program) -> bool:
    return program.run(*_assign(rng, program)) and program.run(*_assign(rng, program))


def _if_block(rng: random.Random, program: _Program) -> bool:
    name, other = rng.sample((program.target, program.other), 2)
    left, right = program.values[name], program.values[other]
    sign = rng.choice("<>")
    holds = left < right if sign == "<" else left > right
    program.lines.append(f"if {name}{sign}{other}:")
    program.trace.append(f"{name}{sign}{other}, {left}{sign}{right} {'yes' if holds else 'no'}")
    then = _assign(rng, program, " ")
    program.lines.append("else:")
    otherwise = _assign(rng, program, " ")
    return program.run(*(then if holds else otherwise))


def _loop_block(rng: random.Random, program: _Program) -> bool:
    times = rng.randint(2, 3)
    program.lines.append(f"for i in range({times}):")
    step = _assign(rng, program, " ")
    return all(program.run(*step) for _ in range(times))


def _try_program(rng: random.Random) -> _Program | None:
    values = {name: rng.randint(1, 20) for name in rng.sample("abcxyz", 2)}
    target, other = rng.sample(sorted(values), 2)
    starts = [f"{name}={value}" for name, value in values.items()]
    program = _Program(target, other, values, list(starts), list(starts))
    block = rng.choice((_plain_block, _if_block, _loop_block))
    return program if block(rng, program) else None


def code_problem(rng: random.Random) -> dict[str, str]:
    """Return one problem that asks what a small program prints."""
    program = None
    while program is None:
        program = _try_program(rng)
    source = "\n".join([*program.lines, f"print({program.target})"])
    answer = str(program.values[program.target])
    return _problem("code", f"Run:\n{source}", ", ".join(program.trace), answer)


# --- knowledge ---------------------------------------------------------------------------------

Fact = tuple[str, str, str]


def _words(rng: random.Random, length: int, count: int, taken: set[str]) -> list[str]:
    """Return new pronounceable words, none of them in ``taken``, and add them to it."""
    choices = list(itertools.islice(itertools.cycle(("bdfgklmnprstvz", "aeiou")), length))
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choice(choice) for choice in choices)
        if word not in taken:
            taken.add(word)
            found.append(word.capitalize())
    return found


def world() -> dict[tuple[str, str], str]:
    """Return the one invented world: the value of every (thing, relation), always the same."""
    rng = random.Random(_WORLD_SEED)
    taken: set[str] = set()
    lengths = {kind: 4 if kind == "person" else 3 for kind in _COUNTS}
    things = {kind: _words(rng, lengths[kind], count, taken) for kind, count in _COUNTS.items()}
    facts: dict[tuple[str, str], str] = {}
    for person in things["person"]:
        others = [other for other in things["person"] if other != person]
        for relation in _PERSON_LINKS:
            facts[person, relation] = rng.choice(others)
        for relation in _LINKS:
            facts[person, relation] = rng.choice(things[relation])
    for kind, relations in _LINKS.items():
        for thing, relation in itertools.product(things[kind], relations):
            facts[thing, relation] = rng.choice(things[relation])
    return facts


def _chain(facts: dict[tuple[str, str], str], start: str, path: tuple[str, ...]) -> list[Fact]:
    """Return the facts that lead from a thing along a path of relations."""
    chain: list[Fact] = []
    for relation in path:
        value = facts[start, relation]
        chain.append((start, relation, value))
        start = value
    return chain


def _paths() -> list[tuple[str, ...]]:
    """Return the chains of relations, from a person, that questions ask about."""
    ends = [(first, last) for first, lasts in _LINKS.items() for last in lasts]
    people = [(link, first) for link in _PERSON_LINKS for first in _LINKS]
    return [*ends, *people, *((link, *end) for link in _PERSON_LINKS for end in ends)]


def chain_split(chain: list[Fact]) -> str:
    """Return the side of a chain: held out if any two neighbouring facts of it are."""
    pairs = itertools.pairwise(chain)
    sides = {_split_of(json.dumps(pair)) for pair in pairs}
    return "heldout" if "heldout" in sides else "train"


def _knowledge_problem(chain: list[Fact], possessive: bool) -> dict[str, str]:
    start, relations = chain[0][0], [relation for _, relation, _ in chain]
    if possessive:
        asked = f"{start}'s " + "'s ".join(relations)
    else:
        asked = "the " + " of the ".join(reversed(relations)) + f" of {start}"
    thinking = " ".join(f"{relation} of {thing} is {value}." for thing, relation, value in chain)
    return _problem("knowledge", f"What is {asked}?", thinking, chain[-1][2])


def knowledge_problems(split: str) -> list[dict[str, str]]:
    """Return every knowledge problem of one side; single facts are on the training side."""
    facts = world()
    people = dict.fromkeys(thing for thing, relation in facts if relation in _PERSON_LINKS)
    chains = [_chain(facts, person, path) for person in people for path in _paths()]
    chosen = [chain for chain in chains if chain_split(chain) == split]
    if split == "train":
        chosen += [[(thing, relation, value)] for (thing, relation), value in facts.items()]
    return [_knowledge_problem(chain, form) for chain in chosen for form in (False, True)]


# --- data sets ---------------------------------------------------------------------------------

_MAKERS: dict[str, Callable[[random.Random], dict[str, str]]] = {
    "mathematics": mathematics_problem,
    "code": code_problem,
}


def _drawn(rng: random.Random, task: str, split: str) -> Iterator[dict[str, str]]:
    """Yield different problems of a task from one side, for as long as they are asked for."""
    seen: set[str] = set()
    while True:
        problem = _MAKERS[task](rng)
        if problem["prompt"] not in seen and _split_of(problem["prompt"]) == split:
            seen.add(problem["prompt"])
            yield problem


def _listed(rng: random.Random, split: str) -> Iterator[dict[str, str]]:
    """Yield the knowledge problems of a side in random order; the training side starts again."""
    problems = knowledge_problems(split)
    while True:
        yield from rng.sample(problems, len(problems))
        if split == "heldout":
            return


def make_problems(count: int, split: str, seed: int) -> list[dict[str, str]]:
    """Return ``count`` problems of one side, an equal share for each task, in random order.

    The same arguments always give the same problems. Held-out problems are all different.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    rng = random.Random(f"{split}-{seed}")
    chosen: list[dict[str, str]] = []
    for index, task in enumerate(TASKS):
        share = (count + index) // len(TASKS)
        source = _listed(rng, split) if task == "knowledge" else _drawn(rng, task, split)
        problems = list(itertools.islice(source, share))
        if len(problems) < share:
            raise ValueError(f"there are {len(problems)} {split} {task} problems, not {share}")
        chosen += problems
    rng.shuffle(chosen)
    return chosen


def write_jsonl(path: Path, problems: list[dict[str, str]]) -> None:
    """Write problems to a file, one JSON object a line."""
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Write ``train.jsonl`` and ``heldout.jsonl`` to a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=20000, help="number of training problems")
    parser.add_argument("--heldout", type=int, default=600, help="number of held-out problems")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", args.train), ("heldout", args.heldout)):
        write_jsonl(args.out / f"{split}.jsonl", make_problems(count, split, args.seed))


if __name__ == "__main__":
    main()
