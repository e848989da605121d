"""GrowingCache: a KV cache that writes in place, so that a step costs its own positions and a crop costs nothing.

Legend: S positions kept, m positions of one forward.
"""

from __future__ import annotations

from typing import Any

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
