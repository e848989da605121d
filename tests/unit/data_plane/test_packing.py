import random

import pytest

from specforge.data_plane.packing import equalise, pack_window, plan_rank, rank_share


def test_longest_first_ties_by_position():
    assert pack_window([3, 5, 5, 2, 4], 8) == [[0, 1], [2, 3], [4]]


def test_sample_over_the_budget_is_alone():
    assert pack_window([3, 20, 3], 8) == [[1], [0, 2]]


def test_empty_window_has_no_bins():
    assert pack_window([], 8) == []


def test_budget_below_one_token_is_refused():
    with pytest.raises(ValueError, match="max_tokens"):
        pack_window([1], 0)


def test_every_sample_is_packed_once_within_the_budget():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randrange(1, 120) for _ in range(draw.randrange(60))]
        bins = pack_window(lengths, 100)
        assert sorted(position for positions in bins for position in positions) == list(range(len(lengths)))
        for positions in bins:
            assert len(positions) == 1 or sum(lengths[position] for position in positions) <= 100


def test_rank_shares_part_the_window():
    shares = [list(rank_share(7, rank, 3)) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match="rank"):
        rank_share(7, 3, 3)


def test_every_rank_runs_as_many_micro_batches_as_the_busiest():
    lengths = [10, 1, 10, 1, 10, 1]
    plans = [plan_rank(lengths, 10, rank, 2) for rank in range(2)]
    assert plans == [[[0], [2], [4]], [[1, 3, 5], [], []]]
    assert equalise([]) == 1
    assert plan_rank([5], 10, 1, 2) == [[]]


@pytest.mark.parametrize("world_size", range(1, 6))
def test_ranks_run_alike_and_share_by_position_for_any_lengths(world_size):
    draw = random.Random(world_size)
    for num_samples in range(12):
        lengths = [draw.randrange(1, 30) for _ in range(num_samples)]
        plans = [plan_rank(lengths, 32, rank, world_size) for rank in range(world_size)]
        assert len({len(plan) for plan in plans}) == 1
        for rank, plan in enumerate(plans):
            assert sorted(index for bins in plan for index in bins) == list(range(rank, num_samples, world_size))
