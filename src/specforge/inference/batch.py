"""HFBatchSession: the target of ``HFTargetEngine`` decoding several sequences, each with a length of its own.

Prompts are read one by one, since a padded batch of them would have masks of n * m * m. After that all sequences take
part in a forward, in one padded batch over one cache. What a sequence gets differs from what it gets alone by rounding
only: its padding and the other sequences are masked.

Legend: n sequences, m tokens of a sequence at most, R tokens of all, H hidden size, V vocabulary, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from specforge.algorithms.base import TargetTables, target_logits
from specforge.contracts.capture import CaptureSpec
from specforge.errors import DataError
from specforge.inference.cache import BatchCache, Place
from specforge.inference.tree import BatchAttention


class BatchForwards(Protocol):
    """What a session asks of its engine."""

    device: torch.device

    @property
    def tables(self) -> TargetTables:
        """The target's output head."""
        ...

    def forward_batch(
        self, rows: Sequence[Sequence[int]], cache: BatchCache, attention: BatchAttention, spec: CaptureSpec
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Last hidden states [n, m, H], and the layers [n, m, H] of every feature."""
        ...


class HFBatchSession:
    """Implements ``BatchSession``."""

    def __init__(self, engine: BatchForwards, spec: CaptureSpec, num_sequences: int) -> None:
        self._engine = engine
        self._spec = spec
        self._cache = BatchCache(num_sequences)
        self._lengths: list[int] = []
        self._last_starts: list[int] = []

    def admit(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, Tensor]]:
        first = len(self._lengths)
        if first + len(prompts) > self._cache.num_sequences:
            raise ValueError(f"{first} + {len(prompts)} sequences do not fit a session of {self._cache.num_sequences}")
        if not all(prompts):
            raise DataError("a prompt has no tokens; expected at least one")
        ends: list[Tensor] = []
        parts: dict[str, list[Tensor]] = {}
        for number, prompt in enumerate(prompts, start=first):
            self._lengths.append(0)
            last, features = self._run(number, [prompt], [None])
            # a vocabulary's logits of every prompt token would be the largest tensor of all
            ends.append(last[0, -1])
            for name, rows in features.items():
                parts.setdefault(name, []).append(rows)
        logits = target_logits(self._engine.tables, torch.stack(ends))
        return logits, {name: torch.cat(rows) for name, rows in parts.items()}

    def forward(
        self, token_ids: Sequence[Sequence[int]], parents: Sequence[Sequence[int] | None] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if len(token_ids) != len(self._lengths):
            raise ValueError(f"tokens of {len(self._lengths)} sequences are needed, got {len(token_ids)}")
        last, features = self._run(0, token_ids, parents or [None] * len(token_ids))
        return target_logits(self._engine.tables, last[_real(token_ids, last.device)]), features

    def crop(self, sequence: int, num_tokens: int) -> None:
        if num_tokens > self._lengths[sequence]:
            raise ValueError(f"cannot keep {num_tokens} positions of a cache of {self._lengths[sequence]}")
        self._lengths[sequence] = num_tokens

    def keep(self, sequence: int, rows: Sequence[int]) -> None:
        start = self._last_starts[sequence]
        self._cache.keep(sequence, start, torch.tensor(rows, dtype=torch.int64))
        self._lengths[sequence] = start + len(rows)

    def drop(self, sequence: int) -> None:
        end = len(self._lengths) - 1
        if sequence != end:
            self._cache.move(end, sequence, self._lengths[end])
            self._lengths[sequence] = self._lengths[end]
        self._lengths.pop()

    def _run(
        self, first: int, rows: Sequence[Sequence[int]], parents: Sequence[Sequence[int] | None]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The forward of the sequences from ``first`` on: last hidden states [n, m, H], features [R, D]."""
        counts, starts = [len(row) for row in rows], self._lengths[first:]
        attention = BatchAttention.of(starts, counts, parents)
        self._cache.place = Place(first, attention.slots.to(self._engine.device), attention.num_slots)
        last, found = self._engine.forward_batch(rows, self._cache, attention, self._spec)
        self._last_starts = [*self._lengths[:first], *starts]
        self._lengths[first:] = [start + count for start, count in zip(starts, counts, strict=True)]
        real = _real(rows, last.device)
        return last, {name: torch.cat([layer[real] for layer in layers], dim=-1) for name, layers in found.items()}


def _real(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequence and place of every token that is no padding, each int64 [R]."""
    pairs = [(number, place) for number, row in enumerate(rows) for place in range(len(row))]
    sequences, places = torch.tensor(pairs, device=device).unbind(1)
    return sequences, places
