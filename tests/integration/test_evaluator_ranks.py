"""An evaluation of every algorithm on one, two and three ranks: real processes with gloo."""

import datetime as dt
import os
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from children import child_process
from held_out_sets import SAMPLE_BUDGETS, held_out_samples, write_set

from specforge.algorithms.catalog import ALGORITHMS
from specforge.data_plane.offline import FeatureSet
from specforge.errors import DataError
from specforge.evaluation.evaluator import Evaluator, EvaluatorSettings
from specforge.testing.algorithm_world import SMALL_OPTIONS, make_world, small_algorithm

CASES = [case for case in SMALL_OPTIONS if case.partition("-")[0] in ALGORITHMS]
TOKENS = SAMPLE_BUDGETS[4]
WORLD_SIZES = (2, 3)
DEADLINE = dt.timedelta(seconds=120)
BROKEN = "sample-7"


class GlooRanks:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def gather(self, values):
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [row.tolist() for row in found]


def evaluated(case, directory, ranks=None, tokens=TOKENS):
    world = make_world(small_algorithm(case))
    settings = EvaluatorSettings(tokens)
    return Evaluator(world.algorithm, world.tables, FeatureSet(directory), settings, ranks).run(world.draft)


def run_rank(pipe, rank, size, sets):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{sets / f'rendezvous-{size}'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size, timeout=DEADLINE)
    ranks = GlooRanks(rank, size)
    found = {case: evaluated(case, sets / case, ranks) for case in CASES}
    found["few"] = evaluated("eagle3", sets / "few", ranks, SAMPLE_BUDGETS[1])
    try:
        evaluated("eagle3", sets / "broken", ranks)
    except DataError as error:
        found["broken"] = str(error)
    found["again"] = evaluated("eagle3", sets / "eagle3", ranks)
    dist.destroy_process_group()
    pipe.send(found)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A feature set a case; ``few`` has two samples, ``broken`` one that is not finite."""
    directory = tmp_path_factory.mktemp("sets")
    for case in CASES:
        world = make_world(small_algorithm(case))
        write_set(directory / case, world, held_out_samples(world))
    world = make_world(small_algorithm("eagle3"))
    write_set(directory / "few", world, held_out_samples(world, (12, 9)))
    samples = held_out_samples(world)
    next(sample for sample in samples if sample.name == BROKEN).features["aux"][1, 0] = float("nan")
    write_set(directory / "broken", world, samples)
    return directory


@pytest.fixture(scope="module")
def ranks(sets):
    """What the ranks found, by world size."""
    preload = ["specforge.testing.algorithm_world", "specforge.evaluation.evaluator"]
    found = {}
    for size in WORLD_SIZES:
        with ExitStack() as children:
            pipes = [
                children.enter_context(child_process(run_rank, rank, size, sets, preload=preload))[1]
                for rank in range(size)
            ]
            assert all(pipe.poll(DEADLINE.total_seconds()) for pipe in pipes), "a rank never finished"
            found[size] = [pipe.recv() for pipe in pipes]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", WORLD_SIZES)
def test_every_rank_finds_the_numbers_of_one(ranks, sets, case, size):
    expected = evaluated(case, sets / case)
    assert expected["eval/num_supervised"] > 0
    for found in ranks[size]:
        assert found[case].keys() == expected.keys()
        for name, value in expected.items():
            exact = "acc" in name or "num_" in name
            assert found[case][name] == (value if exact else pytest.approx(value, rel=1e-12)), name
        assert found[case] == ranks[size][0][case]


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_ranks_without_a_sample_find_the_same(ranks, sets, size):
    expected = evaluated("eagle3", sets / "few", tokens=SAMPLE_BUDGETS[1])
    assert [found["few"] for found in ranks[size]] == [pytest.approx(expected, rel=1e-12)] * size


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_all_ranks_refuse_a_sample_that_one_cannot_use_and_can_go_on(ranks, sets, size):
    messages = [found["broken"] for found in ranks[size]]
    assert all(f"'{BROKEN}'" in message for message in messages)
    assert sum("NaN or infinite" in message for message in messages) == 1
    assert [found["again"] for found in ranks[size]] == [found["eagle3"] for found in ranks[size]]
