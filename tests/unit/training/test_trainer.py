"""The loop alone: a linear draft, batches made by hand, a recording ledger."""

import errno
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from specforge.algorithms.base import Algorithm, DraftModel, Runs, StepContext, StepOutput, TargetTables
from specforge.contracts.batches import StepBatches, TrainBatch
from specforge.contracts.refs import Slot
from specforge.errors import DraftError, RunFailed
from specforge.training.checkpoint import (
    Provenance,
    best_state,
    list_checkpoints,
    newest_whole,
    read_draft_tensors,
    read_state,
)
from specforge.training.checkpointer import Checkpointer
from specforge.training.optimizer import MasterOptimizer, OptimizerKind, OptimizerSettings
from specforge.training.ranks import Ranks
from specforge.training.schedule import Schedule, ScheduleKind
from specforge.training.sharding import ShardedDraft, Sharding
from specforge.training.trainer import Surroundings, Trainable, Trainer, TrainerSettings


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


class Log:
    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []

    def on_step(self, step, scalars):
        self.steps.append((step, scalars))

    def on_evaluation(self, step, scalars):
        self.evaluations.append((step, scalars))


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
    evaluation=None,
    kind: str = "cosine",
):
    torch.manual_seed(0)
    draft, ledger, log = LinearDraft(), Recorder(), Log()
    trainer = Trainer(
        Trainable(
            algorithm or SquaredError(),
            ShardedDraft(draft, Ranks(), Sharding(), "cpu"),
            TargetTables(torch.zeros(1), torch.zeros(1)),
            Provenance(identity or {"seed": 0}, {"h": 4}, {}),
        ),
        MasterOptimizer(dict(draft.named_parameters()), settings or OptimizerSettings()),
        Schedule(kind, 1e-2, total_steps=10),
        TrainerSettings(total_steps=total_steps, checkpoint_every=4, seed=0),
        Surroundings(Checkpointer(directory), ledger, log, evaluation=evaluation),
    )
    return trainer, draft, ledger, log


def test_every_step_is_acked_once_with_its_number_and_checkpoints_are_announced(tmp_path):
    trainer, _, ledger, log = make(tmp_path)
    assert trainer.fit(steps(0, 10)) is True
    assert [step for _, step in ledger.acks] == list(range(1, 11))
    assert [slot for slots, _ in ledger.acks for slot in slots] == [Slot(0, i) for i in range(20)]
    assert ledger.checkpoints == [4, 8, 10]
    assert [step for step, _ in log.steps] == list(range(1, 11))


def test_the_position_is_the_one_that_the_batches_carry(tmp_path):
    trainer, *_ = make(tmp_path, total_steps=2)
    [first, second] = steps(0, 2)
    trainer.fit([replace(first, num_slots=100), replace(second, num_slots=104)])
    assert trainer.position.num_slots == 104
    assert newest_whole(tmp_path).position.num_slots == 104


def test_a_checkpoint_keeps_what_the_ledger_said_before_it_was_written(tmp_path):
    trainer, _, ledger, _ = make(tmp_path, total_steps=4)
    trainer.fit(steps(0, 4))
    assert ledger.calls == ["checkpoint_state", "checkpointed"]
    assert newest_whole(tmp_path).ledger == {"quarantines": [{"index": 4, "to_slot": None}]}


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


@pytest.mark.parametrize("schedule", get_args(ScheduleKind))
@pytest.mark.parametrize("kind", get_args(OptimizerKind))
def test_resumed_training_ends_with_the_same_bits(tmp_path, kind, schedule):
    """Oracle 43. Masters, moments, learning rate, and the step that a schedule inside the loss sees."""
    settings, told = OptimizerSettings(kind=kind, weight_decay=0.1), SquaredError()
    straight, draft, *_ = make(tmp_path / "straight", settings=settings, algorithm=told, kind=schedule)
    straight.fit(steps(0, 10))
    first, *_ = make(tmp_path / "run", settings=settings, kind=schedule)
    first.fit(steps(0, 8))
    told_after = SquaredError()
    resumed, other, ledger, _ = make(tmp_path / "run", settings=settings, algorithm=told_after, kind=schedule)
    checkpoint = newest_whole(tmp_path / "run")
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
    again.restore(newest_whole(tmp_path))
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
    assert [scalars["num_nonfinite_samples"] for _, scalars in log.steps] == [1, 1, 1]
    assert all(math.isfinite(scalars["loss"]) for _, scalars in log.steps)
    assert newest_whole(tmp_path / "eight").position.num_nonfinite_samples == 1


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
    assert log.steps[-1][1]["num_skipped_updates"] == 1


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
        other.restore(newest_whole(tmp_path))


class Scores:
    """An evaluation that gives these losses, one a call."""

    metric = "eval/avg_loss"

    def __init__(self, every, *losses, key="these samples"):
        self.every, self.losses, self.key = every, list(losses), key

    def __call__(self, draft, step):
        return {self.metric: self.losses.pop(0)}

    def is_better(self, value, than):
        return not math.isnan(value) and (than is None or value < than)


def test_the_best_checkpoint_is_kept_and_marked_and_survives_a_restart(tmp_path):
    trainer, _, _, log = make(tmp_path, total_steps=10, evaluation=Scores(2, 5.0, 3.0, 4.0, 6.0, 7.0))
    trainer.fit(steps(0, 10))
    assert [step for step, _ in log.evaluations] == [2, 4, 6, 8, 10]
    best = best_state(tmp_path)
    assert (best.position.step, best.best) == (4, True)
    assert best.evaluation == {"eval/avg_loss": 3.0, "held_out": "these samples"}
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000008", "step-00000010"]
    assert (tmp_path / "latest").resolve().name == "step-00000010"


def test_a_resumed_run_knows_the_best_of_the_run_before(tmp_path):
    make(tmp_path, total_steps=4, evaluation=Scores(2, 5.0, 3.0))[0].fit(steps(0, 4))
    again, *_ = make(tmp_path, evaluation=Scores(2, 4.0, 2.0, 9.0))
    again.restore(newest_whole(tmp_path))
    again.knows_best(best_state(tmp_path))
    again.fit(steps(4, 10))
    assert best_state(tmp_path).position.step == 8


def test_a_best_of_other_samples_is_nothing_to_compare_with(tmp_path):
    make(tmp_path, total_steps=4, evaluation=Scores(2, 5.0, 1.0))[0].fit(steps(0, 4))
    again, *_ = make(tmp_path, evaluation=Scores(6, 4.0, 9.0, key="others"))
    again.restore(newest_whole(tmp_path))
    again.knows_best(best_state(tmp_path))
    again.fit(steps(4, 10))
    assert best_state(tmp_path).position.step == 6


def test_nothing_is_the_best_while_every_number_is_nan(tmp_path):
    trainer, *_ = make(tmp_path, total_steps=4, evaluation=Scores(2, math.nan, math.nan))
    trainer.fit(steps(0, 4))
    assert best_state(tmp_path) is None


def test_the_last_draft_is_evaluated_although_the_batches_end_early(tmp_path):
    """A sample was set aside: 9 of 10 steps. At step 8 there is a checkpoint of a draft that was not evaluated."""
    for name, num_steps in (("nine", 9), ("eight", 8)):
        trainer, _, _, log = make(tmp_path / name, evaluation=Scores(500, 2.0))
        assert trainer.fit(steps(0, num_steps)) is True
        assert [step for step, _ in log.evaluations] == [num_steps]
        assert best_state(tmp_path / name).position.step == num_steps


def test_a_finished_run_that_is_resumed_is_not_evaluated_again(tmp_path):
    make(tmp_path, total_steps=4, evaluation=Scores(4, 2.0))[0].fit(steps(0, 4))
    again, _, _, log = make(tmp_path, total_steps=4, evaluation=Scores(4))
    again.restore(newest_whole(tmp_path))
    assert again.fit(()) is True
    assert log.evaluations == []


def test_a_kill_before_the_best_was_marked_does_not_lose_it(tmp_path):
    make(tmp_path, total_steps=4, evaluation=Scores(4, 2.0))[0].fit(steps(0, 4))
    (tmp_path / "best").unlink()
    assert Checkpointer(tmp_path).latest().position.step == 4
    assert best_state(tmp_path).position.step == 4


def test_a_write_that_failed_is_heard_of_at_the_next_step(tmp_path, monkeypatch):
    trainer, _, ledger, _ = make(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("specforge.training.checkpointer.HuggingFaceStorageWriter.write_data", full)

    def stream():
        for number, step in enumerate(steps(0, 10)):
            if number == 5:
                for writing in threading.enumerate():
                    if writing.name == "checkpoint":
                        writing.join(60)
            yield step

    with pytest.raises(RunFailed, match=r"step 4 could not be written \(rank 0: OSError.*No space left on device\); "):
        trainer.fit(stream())
    assert ledger.checkpoints == []
    assert ledger.acks[-1][1] <= 6


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    trainer, _, ledger, _ = make(tmp_path, total_steps=6)
    written, trained = threading.Event(), threading.Event()
    announce = ledger.checkpointed

    def checkpointed(step):
        assert trained.wait(60)
        announce(step)
        written.set()

    ledger.checkpointed = checkpointed

    def watched():
        for number, step in enumerate(steps(0, 6)):
            if number == 5:  # one step after the save at step 4 began
                assert not written.is_set()
                trained.set()
            yield step

    trainer.fit(watched())
    assert ledger.checkpoints == [4, 6]


def test_a_checkpoint_holds_the_weights_of_its_step_although_training_goes_on(tmp_path):
    straight, draft, *_ = make(tmp_path / "straight", total_steps=4)
    straight.fit(steps(0, 4))
    trainer, *_ = make(tmp_path / "run", total_steps=7)
    trainer.fit(steps(0, 7))
    [fourth, _] = list_checkpoints(tmp_path / "run")
    assert torch.equal(read_draft_tensors(read_state(fourth))["fc.weight"], draft.fc.weight)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(tmp_path):
    trainer, _, ledger, _ = make(tmp_path)

    def undone():
        for number, step in enumerate(steps(0, 10)):
            if number == 5:
                (tmp_path / ".step-00000008.partial").write_text("in the way")
            yield step

    with pytest.raises(RunFailed, match=r"checkpoint of step 8 could not be written .*resume the run"):
        trainer.fit(undone())
    assert ledger.checkpoints == [4]
    assert newest_whole(tmp_path).position.step == 4


def test_a_checkpoint_with_another_vocabulary_map_is_refused_by_name(tmp_path):
    trainer, draft, *_ = make(tmp_path)
    draft.register_buffer("t2d", torch.tensor([True, False]))
    trainer.fit(steps(0, 2))
    other, draft, *_ = make(tmp_path)
    draft.register_buffer("t2d", torch.tensor([False, True]))
    with pytest.raises(DraftError, match="'t2d', which does not learn"):
        other.restore(newest_whole(tmp_path))
