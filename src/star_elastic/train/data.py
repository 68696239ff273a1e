"""An endless stream of packed micro-batches from a mix of sources; a seed decides all of it.

The stream is cut into windows. A window draws documents until they are worth some rows, packs
them, and shuffles the rows; micro-batches take the next rows, across windows. So a place in the
stream is a window, the documents drawn before it and the rows taken of it: going on there makes
that one window again, and no document is lost on the way.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from star_elastic.records import Batch, Example, LossOn, Record, encode, pack

_LEAST_ROWS = 64  # of a window: the last row is seldom full, and the order is shuffled within
_CHARACTERS = 3  # a token's, roughly; how many documents a window draws is decided before encoding

Row = list[Example]


@dataclass(frozen=True)
class Source:
    """A corpus: `weight` is its share of the documents drawn, relative to the other sources."""

    name: str
    weight: float
    records: Sequence[Record]
    tokenizer: Any
    loss_on: LossOn = "all"


@dataclass(frozen=True)
class Place:
    """Where a stream is: rows taken of a window, documents of each source drawn before it."""

    window: int = 0
    row: int = 0
    drawn: dict[str, int] = field(default_factory=dict)


def _every(_: int) -> bool:
    return True


class Stream:
    """Micro-batches of `rows` rows of exactly `sequence_length` tokens, for ever.

    Every source is read in an order of its own, each document once an epoch; a document's share of
    the stream follows from its source's weight. Documents longer than a row are cut into pieces,
    which are documents from there on. What has no token to learn from is passed over.

    Raises:
        ValueError: no sources, two of one name, one without records or with no positive weight.
    """

    def __init__(
        self, sources: Sequence[Source], sequence_length: int, rows: int, pad: int, seed: int
    ):
        names = [source.name for source in sources]
        if not sources or len(set(names)) < len(names):
            raise ValueError(f"sources: names {names} are none or not all different")
        for source in sources:
            if not source.records or not 0 < source.weight < float("inf"):
                what = f"{len(source.records)} records and weight {source.weight}"
                raise ValueError(f"source {source.name}: {what}: both must be positive")
        self.orders = {source.name: _Order(source, seed) for source in sources}
        self.sequence_length = sequence_length
        self.rows = rows
        self.pad = pad
        self.seed = seed
        self._place = Place(drawn=dict.fromkeys(self.orders, 0))
        self._window: _Window | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return pack(self._plan(), self.sequence_length, self.pad)

    def take(self, count: int, keep: Callable[[int], bool] = _every) -> list[Batch | None]:
        """The next micro-batches; those not kept (by their number here, from 0) are not built.

        Raises:
            ValueError: no document of any source has a token to learn from.
        """
        plans = [self._plan() for _ in range(count)]
        return [
            pack(rows, self.sequence_length, self.pad) if keep(number) else None
            for number, rows in enumerate(plans)
        ]

    @property
    def state(self) -> dict[str, Any]:
        """The place of the next micro-batch, as JSON values."""
        place = self._place
        return {"window": place.window, "row": place.row, "drawn": dict(place.drawn)}

    def seek(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where a stream of the same sources and settings was.

        Raises:
            ValueError: the state is of other sources.
        """
        place = Place(int(state["window"]), int(state["row"]), dict(state["drawn"]))
        if place.drawn.keys() != self.orders.keys():
            names = sorted(place.drawn), sorted(self.orders)
            raise ValueError(f"state of the stream: sources {names[0]}, but these are {names[1]}")
        self._place, self._window = place, None

    def _plan(self) -> list[Row]:
        """The rows of the next micro-batch."""
        planned: list[Row] = []
        place, window = self._place, self._window or self._draw(self._place)
        barren: dict[str, int] | None = place.drawn
        while len(planned) < self.rows:
            taken = window.rows[place.row : place.row + self.rows - len(planned)]
            planned += taken
            place = Place(place.window, place.row + len(taken), place.drawn)
            barren = None if window.rows else barren
            if len(planned) < self.rows:
                place = Place(place.window + 1, 0, window.drawn)
                if barren is not None:
                    self._refuse_barren(barren, place.drawn)
                window = self._draw(place)
        self._place, self._window = place, window
        return planned

    def _refuse_barren(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        """An epoch of every source without a row would go on for ever."""
        if all(after[n] - before[n] >= len(o.source.records) for n, o in self.orders.items()):
            raise ValueError("no example has a token to learn from")

    def _draw(self, place: Place) -> "_Window":
        """Draw, encode, cut, pack and shuffle one window."""
        draw = random.Random(f"{self.seed}/{place.window}")
        orders = list(self.orders.values())
        weights = [order.source.weight for order in orders]
        drawn, records = dict(place.drawn), {name: [] for name in self.orders}
        wanted = max(_LEAST_ROWS, self.rows) * self.sequence_length * _CHARACTERS
        while wanted > 0:
            (order,) = draw.choices(orders, weights)
            name = order.source.name
            record = order.record(drawn[name])
            records[name].append(record)
            drawn[name] += 1
            wanted -= max(1, _characters(record))
        pieces = [
            piece
            for order in orders
            for document in order.encode(records[order.source.name])
            for piece in cut(document, self.sequence_length)
        ]
        draw.shuffle(pieces)
        rows = fit(pieces, self.sequence_length)
        draw.shuffle(rows)
        return _Window(rows, drawn)


@dataclass(frozen=True)
class _Window:
    rows: list[Row]
    drawn: dict[str, int]  # documents of each source drawn up to its end


class _Order:
    """The documents of a source, epoch after epoch, each epoch in an order of its own."""

    def __init__(self, source: Source, seed: int):
        self.source = source
        self._seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def record(self, number: int) -> Record:
        """The `number`-th document drawn, from 0."""
        epoch, place = divmod(number, len(self.source.records))
        if epoch != self._epoch:
            key = hashlib.sha256(f"{self._seed}/{self.source.name}/{epoch}".encode()).digest()
            draw = np.random.default_rng(int.from_bytes(key))
            self._permutation = draw.permutation(len(self.source.records))
            self._epoch = epoch
        return self.source.records[int(self._permutation[place])]

    def encode(self, records: Sequence[Record]) -> list[Example]:
        """Whole documents as tokens.

        Raises:
            ValueError: one that cannot be encoded, naming the source.
        """
        try:
            return encode(self.source.tokenizer, records, None, self.source.loss_on)
        except ValueError as error:
            raise ValueError(f"source {self.source.name}: {error}") from None


def cut(document: Example, length: int) -> list[Example]:
    """Pieces of at most `length` tokens that have a target; the first of a piece is never one."""
    pieces = []
    for start in range(0, len(document.ids), length):
        ids = document.ids[start : start + length]
        inside = [(max(1, a - start), min(b - start, len(ids))) for a, b in document.spans]
        spans = [(a, b) for a, b in inside if a < b]
        if spans:
            pieces.append(Example(ids, spans))
    return pieces


def fit(pieces: Sequence[Example], length: int) -> list[Row]:
    """Pieces in rows of at most `length` tokens: the longest first, each where it first fits."""
    rows: list[Row] = []
    room: list[int] = []
    first = 0  # rows before it are full
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        size = len(piece.ids)
        row = next((n for n in range(first, len(rows)) if room[n] >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(piece)
        room[row] -= size
        while first < len(rows) and room[first] == 0:
            first += 1
    return rows


def _characters(record: Record) -> int:
    said = sum(len(turn["content"]) for turn in record.messages)
    return said or len(record.prompt) + len(record.completion)
