"""The budget of thinking holds to the token, wherever the marks and characters are cut."""

from byte_level import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from star_elastic.serve.forcing import Forcing, Marks
from star_elastic.serve.text import Parts, TextStream, pieces

TOKENIZER = tokenizer().backend_tokenizer
PIECES = pieces(TOKENIZER)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


MARKS = Marks("<think>", "</think>", ids)
END = ids("</think>")


def answered(
    thought: str, answer: str, budget: int, inside: bool = False, ends: bool = True
) -> tuple[list[int], Parts]:
    """The tokens of a model that thinks something, ends that unless it is made to, and answers."""
    forcing = Forcing(PIECES, MARKS, budget, inside)
    text = TextStream(PIECES, reasoning=MARKS.reasoning(inside))
    wanted = [*([] if inside else ids("<think>")), *ids(thought), *(END if ends else [])]
    made, parts, forced = [], Parts(), list(forcing.first)
    answering = False
    while forced or wanted or not answering:
        if not forced and not answering and (text.answers or not wanted):
            wanted, answering = ids(answer), True
        token = forced.pop(0) if forced else wanted.pop(0)
        made.append(token)
        parts += text.push(token)
        forced += forcing(token)
    return made, parts + text.finish()


@given(budget=st.integers(0, 12), length=st.integers(0, 20), inside=st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_more_is_thought_than_the_budget(budget: int, length: int, inside: bool) -> None:
    assert len(END) > 3
    made, parts = answered("a" * length, "yes", budget, inside)
    assert parts == Parts("a" * min(budget, length), "yes")
    assert len(made) == len(ids("<think>")) * (not inside) + min(budget, length) + len(END) + 3


def test_a_character_is_never_cut() -> None:
    assert len(ids("𐎀")) == 4
    for budget in (1, 2, 3, 4):
        assert answered("𐎀𐎀", "yes", budget)[1] == Parts("𐎀", "yes")


def test_what_looks_like_the_end_is_made_the_end() -> None:
    assert answered("a</thought", "yes", 3)[1] == Parts("a", "yes")
    assert answered("a</thought", "yes", 30)[1] == Parts("a</thought", "yes")


def test_an_answer_without_reasoning_is_left_alone() -> None:
    forcing = Forcing(PIECES, MARKS, 0, inside=False)
    assert [
        *forcing.first,
        *(forced for token in ids("no thoughts") for forced in forcing(token)),
    ] == []


def test_only_the_first_block_counts() -> None:
    _, parts = answered("aa", "<think>more</think>", 1)
    assert parts == Parts("a", "<think>more</think>")
