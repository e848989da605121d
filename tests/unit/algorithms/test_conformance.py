"""Every algorithm that ships, through the conformance suite."""

import pytest

from specforge.algorithms.base import Algorithm
from specforge.algorithms.catalog import ALGORITHMS
from specforge.testing.algorithm import AlgorithmSuite
from specforge.testing.algorithm_world import SMALL_OPTIONS, small_algorithm

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
