"""Cache pools: the KV, conv and SSM state of many sequences, allocated once.

Sizes whose states have the same shapes share one pool. Keys and values lie in blocks of tokens, as
in any paged cache; conv and SSM states lie in slots, one per sequence. `Rows` is what a stock model
sees of a pool for one forward call: a transformers `Cache` over a few sequences.

A row reads keys and values only where it wrote them itself, and its slot is zeroed before its first
token, so nothing of a former sequence can be seen, not even a NaN.

Shapes: B rows, T new tokens of each, L tokens of the longest row, H heads, D of a head, W = H*D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from star_elastic.layout import Layout
from star_elastic.submodel import Fields

_PER_TOKEN = "token."


@dataclass(frozen=True)
class Geometry:
    """The state of one sequence: kind and shape of each tensor, in the order of its layers."""

    states: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def is_recurrent(self) -> bool:
        """Whether it has a state that is one for all tokens, and cannot be cut back."""
        return not all(kind.startswith(_PER_TOKEN) for kind, _ in self.states)


@dataclass(frozen=True)
class Places:
    """Where a size finds its states: the pool's geometry, and (own layer, kind) -> index there."""

    geometry: Geometry
    index: dict[tuple[int, str], int]

    @classmethod
    def of(cls, layout: Layout, fields: Fields) -> "Places":
        """Of the size that these fields name; `Layout.cache_shapes` tells the shapes."""
        sizes = layout.sizes_of(fields)
        position = {layer: n for n, layer in enumerate(layout.kept_layers(sizes))}
        index: dict[tuple[int, str], int] = {}
        states: list[tuple[str, tuple[int, ...]]] = []
        for name, shape in layout.cache_shapes(sizes).items():
            layer, _, kind = name.partition(".")
            index[position[int(layer)], kind] = len(states)
            states.append((kind, shape))
        return cls(Geometry(tuple(states)), index)


@dataclass(frozen=True)
class Row:
    """One sequence in a forward call: its slot, its blocks, and how many tokens are cached."""

    slot: int
    blocks: Sequence[int]
    start: int


class Pool:
    """The state of up to `slots` sequences, of `blocks * block_size` tokens together."""

    def __init__(
        self,
        geometry: Geometry,
        slots: int,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """`dtype` is the model's; SSM states are float32, as stock models keep them."""
        self.block_size = block_size
        self.kinds = [kind for kind, _ in geometry.states]
        self.tensors = [
            torch.zeros(
                (blocks * block_size if kind.startswith(_PER_TOKEN) else slots, *shape),
                dtype=torch.float32 if kind == "ssm" else dtype,
                device=device,
            )
            for kind, shape in geometry.states
        ]

    @property
    def nbytes(self) -> int:
        """All the bytes that this pool will ever take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def clear(self, slot: int) -> None:
        """Zero the conv and SSM states of a slot, for a sequence that has no token yet."""
        for tensor in self._states:
            tensor[slot].zero_()

    def copy(self, slot: int, to: int) -> None:
        """Copy the conv and SSM states of a slot to another."""
        for tensor in self._states:
            tensor[to].copy_(tensor[slot])

    @property
    def _states(self) -> list[Tensor]:
        named = zip(self.kinds, self.tensors, strict=True)
        return [tensor for kind, tensor in named if not kind.startswith(_PER_TOKEN)]


class Rows(Cache):
    """The cache of one forward call: `count` new tokens for each of some sequences of a pool.

    The call takes `positions` and `mask` from here too. Conv and SSM states of several rows are
    worked on in a copy until `commit`: a call that raised has changed none, and may be made again
    row by row. A lone row is worked on where it lies, and read there too if its blocks lie one
    after another: then nothing is copied.
    """

    def __init__(self, pool: Pool, places: Places, rows: Sequence[Row], count: int):
        super().__init__(layers=[])
        self._pool = pool
        self._index = places.index
        self._device = pool.tensors[0].device
        self._states: dict[int, Tensor] = {}
        # small arrays are made by numpy: torch takes several times as long for each
        start_B1 = np.array([[row.start] for row in rows])
        self._positions_BT = start_B1 + np.arange(count)
        self._every_L = np.arange(start_B1.max() + count)
        self._lone = rows[0].slot if len(rows) == 1 else None
        self._lies = _where_it_lies(rows[0], pool.block_size, count) if len(rows) == 1 else None
        self.positions = self._here(self._positions_BT)
        if self._lone is None:
            self._slots = self._here(np.array([row.slot for row in rows]))
        if self._lies is None:
            place_BL = _places_of(rows, pool.block_size)[:, : len(self._every_L)]
            write_BT = np.take_along_axis(place_BL, self._positions_BT, 1)
            # beyond its own end a row reads its first token again: masked, and surely finite
            read_BL = np.where(self._every_L < start_B1 + count, place_BL, place_BL[:, :1])
            self._write, self._read = self._here(write_BT.ravel()), self._here(read_BL.ravel())

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention scores (B, 1, T, L): 0 where a token may look, else -inf.

        None for a lone row: stock models know its mask, and when they need none.
        """
        if self._lone is not None:
            return None
        unseen_BTL = self._here(self._every_L > self._positions_BT[:, :, None])
        added = torch.zeros(unseen_BTL.shape, dtype=dtype, device=self._device)
        return added.masked_fill_(unseen_BTL, -torch.inf)[:, None]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The tokens that a lone row has cached."""
        return int(self._positions_BT[0, 0])

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many tokens a lone row looks at, and from which on."""
        return len(self._every_L), 0

    def commit(self) -> None:
        """Put the conv and SSM states after this call into their slots."""
        for index, state in self._states.items():
            store = self._pool.tensors[index]
            if self._lone is not None:
                store[self._lone].copy_(state[0])
            else:
                store.index_copy_(0, self._slots, state.to(store.dtype))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, T, D); all of each row so far (B, H, L, D)."""
        return (
            self._extend(self._index[layer_idx, "token.key"], key_states),
            self._extend(self._index[layer_idx, "token.value"], value_states),
        )

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """The conv state of each row; a stock mixer that decodes updates it in place."""
        return self._state(self._index[layer_idx, "conv"])

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Append new inputs of the convolution; the old state and they are what it runs over."""
        index = self._index[layer_idx, "conv"]
        state = self._state(index)
        whole = torch.cat([state, conv_states], dim=-1)
        self._states[index] = whole[..., -state.shape[-1] :]
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        """The SSM state of each row; a stock mixer that decodes updates it in place."""
        return self._state(self._index[layer_idx, "ssm"])

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Replace the SSM state of each row."""
        self._states[self._index[layer_idx, "ssm"]] = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Never: states cannot be rolled back."""
        return False

    def _state(self, index: int) -> Tensor:
        if index in self._states:
            return self._states[index]
        store = self._pool.tensors[index]
        if self._lone is not None:
            return store[self._lone : self._lone + 1]
        self._states[index] = store.index_select(0, self._slots)
        return self._states[index]

    def _extend(self, index: int, new_BHTD: Tensor) -> Tensor:
        batch, heads, count, width = new_BHTD.shape
        store = self._pool.tensors[index]
        new = new_BHTD.transpose(1, 2).reshape(batch * count, heads * width)
        if self._lies is not None:
            whole = store[self._lies]
            whole[-count:].copy_(new)
        else:
            store.index_copy_(0, self._write, new)
            whole = store.index_select(0, self._read)
        return whole.view(batch, -1, heads, width).transpose(1, 2)

    def _here(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _where_it_lies(row: Row, block_size: int, count: int) -> slice | None:
    """Where in the pool a row lies, new tokens included, if that is all in one piece."""
    blocks = -(-(row.start + count) // block_size)
    first = row.blocks[0]
    if list(row.blocks[:blocks]) != list(range(first, first + blocks)):
        return None
    return slice(first * block_size, first * block_size + row.start + count)


def _places_of(rows: Sequence[Row], block_size: int) -> np.ndarray:
    """Where in the pool each token of each row lies, as far as its blocks go; then anywhere."""
    table = np.zeros((len(rows), max(len(row.blocks) for row in rows)), dtype=np.int64)
    for blocks, row in zip(table, rows, strict=True):
        blocks[: len(row.blocks)] = row.blocks
    return (table[:, :, None] * block_size + np.arange(block_size)).reshape(len(rows), -1)


def check_rows(config: Any, max_length: int) -> None:
    """Hold that a stock model of this config computes each of some `Rows` as if it were alone.

    Raises:
        ValueError: it does not, or not up to so many tokens.
    """
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"attention {config._attn_implementation!r}: sdpa or eager is served")
    if max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length {max_length}: the model has {config.max_position_embeddings} positions"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_length:
        raise ValueError(f"max_length {max_length}: the attention window of {window} is not served")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # the longest row would turn the others
        raise ValueError(f"rope_type {rope['rope_type']!r}: not served")
