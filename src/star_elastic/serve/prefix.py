"""What was computed before, block by block: a tree of tokens whose paths are prefixes.

A node is one full block of tokens behind its parent's. A root stands for a size and a salt, so
another size or another salt finds nothing here; blocks are told apart by their tokens themselves,
so no two prefixes can ever be mistaken for one another.

A node that no sequence uses keeps its block until one is needed; the one unused for longest goes
first. A sequence uses every node of its path, and gives them back last one first: what hangs on a
node always goes before the node does.

A recurrent state cannot be cut back to an earlier token. Where a size has one, a sequence begins
only at nodes with a snapshot of it, in one of a fixed number of places; the oldest gives way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

Key = tuple[int | str, ...]


@dataclass(eq=False, slots=True)
class Node:
    """A block that is full: what follows it, who uses it, and where the state after it lies."""

    parent: "Node | None"
    key: Key  # its tokens; what a root stands for
    block: int = -1
    uses: int = 0
    snapshot: int | None = None
    children: dict[Key, "Node"] = field(default_factory=dict)


class Prefixes:
    """The prefixes that lie in one pool."""

    def __init__(self, block_size: int, snapshots: Sequence[int] = ()):
        """`snapshots`: places for states; none where sizes have no recurrent state."""
        self.block_size = block_size
        self.recurrent = bool(snapshots)
        self._roots: dict[Key, Node] = {}
        self._unused: dict[Node, None] = {}  # longest unused first
        self._free_snapshots = list(snapshots)[::-1]
        self._snapshots: dict[Node, None] = {}  # longest untouched first

    @property
    def num_unused(self) -> int:
        """Blocks that `evict` can give."""
        return len(self._unused)

    def find(self, root: Key, tokens: Sequence[int], limit: int) -> list[Node]:
        """The nodes of the full blocks that tokens begin with, at most so many."""
        path: list[Node] = []
        node = self._roots.get(root)
        while node is not None and len(path) < limit:
            node = node.children.get(self._block(tokens, len(path)))
            if node is not None:
                path.append(node)
        return path

    def resumable(self, path: Sequence[Node]) -> int:
        """Of the nodes of a path, how many a sequence may take over."""
        if not self.recurrent:
            return len(path)
        return max((n for n, node in enumerate(path, 1) if node.snapshot is not None), default=0)

    def add(self, path: list[Node], root: Key, tokens: Sequence[int], block: int) -> Node:
        """Put the next full block at the end of a path in use; use it.

        The node has another block than the given one if these tokens are here already.
        """
        if not path and root not in self._roots:
            self._roots[root] = Node(None, root)
        parent = path[-1] if path else self._roots[root]
        key = self._block(tokens, len(path))
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(parent, key, block)
        path.append(node)
        self.use(node)
        return node

    def use(self, node: Node) -> None:
        """Keep a node, for one sequence more."""
        node.uses += 1
        self._unused.pop(node, None)
        if node in self._snapshots:
            self._snapshots[node] = self._snapshots.pop(node)

    def leave(self, path: Sequence[Node]) -> None:
        """A sequence uses the nodes of its path no more."""
        for node in reversed(path):
            node.uses -= 1
            if not node.uses:
                self._unused[node] = None

    def evict(self) -> int:
        """The block of the node unused for longest, which is forgotten."""
        node = next(iter(self._unused))
        self._remove(node)
        return node.block

    def forget(self, path: Sequence[Node]) -> list[int]:
        """Forget the unused nodes of a path and all that hangs on them; their blocks."""
        unused = [node for node in path if node in self._unused]
        return [node.block for node in _below(unused[:1]) if self._remove(node)]

    def forget_roots(self, first: str) -> list[int]:
        """Forget all whose root begins so, none of it in use; its blocks."""
        roots = [root for root in self._roots.values() if root.key[0] == first]
        tops = [node for root in roots for node in root.children.values()]
        return [node.block for node in _below(tops) if self._remove(node)]

    def snapshot(self, node: Node, instead: Node | None = None) -> int:
        """A place for the state after a node: that of `instead`, a free one, or the oldest."""
        if instead is None or instead.snapshot is None:
            instead = None if self._free_snapshots else next(iter(self._snapshots))
        if instead is not None:
            self._drop_snapshot(instead)
        node.snapshot = self._free_snapshots.pop()
        self._snapshots[node] = None
        return node.snapshot

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self._free_snapshots.append(node.snapshot)
            del self._snapshots[node]
            node.snapshot = None

    def _remove(self, node: Node) -> bool:
        """Take a leaf that is unused off the tree."""
        assert not node.children and not node.uses and node.parent is not None
        del self._unused[node], node.parent.children[node.key]
        self._drop_snapshot(node)
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.parent.key]
        return True

    def _block(self, tokens: Sequence[int], number: int) -> tuple[int, ...]:
        return tuple(tokens[number * self.block_size : (number + 1) * self.block_size])


def _below(nodes: Sequence[Node]) -> list[Node]:
    """Some nodes and all that hangs on them, leaves first."""
    found = list(nodes)
    for node in found:  # which grows meanwhile
        found += node.children.values()
    return found[::-1]
