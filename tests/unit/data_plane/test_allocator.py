import random

import pytest

from specforge.data_plane.allocator import OffsetAllocator, Span, plan_moves


def test_freed_ranges_merge_with_both_neighbours():
    allocator = OffsetAllocator(300)
    offsets = [allocator.allocate(100) for _ in range(3)]
    assert offsets == [0, 100, 200]
    assert allocator.allocate(1) is None
    allocator.free(0, 100)
    allocator.free(200, 100)
    assert allocator.gaps() == [(0, 100), (200, 100)]
    allocator.free(100, 100)
    assert allocator.gaps() == [(0, 300)]
    assert allocator.free_bytes == 300


def test_smallest_gap_that_fits_is_used():
    allocator = OffsetAllocator(1000)
    for size in (100, 50, 60, 50, 740):
        allocator.allocate(size)
    allocator.free(0, 100)
    allocator.free(150, 60)
    assert allocator.allocate(55) == 150
    assert allocator.allocate(5) == 205


def test_ranges_never_overlap_and_nothing_leaks():
    draw = random.Random(1)
    allocator = OffsetAllocator(1 << 16)
    live = {}
    for _ in range(5000):
        if live and draw.random() < 0.5:
            offset = draw.choice(list(live))
            allocator.free(offset, live.pop(offset))
        else:
            size = draw.randrange(1, 1024)
            offset = allocator.allocate(size)
            if offset is not None:
                live[offset] = size
        assert allocator.free_bytes == (1 << 16) - sum(live.values())
    end = 0
    for offset in sorted(live):
        assert offset >= end
        end = offset + live[offset]
    for offset, size in live.items():
        allocator.free(offset, size)
    assert allocator.gaps() == [(0, 1 << 16)]


def test_moves_take_the_stretch_with_the_fewest_live_bytes():
    spans = [Span(0, 30, False), Span(40, 30, False), Span(80, 5, False), Span(90, 10, False)]
    # Gaps: 30-40, 70-80, 85-90. Moving the 5 bytes at 80 opens 15 bytes before 90.
    assert plan_moves(spans, 100, 15) == [(2, 70)]
    assert plan_moves(spans, 100, 25) == [(1, 30), (2, 60)]
    assert plan_moves(spans, 100, 26) is None


def test_pinned_spans_stay():
    spans = [Span(0, 30, False), Span(40, 30, True), Span(80, 5, False), Span(90, 10, False)]
    assert plan_moves(spans, 100, 15) == [(2, 70)]
    assert plan_moves(spans, 100, 16) is None
    assert plan_moves([], 100, 100) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_exists_and_moves_at_most_three_times_the_bytes_at_three_quarters_live(seed):
    draw = random.Random(seed)
    capacity = 1 << 16
    largest = capacity // 64
    for _ in range(50):
        sizes = []
        while sum(sizes) + largest <= 0.75 * capacity:
            sizes.append(draw.randrange(1, largest + 1) if draw.random() < 0.5 else draw.randrange(1, 64))
        cuts = sorted(draw.randrange(capacity - sum(sizes) + 1) for _ in sizes)
        spans, offset, before = [], 0, 0
        for size, cut in zip(sizes, cuts, strict=True):
            offset += cut - before
            before = cut
            spans.append(Span(offset, size, False))
            offset += size
        moves = plan_moves(spans, capacity, largest)
        assert moves is not None
        # One block may straddle the two ends of the stretch in the argument, hence "+ 2".
        assert sum(spans[index].num_bytes for index, _ in moves) <= (3 + 2) * largest
        placed = {index: (span.offset, span.num_bytes) for index, span in enumerate(spans)}
        for index, target in moves:
            assert target < placed[index][0]
            placed[index] = (target, spans[index].num_bytes)
        ranges = sorted(placed.values())
        gaps = [start - end for start, end in zip([r[0] for r in ranges], [0] + [sum(r) for r in ranges], strict=False)]
        assert min(gaps) >= 0
        assert max(*gaps, capacity - sum(ranges[-1])) >= largest
