"""Shares of rows: who has which, what a part of an EAGLE-3 plan computes, and what is refused."""

import pytest
import torch

from specforge.algorithms.eagle3.features import plan_unroll, share_plan
from specforge.algorithms.parts.alignment import supervised_rows
from specforge.algorithms.parts.sequence import SequenceShare, check_heads
from specforge.errors import ConfigError
from specforge.testing.algorithm_world import make_world, packed, small_algorithm
from specforge.testing.samples import SMALL_TARGET
from specforge.training.ranks import Ranks
from specforge.training.trainer import check_sequences, sequence_share


def shares(size):
    return [SequenceShare(rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 64])
def test_every_row_is_on_one_rank_and_no_rank_has_two_more_than_another(size, num_rows):
    places = list(range(num_rows))
    slices = [places[share.rows(num_rows)] for share in shares(size)]
    assert [place for part in slices for place in part] == places
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


@pytest.fixture
def batch():
    """Three documents; the rows of the first and the last are at their end, the second has none."""
    world = make_world(small_algorithm("eagle3"))
    first, second, third = world.samples((14, 6, 9))
    return packed([[first.masked((8, 14)), second.masked(), third.masked((2, 9))]])[0]


@pytest.mark.parametrize("size", [2, 3, 20])
def test_the_parts_of_a_plan_are_the_whole_plan(batch, size):
    plan, supervision = plan_unroll(batch, supervised_rows(batch, 3))
    parts = [share_plan(plan, supervision, share) for share in shares(size)]
    context, first, rows, tokens, positions = [], [], [], [], []
    for part, _ in parts:
        num_context = part.first_tokens.numel()
        context.append(part.context[:num_context])
        positions.append(part.positions[:num_context])
        first.append(part.embedded[part.first_tokens])
        rows.append(part.context[part.rows])
        tokens.append(part.embedded[part.tokens])
        assert torch.equal(part.positions, batch.position_ids[part.context])
    assert torch.equal(torch.cat(context), plan.context)
    assert torch.equal(torch.cat(positions), plan.positions)
    assert torch.equal(torch.cat(first), plan.first_tokens)
    assert torch.equal(torch.cat(rows), plan.context[plan.rows])
    assert torch.equal(torch.cat(tokens, dim=1), plan.tokens)
    assert torch.equal(torch.cat([part.mask for _, part in parts], dim=1), supervision.mask)
    assert torch.equal(torch.cat([part.teachers for _, part in parts], dim=1), supervision.teachers)


def test_a_part_of_a_plan_reads_what_its_rows_need_and_nothing_twice(batch):
    plan, supervision = plan_unroll(batch, supervised_rows(batch, 3))
    for share in shares(4):
        part, _ = share_plan(plan, supervision, share)
        needed = torch.cat((part.first_tokens, part.tokens.flatten()))
        assert torch.equal(needed.unique(), torch.arange(part.embedded.numel()))
        assert part.context.unique().numel() == part.context.numel()
        assert part.context.numel() <= part.first_tokens.numel() + part.rows.numel()


@pytest.mark.parametrize("case", ["eagle3", "dflash"])
def test_heads_that_cannot_be_dealt_out_are_refused(case):
    config = small_algorithm(case).draft_config(SMALL_TARGET)
    check_heads(config, 2)
    with pytest.raises(ConfigError, match=r"training.sequence_parallel is 4, .* the draft has 2 query or key heads"):
        check_heads(config, 4)


def test_a_latent_attention_splits_by_its_query_heads():
    config = small_algorithm("eagle3-mla").draft_config(SMALL_TARGET)
    check_heads(config, 4)
    with pytest.raises(ConfigError, match="has 4 query or key heads"):
        check_heads(config, 3)


def test_rows_with_heads_that_cannot_be_dealt_out_are_not_sent():
    with pytest.raises(ConfigError, match=r"training.sequence_parallel is 3, .* has 4 query or key heads"):
        SequenceShare(0, 3).to_heads(torch.zeros(5, 4, 2), 5)


def test_a_trainer_refuses_an_algorithm_that_does_not_split_samples():
    ranks = Ranks(rank=3, size=4, sequence_size=2)
    share = sequence_share(small_algorithm("dflash"), ranks)
    assert (share.rank, share.size) == (1, 2)
    assert sequence_share(small_algorithm("medusa"), Ranks()) is None
    with pytest.raises(ConfigError, match=r"is 2, but medusa trains every sample on one rank.*one of eagle3, dflash"):
        sequence_share(small_algorithm("medusa"), ranks)


def test_a_run_is_refused_for_its_algorithm_or_else_for_its_heads():
    for case, size, message in (("medusa", 2, "medusa trains every sample"), ("dflash", 4, "2 query or key heads")):
        algorithm = small_algorithm(case)
        config = algorithm.draft_config(SMALL_TARGET)
        check_sequences(algorithm, 1, config)
        with pytest.raises(ConfigError, match=message):
            check_sequences(algorithm, size, config)
