"""The loop alone: a linear draft, batches made by hand, a recording ledger."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from specforge.algorithms.base import Algorithm, DraftModel, Runs, StepContext, StepOutput, TargetTables
from specforge.contracts.batches import StepBatches, TrainBatch
from specforge.contracts.refs import Slot
from specforge.errors import DraftError
from specforge.training.checkpoint import Checkpointer, Provenance, list_checkpoints
from specforge.training.optimizer import MasterOptimizer, OptimizerSettings
from specforge.training.schedule import Schedule
from specforge.training.trainer import Trainable, Trainer, TrainerSettings


class LinearDraft(DraftModel):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1, bias=False)
        nn.init.ones_(self.fc.weight)


class SquaredError(Algorithm):
    """Row loss (w.x - 1)^2 over rows whose loss mask is set, weighted by the step that it is told (and keeps)."""

    name = "squared-error"

    def __init__(self):
        self.contexts: list[StepContext] = []

    def capture_spec(self, config, dtype):
        raise NotImplementedError

    def draft_config(self, target):
        raise NotImplementedError

    def build_draft(self, config, tables, seed, kept_ids=None):
        raise NotImplementedError

    def proposer(self, draft, tables):
        raise NotImplementedError

    def supervised_weight(self, batch, context):
        return float(batch.loss_mask.sum())

    def forward_loss(self, draft, tables, batch, context):
        self.contexts.append(context)
        errors = (draft.fc(batch.features["x"]).squeeze(-1) - 1) * batch.loss_mask
        none = torch.zeros(0, dtype=torch.int64)
        return StepOutput(
            loss_sum=(errors**2).sum() * (1.0 - context.global_step / context.total_steps),
            correct=torch.zeros(1),
            count=torch.ones(1),
            runs=Runs(none, none),
            metrics={},
        )


class Recorder:
    def __init__(self) -> None:
        self.acks: list[tuple[tuple[Slot, ...], int]] = []
        self.checkpoints: list[int] = []
        self.calls: list[str] = []

    def ack(self, slots, step):
        self.acks.append((tuple(slots), step))

    def checkpoint_state(self):
        self.calls.append("checkpoint_state")
        return {"quarantines": [{"index": len(self.acks), "to_slot": None}]}

    def checkpointed(self, step):
        self.calls.append("checkpointed")
        self.checkpoints.append(step)


def rows(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.rand(count, generator=generator) > 0.3


def batch_of(x: torch.Tensor, mask: torch.Tensor) -> TrainBatch[torch.Tensor]:
    count = torch.arange(len(x))
    return TrainBatch(count, mask, count, count * 0, {"x": x}, (len(x),), ("s",), ())


def steps(first: int, last: int, splits: int = 1):
    for step in range(first, last):
        x, mask = rows(step, 8)
        parts = zip(x.chunk(splits), mask.chunk(splits), strict=True)
        slots = (Slot(0, 2 * step), Slot(0, 2 * step + 1))
        yield StepBatches(tuple(batch_of(*part) for part in parts), slots, 2 * step + 2)


def make(
    directory: Path,
    identity: dict | None = None,
    total_steps: int = 10,
    settings: OptimizerSettings | None = None,
    algorithm: SquaredError | None = None,
):
    torch.manual_seed(0)
    draft, ledger, log = LinearDraft(), Recorder(), []
    trainer = Trainer(
        Trainable(
            algorithm or SquaredError(),
            draft,
            TargetTables(torch.zeros(1), torch.zeros(1)),
            Provenance(identity or {"seed": 0}, {"h": 4}, {}),
        ),
        MasterOptimizer(dict(draft.named_parameters()), settings or OptimizerSettings()),
        Schedule("cosine", 1e-2, total_steps=10),
        TrainerSettings(total_steps=total_steps, checkpoint_every=4, seed=0),
        Checkpointer(directory),
        ledger,
        lambda step, scalars: log.append((step, scalars)),
    )
    return trainer, draft, ledger, log


def test_every_step_is_acked_once_with_its_number_and_checkpoints_are_announced(tmp_path):
    trainer, _, ledger, log = make(tmp_path)
    assert trainer.fit(steps(0, 10)) is True
    assert [step for _, step in ledger.acks] == list(range(1, 11))
    assert [slot for slots, _ in ledger.acks for slot in slots] == [Slot(0, i) for i in range(20)]
    assert ledger.checkpoints == [4, 8, 10]
    assert [step for step, _ in log] == list(range(1, 11))


def test_the_position_is_the_one_that_the_batches_carry(tmp_path):
    trainer, *_ = make(tmp_path, total_steps=2)
    [first, second] = steps(0, 2)
    trainer.fit([replace(first, num_slots=100), replace(second, num_slots=104)])
    assert trainer.position.num_slots == 104
    assert Checkpointer(tmp_path).latest().position.num_slots == 104


def test_a_checkpoint_keeps_what_the_ledger_said_before_it_was_written(tmp_path):
    trainer, _, ledger, _ = make(tmp_path, total_steps=4)
    trainer.fit(steps(0, 4))
    assert ledger.calls == ["checkpoint_state", "checkpointed"]
    assert Checkpointer(tmp_path).latest().ledger == {"quarantines": [{"index": 4, "to_slot": None}]}


def test_a_checkpoint_without_the_ledgers_state_is_not_written(tmp_path):
    trainer, _, ledger, _ = make(tmp_path, total_steps=4)

    def fails():
        raise ConnectionError("the ledger is away")

    ledger.checkpoint_state = fails
    with pytest.raises(ConnectionError):
        trainer.fit(steps(0, 4))
    assert list_checkpoints(tmp_path) == []
    assert ledger.checkpoints == []


def test_the_update_does_not_depend_on_how_rows_are_split_into_micro_batches(tmp_path):
    weights = []
    for splits in (1, 2, 8):
        trainer, draft, *_ = make(tmp_path / str(splits))
        trainer.fit(steps(0, 5, splits))
        weights.append(draft.fc.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-7)
    assert torch.allclose(weights[0], weights[2], atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resumed_training_ends_with_the_same_bits(tmp_path, kind):
    """Oracle 43. Masters, moments, learning rate, and the step that a schedule inside the loss sees."""
    settings, told = OptimizerSettings(kind=kind), SquaredError()
    straight, draft, *_ = make(tmp_path / "straight", settings=settings, algorithm=told)
    straight.fit(steps(0, 10))
    first, *_ = make(tmp_path / "run", settings=settings)
    first.fit(steps(0, 8))
    told_after = SquaredError()
    resumed, other, ledger, _ = make(tmp_path / "run", settings=settings, algorithm=told_after)
    checkpoint = Checkpointer(tmp_path / "run").latest()
    assert checkpoint is not None
    resumed.restore(checkpoint)
    assert (resumed.position.step, resumed.position.num_slots) == (8, 16)
    resumed.fit(steps(8, 10))
    assert torch.equal(draft.fc.weight, other.fc.weight)
    assert [step for _, step in ledger.acks] == [9, 10]
    assert told_after.contexts == told.contexts[8:] == [StepContext(8, 10, 0), StepContext(9, 10, 0)]


def test_all_micro_batches_of_a_step_see_the_same_number_of_completed_steps(tmp_path):
    algorithm = SquaredError()
    make(tmp_path, algorithm=algorithm)[0].fit(steps(0, 3, splits=4))
    assert [context.global_step for context in algorithm.contexts] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_requested_stop_leaves_a_checkpoint_of_the_step_that_was_running(tmp_path):
    trainer, *_ = make(tmp_path)

    def interrupted():
        for number, step in enumerate(steps(0, 10)):
            if number == 5:
                trainer.request_stop()
            yield step

    assert trainer.fit(interrupted()) is False
    assert [path.name for path in list_checkpoints(tmp_path)][-1] == "step-00000006"


def test_training_ends_at_the_last_step_although_batches_go_on(tmp_path):
    trainer, _, ledger, _ = make(tmp_path, total_steps=3)
    assert trainer.fit(steps(0, 10)) is True
    assert ledger.checkpoints == [3]
    again, _, ledger, _ = make(tmp_path, total_steps=3)
    again.restore(Checkpointer(tmp_path).latest())
    assert again.fit(steps(3, 10)) is True
    assert ledger.acks == []


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_one_poisoned_sample_among_eight_gives_the_update_of_the_other_seven(tmp_path, poison):
    x, mask = rows(3, 24)
    documents, lengths = torch.arange(24) // 3, (3,) * 8

    def batch(features, supervised):
        ids = torch.arange(24)
        names = tuple(map(str, range(8)))
        return TrainBatch(ids, supervised, ids % 3, documents, {"x": features}, lengths, names, ())

    without = batch(x, mask & (documents != 5))
    poisoned = x.clone()
    poisoned[16, 2] = poison
    updates = []
    for name, found in (("seven", without), ("eight", batch(poisoned, mask))):
        trainer, draft, _, log = make(tmp_path / name)
        trainer.fit([StepBatches((found,), (Slot(0, 0),), 8), *steps(1, 3)])
        updates.append(draft.fc.weight.detach().clone())
    assert torch.equal(updates[0], updates[1])
    assert trainer.position.num_nonfinite_samples == 1
    assert trainer.position.num_skipped_updates == 0
    assert [scalars["num_nonfinite_samples"] for _, scalars in log] == [1, 1, 1]
    assert all(math.isfinite(scalars["loss"]) for _, scalars in log)
    assert Checkpointer(tmp_path / "eight").latest().position.num_nonfinite_samples == 1


def test_a_step_of_poisoned_samples_alone_is_consumed_without_an_update(tmp_path):
    trainer, draft, ledger, _ = make(tmp_path)
    before = draft.fc.weight.detach().clone()
    poisoned = batch_of(torch.full((2, 4), float("nan")), torch.ones(2, dtype=torch.bool))
    trainer.fit([StepBatches((poisoned,), (Slot(0, 0),), 1)])
    assert torch.equal(before, draft.fc.weight)
    assert [step for _, step in ledger.acks] == [1]
    assert (trainer.position.num_nonfinite_samples, trainer.position.num_skipped_updates) == (1, 0)


def test_non_finite_gradients_leave_the_weights_finite_and_are_counted(tmp_path):
    trainer, draft, _, log = make(tmp_path)
    overflowing = batch_of(torch.full((2, 4), 1e30), torch.ones(2, dtype=torch.bool))
    trainer.fit([*steps(0, 2), StepBatches((overflowing,), (Slot(0, 0),), 1), *steps(2, 4)])
    assert torch.isfinite(draft.fc.weight).all()
    assert trainer.position.num_skipped_updates == 1
    assert trainer.position.num_nonfinite_samples == 0
    assert log[-1][1]["num_skipped_updates"] == 1


def test_a_step_without_supervised_rows_is_consumed_without_an_update(tmp_path):
    trainer, draft, ledger, _ = make(tmp_path)
    before = draft.fc.weight.detach().clone()
    trainer.fit([StepBatches((batch_of(rows(0, 3)[0], torch.zeros(3, dtype=torch.bool)),), (Slot(0, 0),), 1)])
    assert torch.equal(before, draft.fc.weight)
    assert [step for _, step in ledger.acks] == [1]


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path):
    make(tmp_path)[0].fit(steps(0, 2))
    other, *_ = make(tmp_path, identity={"seed": 5})
    with pytest.raises(DraftError, match="seed = 0, but this run has 5"):
        other.restore(Checkpointer(tmp_path).latest())
