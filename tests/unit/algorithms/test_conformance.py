"""Every algorithm that ships, through the conformance suite."""

import pytest
import torch

from specforge.algorithms.base import Algorithm, zero_output
from specforge.algorithms.catalog import ALGORITHMS
from specforge.testing.algorithm import AlgorithmSuite, block_calls, parameters_only_inside_blocks
from specforge.testing.algorithm_world import SMALL_OPTIONS, make_world, small_algorithm
from specforge.testing.samples import pack

CASES = [case for case in SMALL_OPTIONS if case.partition("-")[0] in ALGORITHMS]
DRAW = {"peagle", "dflash", "domino", "dspark"}
FROM_THE_TARGET = {"medusa"}


def test_every_algorithm_of_the_catalog_is_a_case():
    assert {case.partition("-")[0] for case in CASES} == set(ALGORITHMS)


@pytest.mark.parametrize("case", CASES)
class TestShipped(AlgorithmSuite):
    @pytest.fixture
    def algorithm(self, case: str) -> Algorithm:
        name = case.partition("-")[0]
        self.draws = name in DRAW
        self.initialised_at_random = name not in FROM_THE_TARGET
        return small_algorithm(case)


@pytest.mark.parametrize("case", CASES)
def test_every_shipped_draft_has_blocks_that_training_calls(case: str):
    world = make_world(small_algorithm(case))
    assert (
        set(block_calls(world, pack(world.samples((9, 5))))) == set(range(len(world.draft.training_blocks()))) != set()
    )


def test_a_weight_that_is_read_outside_its_block_is_found(monkeypatch: pytest.MonkeyPatch):
    world = make_world(small_algorithm("dflash"))
    batch, fuse = pack(world.samples((9, 5))), world.draft.fuse
    with parameters_only_inside_blocks(world.draft):
        assert bool(world.loss(batch).loss_sum.isfinite())
    foreign = world.draft.layers[1].mlp.down_proj
    monkeypatch.setattr(world.draft, "fuse", lambda features: fuse(features) + foreign.weight.sum())
    assert bool(world.loss(batch).loss_sum.isfinite())
    with parameters_only_inside_blocks(world.draft), pytest.raises((RuntimeError, NotImplementedError)):
        world.loss(batch)
    monkeypatch.setattr(world.draft, "fuse", lambda features: fuse(features).to(foreign.weight.dtype))
    with parameters_only_inside_blocks(world.draft), pytest.raises(RuntimeError, match="dtype"):
        world.loss(batch)


def test_an_empty_batch_of_a_draft_with_blocks_must_call_them():
    world = make_world(small_algorithm("dflash"))
    with pytest.raises(AssertionError, match="call the blocks on no rows"):
        zero_output(world.draft, 1)
    assert not torch.is_nonzero(zero_output(world.draft, 1, states=torch.zeros(0, 4)).loss_sum)
