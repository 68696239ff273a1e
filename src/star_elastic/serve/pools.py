"""The sizes that are up, and their pools: made for the first in it, freed with the last.

Sizes are views of one set of weights. Those whose states have the same shapes share a pool.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from star_elastic.model import ElasticModel
from star_elastic.serve.cache import Geometry, Places, Pool, check_rows
from star_elastic.serve.linear import share_linears
from star_elastic.serve.space import Job, Space
from star_elastic.submodel import Fields

_SNAPSHOTS = 2  # per slot: of the sequence that is in it, and of a prefix


@dataclass(frozen=True)
class Room:
    """A pool, and who holds what of it."""

    pool: Pool
    space: Space

    def begin(self, job: Job) -> None:
        """Make the slot of a sequence just admitted what its cached tokens have left behind."""
        assert job.slot is not None
        if job.nodes and job.nodes[-1].snapshot is not None:
            self.pool.copy(job.nodes[-1].snapshot, job.slot)
        else:
            self.pool.clear(job.slot)

    def keep(self, job: Job) -> None:
        """Keep what a sequence has computed for others."""
        place = self.space.keep(job)
        if place is not None:
            assert job.slot is not None
            self.pool.copy(job.slot, place)


@dataclass(eq=False)
class Served:
    """A size that is up, and what it has done so far."""

    name: str
    view: PreTrainedModel
    places: Places
    room: Room
    draining: bool = False  # it takes no more requests
    prompt_tokens_computed: int = 0
    prompt_tokens_reused: int = 0
    output_tokens: int = 0

    @property
    def vocabulary(self) -> int:
        """Tokens there are."""
        return self.view.config.get_text_config().vocab_size

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer, by the checkpoint."""
        ids = getattr(self.view.generation_config, "eos_token_id", None)
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)

    def count(self, job: Job, tokens: int) -> None:
        """Note that a sequence has just advanced by so many tokens."""
        before = job.num_cached - tokens
        self.prompt_tokens_computed += max(0, min(job.prompt_length, job.num_cached) - before)


class Pools:
    """Sizes of one model, each in the pool of its geometry."""

    def __init__(
        self,
        model: ElasticModel,
        slots: int,
        blocks: int,
        block_size: int,
        max_length: int,
        reuse: bool,
    ):
        self._model = model
        self._slots, self._blocks, self._block_size = slots, blocks, block_size
        self._max_length = max_length
        self._reuse = reuse
        self.rooms: dict[Geometry, Room] = {}

    def open(self, name: str, fields: Fields | None) -> Served:
        """A size of these fields; by None, the model's own of this name.

        Raises:
            ValueError: no such size, or one that stock classes cannot run in such a batch.
        """
        sizes = self._model.sizes
        if fields is None and name not in sizes:
            raise ValueError(f"no size {name!r}; there are {', '.join(sizes)}")
        own = fields is None
        fields = sizes[name].config if fields is None else fields
        view = self._model[name] if own else self._model.submodel(**fields)
        check_rows(view.config, self._max_length)
        share_linears(view)
        places = Places.of(self._model.layout, fields)
        room = self.rooms.get(places.geometry) or self._room(places.geometry)
        self.rooms[places.geometry] = room
        return Served(name, view, places, room)

    def close(self, served: Served, others: list[Served]) -> None:
        """Free the pool of a size, unless others are in it."""
        if all(other.room is not served.room for other in others):
            self.rooms.pop(served.places.geometry, None)

    def _room(self, geometry: Geometry) -> Room:
        parent = self._model.parent
        keeps = self._reuse and geometry.is_recurrent
        snapshots = _SNAPSHOTS * self._slots if keeps else 0
        slots, blocks, block_size = self._slots, self._blocks, self._block_size
        pool = Pool(geometry, slots + snapshots, blocks, block_size, parent.dtype, parent.device)
        return Room(pool, Space(slots, blocks, block_size, self._reuse, snapshots))
