"""Every algorithm on two and four gloo ranks against one process; checkpoints that change the number of ranks."""

import functools
import math
import shutil
from typing import get_args

import pytest
import torch
from rank_training import LENGTHS, Training, train, train_on

from specforge.algorithms.catalog import ALGORITHMS
from specforge.testing.algorithm_world import SMALL_OPTIONS
from specforge.training.checkpoint import newest_whole
from specforge.training.optimizer import OptimizerKind
from specforge.training.ranks import Ranks
from specforge.training.schedule import ScheduleKind
from specforge.training.sharding import Sharding

CASES = [case for case in SMALL_OPTIONS if case.partition("-")[0] in ALGORITHMS]
VARIANTS = [case for case in CASES if case not in ALGORITHMS]
EVERY_ALGORITHM = [case for case in CASES if case in ALGORITHMS]
SHARDINGS = {"shard": Sharding("shard"), "replicate": Sharding("replicate"), "hybrid": Sharding("hybrid", 2)}
COUNTED = ("num_tokens", "num_nonfinite_samples", "num_skipped_updates")


@pytest.fixture(scope="module")
def alone():
    """Fifty steps of a case in one process."""
    return functools.cache(lambda case: train(Ranks(), Training(case)))


def on_two_ranks(directory, cases):
    """The same on two ranks, by case: the records of both."""
    return dict(zip(cases, train_on(2, directory, [Training(case) for case in cases]), strict=True))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("two"), EVERY_ALGORITHM)


@pytest.fixture(scope="module")
def variants_together(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("variants"), VARIANTS)


@pytest.fixture(scope="module")
def by_four(tmp_path_factory):
    directory = tmp_path_factory.mktemp("four")
    kinds = [Training(case, sharding=list(SHARDINGS.values())[i % 3]) for i, case in enumerate(CASES)]
    return dict(zip(CASES, train_on(4, directory, kinds), strict=True))


def assert_same_training(ranks, single):
    for recorded in ranks:
        assert_same_gradients(recorded.first_gradients, single.first_gradients)
        assert recorded.slots == single.slots
        assert len(recorded.scalars) == len(single.scalars) == 50
        for step, (found, expected) in enumerate(zip(recorded.scalars, single.scalars, strict=True)):
            tolerance = 1e-5 if step == 0 else 1e-3
            assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance), step
            assert [found[name] for name in COUNTED] == [expected[name] for name in COUNTED]
        # before the weights differ by rounding the counts are the same
        assert {k: v for k, v in recorded.scalars[0].items() if k.startswith("accuracy")} == {
            k: v for k, v in single.scalars[0].items() if k.startswith("accuracy")
        }


def assert_same_gradients(found, expected):
    assert set(found) == set(expected)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in expected.values()))
    off = math.sqrt(sum(float((found[k].double() - expected[k].double()).square().sum()) for k in expected))
    assert off < 1e-6 * norm, (off, norm)


@pytest.mark.parametrize("case", EVERY_ALGORITHM)
def test_two_ranks_train_as_one_process_does(together, alone, case):
    assert_same_training(together[case], alone(case))


@pytest.mark.full
@pytest.mark.parametrize("case", VARIANTS)
def test_two_ranks_train_variants_as_one_process_does(variants_together, alone, case):
    assert_same_training(variants_together[case], alone(case))
    assert_reduced_once(variants_together[case])


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_train_as_one_process_does_sharded_replicated_and_hybrid(by_four, alone, case):
    assert_same_training(by_four[case], alone(case))


@pytest.mark.parametrize("case", EVERY_ALGORITHM)
def test_every_gradient_is_reduced_exactly_once_an_optimizer_step(together, case):
    assert_reduced_once(together[case])


def assert_reduced_once(ranks):
    for recorded in ranks:
        num_learning = len(recorded.first_gradients)
        for reductions in recorded.reductions:
            assert len(reductions) == len(set(reductions)) == num_learning


def test_all_ranks_end_with_the_same_weights(together):
    for first, second in together.values():
        assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


@pytest.mark.full
def test_muon_on_shards_trains_as_in_one_process(tmp_path):
    """Every kind of matrix that a draft has, those of one row too."""
    trainings = [Training(case, optimizer="muon", last_step=8) for case in CASES]
    for training, ranks in zip(trainings, train_on(2, tmp_path, trainings), strict=True):
        expected = [scalars["loss"] for scalars in train(Ranks(), training).scalars]
        for recorded in ranks:
            assert [scalars["loss"] for scalars in recorded.scalars] == pytest.approx(expected, rel=1e-3), training.case


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """(directory, records of the leader over all 50 steps) of two ranks that saved at step 20."""
    directory = tmp_path_factory.mktemp("reshard")
    straight = train_on(2, directory, [Training("eagle3", last_step=50)])[0][0]
    train_on(2, directory, [Training("eagle3", directory / "checkpoints", last_step=20)])
    return directory, straight


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_checkpoint_of_two_ranks_is_resumed_on_another_number(interrupted, tmp_path, size):
    directory, straight = interrupted
    shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    assert len(list((newest_whole(tmp_path / "checkpoints").path / "shards").iterdir())) == 2
    resumed = train_on(size, tmp_path, [Training("eagle3", tmp_path / "checkpoints", 20, 50)])[0][0]
    assert [slots for slots, _ in resumed.acked] == straight.slots[20:]
    assert [step for _, step in resumed.acked] == list(range(21, 51))
    losses = [scalars["loss"] for scalars in resumed.scalars]
    expected = [scalars["loss"] for scalars in straight.scalars[20:]]
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert newest_whole(tmp_path / "checkpoints").position.num_slots == 50 * len(LENGTHS)


@pytest.mark.parametrize("optimizer", get_args(OptimizerKind))
def test_two_ranks_resume_bit_for_bit_with_every_schedule(tmp_path, optimizer):
    trainings = []
    for schedule in get_args(ScheduleKind):
        place, options = tmp_path / schedule, {"optimizer": optimizer, "schedule": schedule, "lr": 1e-2}
        trainings.append(Training("dflash", last_step=16, **options))
        trainings.append(Training("dflash", place, last_step=9, **options))
        trainings.append(Training("dflash", place, 9, 16, **options))
    records = train_on(2, tmp_path, trainings)
    for whole, resumed in zip(records[0::3], records[2::3], strict=True):
        for expected, found in zip(whole, resumed, strict=True):
            assert all(torch.equal(expected.weights[name], found.weights[name]) for name in expected.weights)
