"""Which (sample_id, generation) pairs were aborted, so that a late put of one is never readable."""

from __future__ import annotations

from collections import OrderedDict

MAX_TOMBSTONES = 65_536


class Tombstones:
    """The last ``MAX_TOMBSTONES`` aborted pairs. A pair is aborted for good: a new attempt has a new generation."""

    def __init__(self, limit: int = MAX_TOMBSTONES) -> None:
        self._limit = limit
        self._pairs: OrderedDict[tuple[str, int], None] = OrderedDict()

    def add(self, pair: tuple[str, int]) -> None:
        self._pairs[pair] = None
        self._pairs.move_to_end(pair)
        if len(self._pairs) > self._limit:
            self._pairs.popitem(last=False)

    def __contains__(self, pair: tuple[str, int]) -> bool:
        return pair in self._pairs
