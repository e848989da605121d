"""The gradient of an optimizer step of every algorithm, on one rank and on two: real processes with gloo.

Weights and gradients are reduced by the test: the algorithms allow it, the trainer runs on one rank.
"""

import datetime as dt
import os

import pytest
import torch
import torch.distributed as dist
from children import child_process

from specforge.algorithms.catalog import ALGORITHMS
from specforge.data_plane.packing import rank_share
from specforge.testing.algorithm import LENGTHS
from specforge.testing.algorithm_world import (
    SMALL_OPTIONS,
    accumulate,
    assert_same_gradients,
    gradients,
    make_world,
    packed,
    small_algorithm,
    step_gradients,
)

CASES = [case for case in SMALL_OPTIONS if case.partition("-")[0] in ALGORITHMS]
WORLD_SIZE = 2
DEADLINE = dt.timedelta(seconds=60)


def uneven(world):
    """Eight samples whose supervised tokens are spread unevenly over the ranks."""
    samples = world.samples(LENGTHS)
    return [*samples[:4], samples[4].masked(), *samples[5:]]


def one_sided(world):
    """The samples of rank 1 have no supervised token."""
    return [sample.masked() if place % WORLD_SIZE else sample for place, sample in enumerate(uneven(world))]


STEPS = {"uneven": uneven, "one_sided": one_sided}


def rank_gradients(world, samples, rank):
    """All-reduced gradients of a step, and those of this rank alone: its two micro-batches and an empty one."""
    own = [samples[position] for position in rank_share(len(samples), rank, WORLD_SIZE)]
    batches = [*packed([own[:3], own[3:]]), world.empty]
    weight = torch.tensor(world.weight(batches), dtype=torch.float64)
    dist.all_reduce(weight)
    world.draft.zero_grad()
    accumulate(world, batches, float(weight))
    alone = gradients(world)
    summed = {name: gradient.clone() for name, gradient in alone.items()}
    for gradient in summed.values():
        dist.all_reduce(gradient)
    return summed, alone


def run_rank(pipe, rank, rendezvous):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE, timeout=DEADLINE
    )
    found = {}
    for case in CASES:
        world = make_world(small_algorithm(case))
        for name, build in STEPS.items():
            both = rank_gradients(world, build(world), rank)
            found[case, name] = [{k: gradient.numpy() for k, gradient in tensors.items()} for tensors in both]
    dist.destroy_process_group()
    pipe.send(found)


def received(pipe):
    """(all-reduced, own) gradients of a rank by (case, step)."""
    assert pipe.poll(DEADLINE.total_seconds()), "a rank never finished"
    return {
        key: [{k: torch.from_numpy(v) for k, v in tensors.items()} for tensors in both]
        for key, both in pipe.recv().items()
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    preload = ["specforge.testing.algorithm_world"]
    with (
        child_process(run_rank, 0, rendezvous, preload=preload) as (_, first),
        child_process(run_rank, 1, rendezvous, preload=preload) as (_, second),
    ):
        yield received(first), received(second)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", STEPS)
def test_two_ranks_give_the_gradient_of_one(ranks, case, step):
    world = make_world(small_algorithm(case))
    expected = step_gradients(world, packed([STEPS[step](world)]))
    for found in ranks:
        summed, _ = found[case, step]
        assert_same_gradients(summed, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_without_supervision_contributes_zeros(ranks, case):
    _, alone = ranks[1][case, "one_sided"]
    assert all(bool((gradient == 0).all()) for gradient in alone.values())
