"""Which samples share a micro-batch: pure functions of lengths, so every rank and topology agrees without talking."""

from __future__ import annotations

from collections.abc import Sequence


def pack_window(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Positions of ``lengths`` grouped into bins of at most ``max_tokens`` tokens: first fit, longest first.

    Ties go by position. A sample longer than the budget gets a bin of its own. Bins are in the order in which they
    were opened, positions inside a bin ascend.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    bins: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[position]
        chosen = next((index for index, free in enumerate(room) if length <= free), None)
        if chosen is None:
            bins.append([position])
            room.append(max_tokens - length)
        else:
            bins[chosen].append(position)
            room[chosen] -= length
    return [sorted(positions) for positions in bins]


def rank_share(num_samples: int, rank: int, world_size: int) -> range:
    """Positions of a window that ``rank`` trains: every ``world_size``-th, from ``rank`` on."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    return range(rank, num_samples, world_size)


def equalise(num_micro_batches: Sequence[int]) -> int:
    """The number of micro-batches that every rank runs: the maximum over ranks, at least 1."""
    return max([1, *num_micro_batches])


def plan_rank(lengths: Sequence[int], max_tokens: int, rank: int, world_size: int) -> list[list[int]]:
    """Bins of window positions for ``rank``, filled up with empty bins to the number that every rank runs."""
    plans = []
    for other in range(world_size):
        share = rank_share(len(lengths), other, world_size)
        bins = pack_window([lengths[position] for position in share], max_tokens)
        plans.append([[share[index] for index in positions] for positions in bins])
    num_bins = equalise([len(plan) for plan in plans])
    return plans[rank] + [[] for _ in range(num_bins - len(plans[rank]))]
