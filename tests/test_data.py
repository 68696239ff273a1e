"""The packed stream: every document once an epoch, any place found again; and the padded order."""

import itertools
import json
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import letters_tokenizer

from star_elastic.records import Batch, Example, Record
from star_elastic.train.data import Source, Stream, cut, fit


class Tokens:
    """A tokenizer of space-separated numbers: documents can say which one they are."""

    chat_template = None
    eos_token_id = None

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def document(number: int, length: int, prompt: int = 0) -> Record:
    """`length` tokens, all of them `number`, the first `prompt` of which are given."""
    words = [str(number)] * length
    return Record(" ".join(words[:prompt]), " ".join(words[prompt:]), "t", "")


def source(name: str, lengths: list[int], weight: float = 1.0, first: int = 1) -> Source:
    """A source whose documents are numbered from `first`."""
    records = [document(first + n, length) for n, length in enumerate(lengths)]
    return Source(name, weight, records, Tokens())


def contents(batch: Batch | None) -> Any:
    assert batch is not None
    tensors = (batch.input_ids, batch.mask, batch.targets, batch.documents)
    return [tensor.tolist() for tensor in tensors if tensor is not None]


def documents(batch: Batch) -> list[list[int]]:
    """The documents of packed rows, as tokens; padding is left out."""
    assert batch.documents is not None
    found = []
    for row in zip(
        *(t.tolist() for t in (batch.documents, batch.mask, batch.input_ids)), strict=True
    ):
        real = [(number, token) for number, mask, token in zip(*row, strict=True) if mask]
        for _, tokens in itertools.groupby(real, key=lambda pair: pair[0]):
            found.append([token for _, token in tokens])
    return found


lengths = st.lists(st.integers(2, 30), min_size=1, max_size=40)
streams = st.builds(
    lambda sizes, others, weight, length, rows, seed: Stream(
        [source("a", sizes), source("b", others, weight, first=1000)], length, rows, 0, seed
    ),
    lengths,
    lengths,
    st.floats(0.1, 10),
    st.integers(2, 40),
    st.integers(1, 5),
    st.integers(0, 5),
)


def fresh(stream: Stream) -> Stream:
    """A stream of the same sources and settings, at its start."""
    sources = [order.source for order in stream.orders.values()]
    return Stream(sources, stream.sequence_length, stream.rows, stream.pad, stream.seed)


@settings(max_examples=40, deadline=None)
@given(stream=streams, taken=st.integers(0, 100))
def test_any_place_is_found_again(stream: Stream, taken: int) -> None:
    stream.take(taken, keep=lambda _: False)
    state = json.loads(json.dumps(stream.state))
    expected = [contents(batch) for batch in stream.take(60)]
    again = fresh(stream)
    again.take(7)
    again.seek(state)
    assert again.state == state
    assert [contents(batch) for batch in again.take(60)] == expected
    assert again.state == stream.state


@settings(max_examples=30, deadline=None)
@given(stream=streams)
def test_what_others_build_is_not_built(stream: Stream) -> None:
    whole = fresh(stream).take(9)
    mine = stream.take(9, keep=lambda number: number % 3 == 1)
    assert [n for n, batch in enumerate(mine) if batch is not None] == [1, 4, 7]
    for number in (1, 4, 7):
        assert contents(mine[number]) == contents(whole[number])
    assert contents(next(stream)) == contents(fresh(stream).take(10)[9])


@settings(max_examples=30, deadline=None)
@given(stream=streams, count=st.integers(1, 8))
def test_micro_batches_are_packed_rows(stream: Stream, count: int) -> None:
    for batch in itertools.islice(stream, count):
        shape = (stream.rows, stream.sequence_length)
        assert batch.documents is not None and batch.documents.dtype == torch.int32
        for tensor in (batch.input_ids, batch.mask, batch.targets, batch.documents):
            assert tensor.shape == shape
        starts = batch.inputs["position_ids"] == 0
        assert starts[:, 0].all()
        assert not (batch.targets & starts).any() and not (batch.targets & ~batch.mask).any()
        assert torch.equal(batch.targets, batch.mask & ~starts)
        assert batch.inputs["seq_idx"] is batch.documents
        for tokens in documents(batch):
            assert len(set(tokens)) == 1 and len(tokens) <= stream.sequence_length


@settings(max_examples=15, deadline=None)
@given(
    sizes=lengths,
    others=lengths,
    seed=st.integers(0, 5),
    weight=st.floats(0.2, 5),
    windows=st.integers(1, 3),
)
def test_every_document_comes_once_an_epoch(
    sizes: list[int], others: list[int], seed: int, weight: float, windows: int
) -> None:
    """After any window, all documents of a source came equally often, or some once more."""
    sources = [source("a", sizes), source("b", others, weight, first=1000)]
    stream = Stream(sources, 30, 1, 0, seed)  # no document is longer than a row
    seen: Counter[int] = Counter()
    for batch in stream:
        if stream.state["window"] == windows:
            break
        seen.update(tokens[0] for tokens in documents(batch))
    for each, first in zip(sources, (1, 1000), strict=True):
        times = [seen[first + n] for n in range(len(each.records))]
        assert sum(times) == stream.state["drawn"][each.name]
        assert max(times) - min(times) <= 1


def test_an_epoch_may_take_many_windows() -> None:
    """2000 documents of 30 tokens do not fit in one window of 64 rows of 40."""
    stream = Stream([source("a", [30] * 2000)], 40, 1, 0, seed=3)
    seen: Counter[int] = Counter()
    for batch in stream:
        if stream.state["drawn"]["a"] > 1500:
            break
        seen.update(tokens[0] for tokens in documents(batch))
    assert stream.state["window"] > 3
    assert seen.total() == stream.state["drawn"]["a"] and set(seen.values()) == {1}


def test_a_long_document_is_cut_and_nothing_of_it_lost() -> None:
    stream = Stream([source("a", [70])], 32, 1, 0, seed=0)
    found = Counter(len(tokens) for _ in range(60) for tokens in documents(next(stream)))
    assert set(found) == {32, 6}
    assert next(iter(cut(Example(list(range(70)), [(1, 70)]), 32))).spans == [(1, 32)]


@given(
    length=st.integers(1, 60),
    row=st.integers(1, 20),
    spans=st.sets(st.integers(1, 60), max_size=8),
)
def test_pieces_keep_tokens_and_targets(length: int, row: int, spans: set[int]) -> None:
    edges = sorted(n for n in spans if n <= length)
    whole = Example(list(range(length)), pairs(edges))
    learned = {n for a, b in whole.spans for n in range(a, b)}
    found: list[int] = []
    for piece in cut(whole, row):
        assert 0 < len(piece.ids) <= row
        found += [piece.ids[n] for a, b in piece.spans for n in range(a, b)]
        assert all(a > 0 for a, _ in piece.spans)
    assert found == sorted(n for n in learned if n % row)


def pairs(edges: list[int]) -> list[tuple[int, int]]:
    return list(zip(edges[::2], edges[1::2], strict=False))


@given(sizes=st.lists(st.integers(1, 20), max_size=60))
def test_rows_hold_every_piece_and_no_more_than_fits(sizes: list[int]) -> None:
    rows = fit([Example([n] * size, []) for n, size in enumerate(sizes)], 20)
    lengths = [sum(len(piece.ids) for piece in row) for row in rows]
    assert all(length <= 20 for length in lengths)
    assert sum(2 * length <= 20 for length in lengths) <= 1  # else two of them would be one
    assert sorted(piece.ids[0] for row in rows for piece in row) == list(range(len(sizes)))


def test_rows_are_nearly_full() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(4, 60, (3000,), generator=draw).tolist()
    stream = Stream([source("a", sizes)], 256, 8, 0, seed=0)
    batches = list(itertools.islice(stream, 60))
    fill = sum(batch.tokens for batch in batches) / (60 * 8 * 256)
    print(f"fill {fill:.4f}")
    assert fill >= 0.9


def test_sources_come_by_weight() -> None:
    sources = [source("a", [5] * 50, 3.0), source("b", [5] * 50, 1.0, first=1000)]
    stream = Stream(sources, 40, 4, 0, seed=0)
    seen = [tokens[0] >= 1000 for _ in range(200) for tokens in documents(next(stream))]
    assert 0.2 < sum(seen) / len(seen) < 0.3


def test_the_seed_decides() -> None:
    streams = [Stream([source("a", [5] * 50)], 40, 4, 0, seed) for seed in (0, 0, 1)]
    first, same, other = ([contents(batch) for batch in stream.take(20)] for stream in streams)
    assert first == same != other


def test_epochs_differ_in_order() -> None:
    stream = Stream([source("a", [40] * 500)], 40, 1, 0, seed=0)
    first, second = (
        [tokens[0] for _ in range(500) for tokens in documents(next(stream))] for _ in range(2)
    )
    assert sorted(first[:10]) != sorted(second[:10])


def test_a_real_tokenizer_and_losses_on_completions() -> None:
    records = [Record(f"{a}+{b}=", str(a + b), "sum", "") for a in range(5) for b in range(5)]
    stream = Stream([Source("s", 1.0, records, letters_tokenizer(), "completion")], 64, 2, 0, 0)
    batch = next(stream)
    words = letters_tokenizer().convert_ids_to_tokens(batch.input_ids[batch.targets].tolist())
    assert set(words) <= {*"0123456789", "<eos>"}
    before = batch.input_ids.roll(1, 1)[batch.targets & ~batch.targets.roll(1, 1)]
    assert set(letters_tokenizer().convert_ids_to_tokens(before.tolist())) == {"="}


def test_documents_without_a_target_are_passed_over() -> None:
    records = [document(1, 1), document(2, 8), Record("3 3 3", "", "t", "")]
    stream = Stream([Source("a", 1.0, records, Tokens(), "completion")], 16, 2, 0, 0)
    seen = {tokens[0] for _ in range(40) for tokens in documents(next(stream))}
    assert seen == {2}


def test_nothing_to_learn_is_an_error() -> None:
    with pytest.raises(ValueError, match="^no example has a token to learn from$"):
        next(Stream([source("a", [1] * 20000), source("b", [1, 1])], 8, 1, 0, 0))


def test_a_rare_example_is_waited_for() -> None:
    """Several windows without a row are no end of the stream."""
    sizes = [1] * 20000
    sizes[7] = 3
    stream = Stream([source("a", sizes)], 8, 1, 0, 0)
    assert [tokens for _ in range(3) for tokens in documents(next(stream))] == [[8, 8, 8]] * 3
    state, expected = stream.state, contents(next(stream))
    again = fresh(stream)
    again.seek(state)
    assert state["window"] > 3 and contents(next(again)) == expected


@pytest.mark.parametrize(
    ("sources", "match"),
    [
        ([], r"sources: names \[\] are none or not all different"),
        ([source("a", [5]), source("a", [6])], r"sources: names \['a', 'a'\]"),
        ([source("a", [])], "source a: 0 records and weight 1.0: both must be positive"),
        ([source("a", [5], 0.0)], "source a: 1 records and weight 0.0"),
        ([source("a", [5], float("nan"))], "source a: 1 records and weight nan"),
    ],
)
def test_sources_that_cannot_be_drawn_from(sources: list[Source], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Stream(sources, 8, 1, 0, 0)


def test_a_state_of_other_sources_is_refused() -> None:
    state = Stream([source("a", [5])], 8, 1, 0, 0).state
    with pytest.raises(ValueError, match=r"sources \['a'\], but these are \['b'\]"):
        Stream([source("b", [5])], 8, 1, 0, 0).seek(state)


def test_a_conversation_that_cannot_be_rendered_names_its_source() -> None:
    record = Record("", "b", "t", "", ({"role": "assistant", "content": "b"},))
    with pytest.raises(ValueError, match="source talk: messages need a chat template"):
        next(Stream([Source("talk", 1.0, [record], letters_tokenizer())], 8, 1, 0, 0))
