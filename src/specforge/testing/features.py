"""NamedFeatures: the controller's view of a feature store, with names and no tensors behind them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from specforge.contracts.refs import SampleRef


class NamedFeatures:
    """``Features`` and ``Retention`` over a set of (sample_id, generation) pairs; ``room`` of them can be put aside.

    ``freed`` lists what was really freed, in order.
    """

    def __init__(self, room: int = 0) -> None:
        self._lock = threading.Lock()
        self._pairs: dict[tuple[str, int], None] = {}
        self._room = room
        self._put_aside: set[tuple[str, int]] = set()
        self.freed: list[tuple[str, int]] = []

    def put(self, pairs: Iterable[tuple[str, int]]) -> None:
        with self._lock:
            self._pairs.update((pair, None) for pair in pairs)

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        with self._lock:
            for pair in samples:
                if pair in self._pairs:
                    del self._pairs[pair]
                    self._put_aside.discard(pair)
                    self.freed.append(pair)

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        with self._lock:
            return [(ref.sample_id, ref.generation) in self._pairs for ref in refs]

    def stored(self) -> list[tuple[str, int]]:
        with self._lock:
            return list(self._pairs)

    def gc(self) -> int:
        return 0

    def retain(self, refs: Sequence[SampleRef]) -> list[bool]:
        with self._lock:
            return [self._retain((ref.sample_id, ref.generation)) for ref in refs]

    def retained(self, refs: Sequence[SampleRef]) -> list[bool]:
        with self._lock:
            return [(ref.sample_id, ref.generation) in self._put_aside for ref in refs]

    def _retain(self, pair: tuple[str, int]) -> bool:
        if pair in self._pairs and len(self._put_aside) < self._room:
            self._put_aside.add(pair)
        return pair in self._put_aside
