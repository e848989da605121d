"""Every algorithm through the trainer, on samples that could break it: none does, and the good ones are learned."""

from dataclasses import replace

import pytest
import torch

from specforge.algorithms.catalog import ALGORITHMS
from specforge.contracts.batches import StepBatches
from specforge.contracts.refs import Slot
from specforge.testing.algorithm_world import SMALL_OPTIONS, make_world, packed, small_algorithm
from specforge.training.checkpoint import Provenance
from specforge.training.checkpointer import Checkpointer
from specforge.training.optimizer import MasterOptimizer, OptimizerSettings
from specforge.training.ranks import Ranks
from specforge.training.schedule import Schedule
from specforge.training.sharding import ShardedDraft, Sharding
from specforge.training.trainer import Surroundings, Trainable, Trainer, TrainerSettings

CASES = [case for case in SMALL_OPTIONS if case.partition("-")[0] in ALGORITHMS]
LENGTHS = (19, 12, 24, 2, 9, 17, 1, 14)
SMOOTH = OptimizerSettings(eps=1e-2)
"""The large eps keeps the update a smooth function of the gradient, whose rounding depends on the grouping."""
POISONED, UNSUPERVISED = (1, 5), 4


class Silence:
    """A ledger and a log that want to know nothing."""

    def ack(self, slots, step): ...

    def checkpoint_state(self):
        return {}

    def checkpointed(self, step): ...

    def on_step(self, step, scalars): ...

    def on_evaluation(self, step, scalars): ...


def make_trainer(world, directory):
    parameters = dict(world.draft.named_parameters())
    return Trainer(
        Trainable(
            world.algorithm,
            ShardedDraft(world.draft, Ranks(), Sharding(), "cpu"),
            world.tables,
            Provenance({}, {}, {}),
        ),
        MasterOptimizer(parameters, SMOOTH),
        Schedule("constant", lr=1e-2, total_steps=10),
        TrainerSettings(total_steps=10, checkpoint_every=100, seed=5),
        Surroundings(Checkpointer(directory), Silence(), Silence()),
    )


def poison(sample, value):
    """One bad entry in one feature."""
    features = {name: tensor.clone() for name, tensor in sample.features.items()}
    next(iter(features.values()))[len(sample) // 2, 3] = value
    return replace(sample, features=features)


def step_of(*groups):
    return StepBatches(tuple(packed(groups)), (Slot(0, 0),), 1)


@pytest.mark.parametrize("case", CASES)
def test_hard_samples_are_counted_and_the_others_are_learned(case, tmp_path):
    """NaN and infinite features, no supervised token, too short: the update is that of the good samples alone."""
    results = []
    for values in ((float("nan"), float("inf")), None):
        world = make_world(small_algorithm(case))
        samples = world.samples(LENGTHS)
        samples[UNSUPERVISED] = samples[UNSUPERVISED].masked()
        for place, value in zip(POISONED, values or (), strict=False):
            samples[place] = poison(samples[place], value)
        if values is None:
            samples = [sample for place, sample in enumerate(samples) if place not in POISONED]
        trainer = make_trainer(world, tmp_path / str(values))
        scalars = trainer.train_step(step_of(samples[:3], samples[3:]))
        assert scalars["num_skipped_updates"] == 0
        assert scalars["num_nonfinite_samples"] == (0 if values is None else 2)
        results.append((world.draft.served_state(), scalars["loss"]))
    (state, loss), (expected, expected_loss) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, tensor in expected.items():
        assert torch.allclose(state[name].float(), tensor.float(), rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_supervision_changes_nothing(case, tmp_path):
    world = make_world(small_algorithm(case))
    before = {name: tensor.clone() for name, tensor in world.draft.served_state().items()}
    samples = world.samples(LENGTHS)
    nothing = [sample.masked() for sample in samples[:3]]
    trainer = make_trainer(world, tmp_path)
    scalars = trainer.train_step(step_of(nothing, [poison(samples[5], float("nan"))]))
    assert scalars["loss"] == scalars["grad_norm"] == 0.0
    assert scalars["num_skipped_updates"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.draft.served_state().items())
    scalars = trainer.train_step(step_of(samples))
    assert scalars["loss"] > 0.0
    assert all(bool(tensor.isfinite().all()) for tensor in world.draft.served_state().values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in world.draft.served_state().items())
