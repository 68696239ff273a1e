"""Which sizes learn from a micro-batch, in how many pieces, and for which reading of codes."""

import random
from collections.abc import Mapping, Sequence

from star_elastic.layout import Layout
from star_elastic.submodel import Fields
from star_elastic.train import curriculum
from star_elastic.train.pieces import piece_count
from star_elastic.train.recipe import Optimise, Stage
from star_elastic.train.sizes import rungs


class Draws:
    """The draws of a run; `sizes` may change under it, as a router changes its mind."""

    def __init__(
        self,
        layout: Layout,
        settings: Optimise,
        sizes: Mapping[str, Fields],
        multiple_of: Mapping[str, int],
        readings: int = 1,
    ):
        """`readings`: of the codes that sizes learn for, if they do; each is drawn alike."""
        self.layout = layout
        self.settings = settings
        self.sizes = sizes
        self.multiple_of = multiple_of
        self.readings = readings
        self._between: tuple[str, list[Fields]] | None = None

    def of(self, stage: Stage, micro_batch: int) -> dict[str, Fields]:
        """The sizes that learn from the n-th micro-batch of the run; see `curriculum.drawn`."""
        return curriculum.drawn(self.settings, stage, self.sizes, self.between(), micro_batch)

    def reading(self, micro_batch: int) -> int:
        """The reading that the n-th micro-batch learns for; as `of`, the same in every process."""
        group = micro_batch // self.settings.same_size
        return random.Random(f"reading/{self.settings.seed}/{group}").randrange(self.readings)

    def pieces(self, stage: Stage, fields: Fields) -> int:
        """Pieces in which a size takes its rows."""
        if not self.settings.split:
            return 1
        return piece_count(self.layout, stage, self.sizes, fields)

    def between(self) -> Sequence[Fields]:
        """The sizes between the named ones that are trained now and then."""
        if not self.settings.between:
            return ()
        key = repr(self.sizes)
        if self._between is None or self._between[0] != key:
            found = rungs(self.layout, self.sizes, self.settings.rungs, self.multiple_of)
            self._between = key, found
        return self._between[1]
