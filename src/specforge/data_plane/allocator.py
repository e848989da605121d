"""Where samples lie in an arena: a best-fit offset allocator, and the plan that makes room when gaps are too small.

No allocator that never moves a block can promise that a put at 75 % live bytes succeeds: for mixed sizes the bound of
Robson (J. ACM 18(3), 1971) grows with the logarithm of the ratio of sizes. So the writer moves blocks, and the moves
are bounded. Let a put need n <= C/64 bytes while at most 3C/4 are live. Cut the arena into runs whose gaps add up to n
each: there are at least (C/4)/n >= 16 of them, and the live bytes of one are at most (3C/4) / ((C/4)/n) = 3n. Sliding
the blocks of that run together makes the gap, so a put moves at most three times its own bytes. A block that a reader
holds cannot be moved; with fewer than 16 held blocks some stretch between two of them still has gaps of n bytes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass


class OffsetAllocator:
    """Ranges of ``[0, capacity)``: best fit, freed ranges merge with their neighbours. All numbers are bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._by_size: list[tuple[int, int]] = []
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self.free_bytes = 0
        self._add(0, capacity)
        self.free_bytes = capacity

    def allocate(self, num_bytes: int) -> int | None:
        """Offset of a free range, or ``None`` when no gap is large enough."""
        index = bisect_left(self._by_size, (num_bytes, 0))
        if index == len(self._by_size):
            return None
        offset = self._by_size[index][1]
        self.take(offset, num_bytes)
        return offset

    def take(self, offset: int, num_bytes: int) -> None:
        """Allocate exactly ``[offset, offset + num_bytes)``, which must be free and start at the start of a gap."""
        size = self._starts[offset]
        assert num_bytes <= size
        self._remove(offset, size)
        self._add(offset + num_bytes, size - num_bytes)
        self.free_bytes -= num_bytes

    def free(self, offset: int, num_bytes: int) -> None:
        self.free_bytes += num_bytes
        if offset + num_bytes in self._starts:
            size = self._starts[offset + num_bytes]
            self._remove(offset + num_bytes, size)
            num_bytes += size
        if offset in self._ends:
            start = self._ends[offset]
            self._remove(start, offset - start)
            num_bytes += offset - start
            offset = start
        self._add(offset, num_bytes)

    def gaps(self) -> list[tuple[int, int]]:
        """(offset, size) of every gap, by offset."""
        return sorted(self._starts.items())

    def _add(self, offset: int, size: int) -> None:
        if size:
            insort(self._by_size, (size, offset))
            self._starts[offset] = size
            self._ends[offset + size] = offset

    def _remove(self, offset: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        del self._starts[offset]
        del self._ends[offset + size]


@dataclass(frozen=True, slots=True)
class Span:
    """An allocated range. ``pinned``: a reader may be looking at it, so it must stay where it is."""

    offset: int
    num_bytes: int
    pinned: bool

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


def plan_moves(spans: Sequence[Span], capacity: int, num_bytes: int) -> list[tuple[int, int]] | None:
    """The cheapest slide that opens a gap of ``num_bytes``: (index into ``spans``, new offset), in execution order.

    ``spans`` ascend by offset. Every move goes to a lower offset, onto bytes that are free once the moves before it
    are done (it may overlap the span's own old range). ``None`` when no stretch between pinned spans has the room.
    """
    best: tuple[int, int, int] | None = None
    first, live = 0, 0
    for last in range(len(spans) + 1):
        # The candidate is spans[first:last], between the end of spans[first - 1] and the start of spans[last].
        right = spans[last].offset if last < len(spans) else capacity
        while right - (spans[first - 1].end if first else 0) - live >= num_bytes:
            if best is None or live < best[0]:
                best = (live, first, last)
            if first == last:
                break
            live -= spans[first].num_bytes
            first += 1
        if last < len(spans):
            if spans[last].pinned:
                first, live = last + 1, 0
            else:
                live += spans[last].num_bytes
    if best is None:
        return None
    _, first, last = best
    target = spans[first - 1].end if first else 0
    moves = []
    for index in range(first, last):
        if spans[index].offset != target:
            moves.append((index, target))
        target += spans[index].num_bytes
    return moves
