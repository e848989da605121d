"""KV caches that write in place, so that a step costs its own positions and a crop costs nothing.

``GrowingCache`` has one length for the whole batch, ``BatchCache`` one for every sequence.

Legend: S positions kept, m positions of one forward, n sequences of one forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

INITIAL_POSITIONS = 128


class GrowingLayer(DynamicLayer):
    """One layer: buffers ``[batch, heads, capacity, size]`` of which the first S positions are in use.

    The capacity doubles when it is exceeded. ``keys`` and ``values`` are views of what is in use.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_positions = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[batch, heads, m, size]``; all keys and values, ``[batch, heads, S + m, size]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, count = self._num_positions, key_states.shape[2]
        end = self._num_positions = start + count
        if self._buffers is None or end > self._buffers[0].shape[2]:
            self._buffers = self._grown(key_states, value_states, start)
        keys, values = self._buffers
        # narrow and copy_ cost half of what a slice assignment does
        keys.narrow(2, start, count).copy_(key_states)
        values.narrow(2, start, count).copy_(value_states)
        self.keys = kept_keys = keys.narrow(2, 0, end)
        self.values = kept_values = values.narrow(2, 0, end)
        return kept_keys, kept_values

    def get_seq_length(self) -> int:
        return self._num_positions

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions (a number that is not positive, as in the base class)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of positions to remove, got {tokens_to_remove}")
        self._num_positions += tokens_to_remove
        if self._buffers is not None:
            self.keys, self.values = (buffer.narrow(2, 0, self._num_positions) for buffer in self._buffers)

    def keep(self, start: int, rows: Tensor) -> None:
        """Of the positions from ``start`` on keep only ``start + rows`` (int64, ascending), moved together."""
        assert self._buffers is not None, "positions are kept after a forward"
        for buffer in self._buffers:
            buffer.narrow(2, start, len(rows)).copy_(buffer.index_select(2, start + rows.to(buffer.device)))
        self.crop(start + len(rows) - self._num_positions)

    def _grown(self, keys: Tensor, values: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
        """Buffers with room for twice what there is now, shaped like the new states, with the kept positions."""
        capacity = max(2 * self._num_positions, INITIAL_POSITIONS)
        new = [states.new_empty(*states.shape[:2], capacity, states.shape[3]) for states in (keys, values)]
        if self._buffers is not None:
            for buffer, old in zip(new, self._buffers, strict=True):
                buffer.narrow(2, 0, num_kept).copy_(old.narrow(2, 0, num_kept))
        return new[0], new[1]


class GrowingCache(DynamicCache):
    """Every layer grows and keeps every position (sliding windows too), so any crop is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer

    def keep(self, start: int, rows: Tensor) -> None:
        """:meth:`GrowingLayer.keep` for every layer."""
        for layer in self.layers:
            assert isinstance(layer, GrowingLayer), "every layer grows"
            layer.keep(start, rows)


@dataclass(slots=True)
class Place:
    """Where a forward reads and writes: sequences from ``first`` on, the new tokens in ``slots`` int64 [n, m], and
    ``num_slots`` slots that attention looks at.
    """

    first: int
    slots: Tensor
    num_slots: int


class BatchLayer(DynamicLayer):
    """One layer: buffers ``[sequences, heads, slots, size]``; position p of a sequence is in slot p.

    Slots that nothing was written to are zero: a masked slot must still hold a number.
    """

    def __init__(self, cache: BatchCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self.buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[n, heads, m, size]`` where the cache says; views ``[n, heads, num_slots, size]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place, states = self._cache.place, (key_states, value_states)
        if not self.buffers or place.num_slots > self.buffers[0].shape[2]:
            self.buffers = self._grown(states, place.num_slots)
        count = key_states.shape[0]
        rows = torch.arange(place.first, place.first + count, device=key_states.device)[:, None]
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[rows, :, place.slots] = new.transpose(1, 2)
        keys, values = (buffer.narrow(0, place.first, count).narrow(2, 0, place.num_slots) for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        return self._cache.place.num_slots - self._cache.place.slots.shape[1]

    def _grown(self, states: tuple[Tensor, Tensor], num_slots: int) -> tuple[Tensor, ...]:
        capacity = max(2 * num_slots, INITIAL_POSITIONS)
        grown = tuple(new.new_zeros(self._cache.num_sequences, new.shape[1], capacity, new.shape[3]) for new in states)
        for buffer, old in zip(grown, self.buffers, strict=False):
            buffer.narrow(2, 0, old.shape[2]).copy_(old)
        return grown


class BatchCache(DynamicCache):
    """Up to ``num_sequences`` sequences, each with a length that its owner keeps: a crop is a smaller number.

    ``place`` is set before a forward.
    """

    def __init__(self, num_sequences: int) -> None:
        super().__init__()
        self.num_sequences = num_sequences
        self.place = Place(0, torch.zeros(0, 0, dtype=torch.int64), 0)
        self.layer_class_to_replicate = partial(BatchLayer, self)  # type: ignore[assignment]  # it is only called

    def keep(self, sequence: int, start: int, rows: Tensor) -> None:
        """Of a sequence's positions from ``start`` on move ``start + rows`` (int64, ascending) together."""
        for buffer in self._buffers():
            row = buffer[sequence]
            row.narrow(1, start, len(rows)).copy_(row.index_select(1, start + rows.to(buffer.device)))

    def move(self, source: int, destination: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` positions of a sequence over those of another."""
        for buffer in self._buffers():
            buffer[destination].narrow(1, 0, num_tokens).copy_(buffer[source].narrow(1, 0, num_tokens))

    def _buffers(self) -> list[Tensor]:
        return [buffer for layer in self.layers if isinstance(layer, BatchLayer) for buffer in layer.buffers]
