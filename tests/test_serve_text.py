"""The stream, joined, is the text of the whole; stop strings never leak; reasoning is split off."""

import random

import pytest
from byte_level import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from star_elastic.serve.text import Parts, Reasoning, StopStrings, TextStream, pieces

BYTE_LEVEL = tokenizer().backend_tokenizer
PIECES = pieces(BYTE_LEVEL)
TEXTS = st.text(alphabet="abé😀 ", max_size=24)


def streamed(
    tokens: list[int], stops: list[str] | None = None, reasoning: Reasoning | None = None
) -> tuple[list[Parts], TextStream]:
    stream = TextStream(PIECES, stops or [], reasoning)
    shown = [stream.push(token) for token in tokens]
    return [*shown, stream.finish()], stream


def content(parts: list[Parts]) -> str:
    return "".join(each.content for each in parts)


def cut(text: str, draw: random.Random) -> list[str]:
    """The text in random pieces, some of them empty."""
    ends = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, len(text))))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


def test_ten_thousand_random_sequences_stream_as_the_tokenizer_decodes() -> None:
    draw = random.Random(0)
    broken = 0
    for _ in range(10_000):
        tokens = [draw.randrange(len(PIECES)) for _ in range(draw.randint(0, 24))]
        whole = BYTE_LEVEL.decode(tokens, skip_special_tokens=True)
        assert content(streamed(tokens)[0]) == whole
        broken += "\ufffd" in whole
    assert broken > 5_000  # most hold what is no UTF-8


@given(st.text(max_size=40))
@settings(max_examples=500, deadline=None)
def test_text_streams_whole_characters(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    parts = streamed(tokens)[0]
    assert content(parts) == BYTE_LEVEL.decode(tokens, skip_special_tokens=True)
    if "\ufffd" not in text and "<" not in text:
        assert content(parts) == text
        assert "\ufffd" not in "".join(each.content for each in parts)


def test_at_most_three_bytes_wait() -> None:
    emoji = BYTE_LEVEL.encode("𐎀", add_special_tokens=False).ids
    assert len(emoji) == 4  # one token a byte
    parts, _ = streamed([*emoji[:3], *emoji])
    assert [each.content for each in parts] == ["", "", "", "\ufffd", "", "", "𐎀", ""]


def test_special_tokens_are_silent_unless_kept() -> None:
    kept = pieces(BYTE_LEVEL, keep=["<turn>"])
    ids = BYTE_LEVEL.get_vocab()
    assert kept[ids["<turn>"]] == b"<turn>" and kept[ids["</s>"]] == b""
    assert PIECES[ids["<turn>"]] == b""


def test_byte_fallback_and_a_decoder_without_bytes() -> None:
    core = Tokenizer(models.BPE(vocab={"\u2581hi": 0, "<0xC3>": 1, "<0xA9>": 2}, merges=[]))
    with pytest.raises(ValueError, match="decoder None cannot be streamed"):
        pieces(core)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # type: ignore
    assert pieces(core) == [b" hi", b"\xc3", b"\xa9"]
    core.decoder = decoders.WordPiece()  # type: ignore
    with pytest.raises(ValueError, match="WordPiece cannot be streamed"):
        pieces(core)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: read letter by letter until a stop string is complete."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    TEXTS,
    st.lists(st.text(alphabet="abé😀 ", min_size=1, max_size=4), max_size=4),
    st.integers(0, 2**32),
)
@settings(max_examples=3_000, deadline=None)
def test_stop_strings_end_the_text_however_it_is_cut(
    text: str, stops: list[str], seed: int
) -> None:
    watch, expected = StopStrings(stops), first_stop(text, stops)
    shown = ""
    for piece in cut(text, random.Random(seed)):
        shown += watch.push(piece)
        assert expected[0].startswith(shown)  # nothing shown has to be taken back
    if watch.found is None:
        shown += watch.finish()
    assert (shown, watch.found) == expected


def test_stop_strings_through_tokens_never_leak() -> None:
    draw = random.Random(1)
    for _ in range(2_000):
        tokens = [draw.randrange(5, len(PIECES)) for _ in range(16)]
        text = BYTE_LEVEL.decode(tokens)
        at = draw.randrange(len(text))
        stop = text[at : at + draw.randint(1, 5)]
        parts, stream = streamed(tokens, [stop])
        assert stream.stopped == stop
        assert content(parts) == text[: text.index(stop)]


def test_two_stops_one_inside_the_other() -> None:
    watch = StopStrings(["abcd", "bc"])
    assert [watch.push(letter) for letter in "xabcd"] == ["x", "", "", "a", ""]
    assert watch.found == "bc"
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])


def split(text: str, seed: int, inside: bool = False) -> Parts:
    reasoning, shown = Reasoning(inside=inside), Parts()
    for piece in cut(text, random.Random(seed)):
        shown += reasoning.push(piece)
    return shown + reasoning.finish()


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "answer"),
    [
        ("<think>why</think>so", False, "why", "so"),
        ("\n <think>why</think>\nso", False, "why", "\nso"),
        ("why</think>so", True, "why", "so"),
        ("<think>why</think>so", True, "why", "so"),  # opened twice
        ("</think>so", True, "", "so"),
        ("<think></think>", False, "", ""),
        ("<think>never done </thin", False, "never done </thin", ""),
        ("<think", False, "", "<think"),
        ("<thin", True, "<thin", ""),
        (" so", False, "", " so"),
        ("so <think>no</think>", False, "", "so <think>no</think>"),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ],
)
def test_reasoning_is_split_off_however_it_is_cut(
    text: str, inside: bool, reasoning: str, answer: str
) -> None:
    for seed in range(100):
        assert split(text, seed, inside) == Parts(reasoning, answer)


@given(TEXTS, TEXTS, st.integers(0, 2**32))
@settings(max_examples=500, deadline=None)
def test_any_reasoning_and_any_answer(why: str, so: str, seed: int) -> None:
    assert split(f"<think>{why}</think>{so}", seed) == Parts(why, so)


@pytest.mark.parametrize(("inside", "opening"), [(False, "<think>"), (True, "")])
def test_tokens_of_the_reasoning_are_counted_with_their_marks(inside: bool, opening: str) -> None:
    def ids(text: str) -> list[int]:
        return BYTE_LEVEL.encode(text, add_special_tokens=False).ids

    thought, answer = ids(f"{opening}hmm</think>"), ids("yes")
    parts, stream = streamed([*thought, *answer], ["</thunk>", "yes!"], Reasoning(inside=inside))
    assert sum(parts, Parts()) == Parts("hmm", "yes")
    assert (stream.tokens, stream.reasoning_tokens) == (len(thought + answer), len(thought))
    _, silent = streamed(answer, reasoning=Reasoning())
    assert silent.reasoning_tokens == 0
    parts, stopped = streamed([*thought, *answer], ["mm"], Reasoning(inside=inside))
    assert sum(parts, Parts()) == Parts("h", "") and stopped.stopped == "mm"


def test_reasoning_held_for_a_stop_is_shown_before_the_answer() -> None:
    tokens = BYTE_LEVEL.encode("<think>hmm</think>yes", add_special_tokens=False).ids
    parts, _ = streamed(tokens, ["m!"], Reasoning())
    first = next(n for n, part in enumerate(parts) if part.content)
    assert sum(parts[: first + 1], Parts()).reasoning == "hmm"
    assert all(part.reasoning == "" for part in parts[first + 1 :])
