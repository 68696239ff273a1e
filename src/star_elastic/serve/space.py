"""Who holds which slots and blocks of a pool; no tensors.

A sequence begins with the blocks of the longest prefix that was computed before; such blocks have
several holders. Blocks that only hold prefixes are as good as free.
"""

from dataclasses import dataclass, field

from star_elastic.serve.prefix import Node, Prefixes

_WORTH = 4  # blocks that a snapshot must be able to save: it takes one more call in the prompt


@dataclass(eq=False)
class Job:
    """One sequence: its tokens (prompt and generated) and what of the cache it holds."""

    id: int
    size: str
    tokens: list[int]
    max_length: int  # tokens that it may come to have
    priority: int = 0
    salt: str = ""  # sequences of another salt share nothing with it
    num_cached: int = 0
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)  # of its first blocks, which others may share
    num_reused: int | None = None  # tokens not computed when it was first admitted
    cuts: frozenset[int] = frozenset()  # lengths at which a chunk of the prompt must end
    rolling: Node | None = None  # the last node whose state it kept while it answers

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def num_uncached(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_cached

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: priority, then arrival (ids count up)."""
        return self.priority, self.id

    @property
    def root(self) -> tuple[str, str]:
        """What a sequence must have in common with another to share its prefix."""
        return self.size, self.salt


class Space:
    """Free slots and blocks of one pool, and the sequences that hold the others."""

    def __init__(
        self, slots: int, blocks: int, block_size: int, reuse: bool = True, snapshots: int = 0
    ):
        """`snapshots`: places for recurrent states behind the slots; 0 where there is no such."""
        self.slots, self.blocks, self.block_size = slots, blocks, block_size
        self.capacity = blocks * block_size  # tokens
        self.free_slots = list(range(slots))[::-1]
        self.free_blocks = list(range(blocks))[::-1]
        self.running: list[Job] = []
        self.prefixes = Prefixes(block_size, range(slots, slots + snapshots))
        self._reuse = reuse

    @property
    def used(self) -> float:
        """The share of blocks that sequences hold; slots that are all taken are no sign of want."""
        return 1 - (len(self.free_blocks) + self.prefixes.num_unused) / self.blocks

    def grow(self, job: Job, tokens: int) -> bool:
        """Give a sequence blocks for so many tokens, if there are enough."""
        lacking = -(-tokens // self.block_size) - len(job.blocks)
        if lacking > len(self.free_blocks) + self.prefixes.num_unused:
            return False
        free = self.free_blocks
        found = [free.pop() if free else self.prefixes.evict() for _ in range(lacking)]
        job.blocks += sorted(found)  # what lies in one piece need not be gathered
        return True

    def admit(self, job: Job) -> bool:
        """Give a sequence a slot and blocks for all its tokens, if there are enough.

        Where it begins with tokens that were computed before, it has them cached; at least one is
        left to compute. A recurrent state is still to be copied from its last node's snapshot.
        """
        if not self.free_slots:
            return False
        self._resume(job)
        if not self.grow(job, len(job.tokens)):
            self._give_back(job)
            return False
        job.slot = self.free_slots.pop()
        self.running.append(job)
        if job.num_reused is None:
            job.num_reused = job.num_cached
        return True

    def release(self, job: Job, forget: bool = False) -> None:
        """Take back all that a sequence holds; with `forget`, what it computed is not reused."""
        assert job.slot is not None
        path = job.nodes
        self.running.remove(job)
        self.free_slots.append(job.slot)
        self._give_back(job)
        job.slot = None
        if forget:
            self.free_blocks += self.prefixes.forget(path)

    def forget_size(self, size: str) -> None:
        """Free the prefixes of a size of which no sequence is left."""
        self.free_blocks += self.prefixes.forget_roots(size)

    def keep(self, job: Job) -> int | None:
        """Note the blocks that a sequence has filled, for others to share.

        Returns:
            the place to copy its slot's state to; None if the state here need not be kept.
        """
        full = job.num_cached // self.block_size
        if not self._reuse or full <= len(job.nodes):
            return None
        for number in range(len(job.nodes), full):
            node = self.prefixes.add(job.nodes, job.root, job.tokens, job.blocks[number])
            if node.block != job.blocks[number]:  # another sequence was faster: one is enough
                self.free_blocks.append(job.blocks[number])
                job.blocks[number] = node.block
        return self._snapshot(job) if self.prefixes.recurrent else None

    def _snapshot(self, job: Job) -> int | None:
        """In a prompt at its cuts; in an answer at every block, in place of the one before."""
        node, answers = job.nodes[-1], job.num_cached > job.prompt_length
        if job.num_cached % self.block_size or not (answers or job.num_cached in job.cuts):
            return None
        if node.snapshot is not None:
            return None
        place = self.prefixes.snapshot(node, job.rolling if answers else None)
        job.rolling = node if answers else None
        return place

    def _resume(self, job: Job) -> None:
        """Take over what was computed before, and tell where states are to be kept."""
        if not self._reuse:
            return
        last = (len(job.tokens) - 1) // self.block_size
        path = self.prefixes.find(job.root, job.tokens, last)
        begun = self.prefixes.resumable(path)
        for node in path[:begun]:
            self.prefixes.use(node)
            job.nodes.append(node)
            job.blocks.append(node.block)
        job.num_cached = begun * self.block_size
        if self.prefixes.recurrent:  # where paths part, and where this prompt ends
            ends = {end for end in (len(path), last) if end - begun >= _WORTH}
            job.cuts = frozenset(end * self.block_size for end in ends)

    def _give_back(self, job: Job) -> None:
        self.free_blocks += job.blocks[len(job.nodes) :][::-1]
        self.prefixes.leave(job.nodes)
        job.blocks, job.nodes, job.num_cached, job.rolling = [], [], 0, None
