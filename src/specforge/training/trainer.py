"""The training loop. Everything that differs between topologies and algorithms is plugged in.

batches --> forward_loss --> backward --> reduce, clip and step --> ack --> log, evaluate, checkpoint
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from specforge.algorithms.base import Algorithm, StepContext, StepOutput, TargetTables
from specforge.algorithms.catalog import algorithm_names, algorithm_type
from specforge.algorithms.draft_config import DraftConfig
from specforge.algorithms.parts.sequence import SequenceShare, check_heads
from specforge.contracts.batches import StepBatches, TrainBatch
from specforge.contracts.refs import Slot
from specforge.errors import ConfigError, DraftError
from specforge.training.checkpoint import CheckpointState, Provenance, TrainPosition, read_draft_tensors
from specforge.training.checkpointer import Checkpointer, Snapshot
from specforge.training.guard import drop_nonfinite_samples
from specforge.training.metrics import StepSums
from specforge.training.optimizer import MasterOptimizer
from specforge.training.ranks import LEADER, Ranks
from specforge.training.schedule import Schedule
from specforge.training.sharding import ShardedDraft

KEY = "held_out"
"""In the evaluation that a checkpoint keeps: on which samples it was."""


class Ledger(Protocol):
    """Who is told that slots were trained and that a checkpoint is complete, and has a say in what it holds.

    Called on the leader alone; :meth:`checkpointed` from the thread that writes checkpoints.
    """

    def ack(self, slots: Sequence[Slot], step: int) -> None: ...

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint keeps for the ledger, as JSON data. Asked before the checkpoint is written."""
        ...

    def checkpointed(self, step: int) -> None: ...


class Evaluation(Protocol):
    """Measures the draft every ``every`` steps. ``metric`` of what it gives decides which checkpoint is the best, among
    those that were evaluated on the same samples: with the same ``key``.
    """

    every: int
    metric: str
    key: str

    def __call__(self, draft: ShardedDraft, step: int) -> dict[str, float]:
        """Metrics by name, the same on all ranks, all of which call it."""
        ...

    def is_better(self, value: float, than: float | None) -> bool:
        """``than`` ``None``: nothing was measured before."""
        ...


class Log(Protocol):
    """Who hears of every step and of every evaluation. Called on the leader alone."""

    def on_step(self, step: int, scalars: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, scalars: dict[str, float]) -> None: ...


@dataclass(frozen=True, slots=True)
class Trainable:
    """The draft that learns, the frozen tables it shares with the target, and the algorithm that trains it."""

    algorithm: Algorithm
    draft: ShardedDraft
    tables: TargetTables
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """``total_steps`` ends the training (or the batches do, when there are fewer) and is the horizon of schedules.

    ``compute_dtype`` is the autocast type of forward and loss; float32 computes in the parameters' own precision.
    """

    total_steps: int
    checkpoint_every: int
    seed: int
    device_type: str = "cpu"
    compute_dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a trainer works with: those who hear of its progress, and who else trains."""

    checkpointer: Checkpointer
    ledger: Ledger
    log: Log
    ranks: Ranks = field(default_factory=Ranks)
    evaluation: Evaluation | None = None


class Trainer:
    """Trains ``trainable.draft``. The state that a checkpoint holds is the draft, the optimizer and the position.

    One a rank; each has its share of every step's batches, and all have the same steps.
    """

    def __init__(
        self,
        trainable: Trainable,
        optimizer: MasterOptimizer,
        schedule: Schedule,
        settings: TrainerSettings,
        around: Surroundings,
    ) -> None:
        self.position = TrainPosition()
        self._parts = trainable
        self._optimizer = optimizer
        self._schedule = schedule
        self._settings = settings
        self._around = around
        self._ranks = around.ranks
        self._sequence = sequence_share(trainable.algorithm, around.ranks)
        self._stop_requested = False
        self._stopping = False
        self._saved_step = -1
        self._stall_s = 0.0
        self._best: float | None = None
        self._evaluated: tuple[int, dict[str, Any]] = (-1, {})

    def knows_best(self, checkpoint: CheckpointState | None) -> None:
        """``checkpoint``, as the leader read it, is the best one of the run so far. A collective."""
        evaluation, value = self._around.evaluation, math.nan
        if checkpoint is not None and evaluation is not None and checkpoint.evaluation.get(KEY) == evaluation.key:
            value = checkpoint.evaluation.get(evaluation.metric, math.nan)
        value = self._ranks.main.gather([value])[LEADER][0]
        self._best = None if math.isnan(value) else value

    def request_stop(self) -> None:
        """Stop with a checkpoint after the optimizer step that is running. Safe to call from a signal handler."""
        self._stop_requested = True

    def fit(self, batches: Iterable[StepBatches[Tensor]]) -> bool:
        """Train until the batches end, ``total_steps`` are done or a stop was requested; ``True`` when finished."""
        finished = self.position.step >= self._settings.total_steps
        stream = iter(batches)
        while not finished and not self._must_stop():
            waiting_since = time.perf_counter()
            step_batches = next(stream, None)
            if step_batches is None:
                finished = True
                break
            waited_s = time.perf_counter() - waiting_since
            scalars = self.train_step(step_batches)
            if self._ranks.is_leader:
                self._around.ledger.ack(step_batches.slots, self.position.step)
                self._around.log.on_step(self.position.step, scalars | {"wait_s": waited_s})
            finished = self.position.step >= self._settings.total_steps
            is_best = self._evaluate(last=finished)
            if is_best or self.position.step % self._settings.checkpoint_every == 0:
                self.save(best=is_best)
            self._around.checkpointer.check()
        # The batches may end before the last step, when samples were set aside.
        self.save(best=finished and self._evaluate(last=True))
        self._around.checkpointer.wait()
        return finished

    def _must_stop(self) -> bool:
        """What all ranks agreed on in the last step; one alone agrees with itself at any moment."""
        return self._stopping or (self._ranks.size == 1 and self._stop_requested)

    def train_step(self, step_batches: StepBatches[Tensor]) -> dict[str, float]:
        """One optimizer step over all micro-batches; the denominator is known before the first backward.

        The scalars are those of the whole step, over all ranks.
        """
        started = time.perf_counter()
        parts, ranks = self._parts, self._ranks
        step_batches, num_nonfinite = drop_nonfinite_samples(step_batches)
        settings = self._settings
        context = StepContext(self.position.step, settings.total_steps, settings.seed, sequence=self._sequence)
        own = sum(parts.algorithm.supervised_weight(batch, context) for batch in step_batches.micro_batches)
        # The ranks of a sequence group have the same samples: one of them counts.
        weight = ranks.main.sum([own if ranks.sequence_rank == 0 else 0.0])[0]
        sums = self._accumulate(step_batches.micro_batches, context, weight or 1.0)
        lr = self._schedule.lr_at(self.position.step)
        norm = self._optimizer.step(lr) if weight else 0.0
        self._optimizer.zero_grad()
        num_tokens = sum(len(batch.input_ids) for batch in step_batches.micro_batches)
        sums, num_nonfinite, num_tokens = self._over_ranks(sums, num_nonfinite, num_tokens)
        position = self.position
        self.position = TrainPosition(
            step=position.step + 1,
            num_slots=step_batches.num_slots,
            num_skipped_updates=position.num_skipped_updates + int(not math.isfinite(norm)),
            num_nonfinite_samples=position.num_nonfinite_samples + num_nonfinite,
        )
        stall_s, self._stall_s = self._stall_s, 0.0
        return sums.scalars(weight) | {
            "lr": lr,
            "grad_norm": norm,
            "num_tokens": float(num_tokens),
            "num_skipped_updates": float(self.position.num_skipped_updates),
            "num_nonfinite_samples": float(self.position.num_nonfinite_samples),
            "checkpoint_stall_s": stall_s,
            "step_s": time.perf_counter() - started,
        }

    def _accumulate(
        self, micro_batches: Sequence[TrainBatch[Tensor]], context: StepContext, divisor: float
    ) -> StepSums:
        """Forward and backward of all ``micro_batches``; the gradients are reduced after the last."""
        parts, sums = self._parts, StepSums()
        draft = parts.draft.draft
        draft.train()
        parts.draft.gather()

        def forward(batch: TrainBatch[Tensor]) -> StepOutput:
            with self._autocast():
                return parts.algorithm.forward_loss(draft, parts.tables, batch, context)

        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            sums.add(parts.draft.backward(functools.partial(forward, batch), divisor, last=last))
        return sums

    def _over_ranks(self, sums: StepSums, num_nonfinite: int, num_tokens: int) -> tuple[StepSums, int, int]:
        """The sums of all ranks, and whether one of them was told to stop."""
        ranks = self._ranks
        counted = (num_nonfinite, num_tokens) if ranks.sequence_rank == 0 else (0, 0)
        rows = ranks.main.gather([float(self._stop_requested), *map(float, counted), *sums.values()])
        total = StepSums()
        for row in rows:
            total.merge(sums.with_values(row[3:]))
        stops, nonfinite, tokens = (sum(row[column] for row in rows) for column in range(3))
        self._stopping = stops > 0
        return total, int(nonfinite), int(tokens)

    def _autocast(self) -> torch.autocast:
        dtype = self._settings.compute_dtype
        return torch.autocast(self._settings.device_type, dtype, enabled=dtype != torch.float32)

    def _evaluate(self, *, last: bool) -> bool:
        """Evaluate where it is due; whether the draft is the best so far."""
        evaluation, step = self._around.evaluation, self.position.step
        if evaluation is None or step in {0, self._evaluated[0]}:
            return False
        if not (last or step % evaluation.every == 0):
            return False
        scalars = evaluation(self._parts.draft, step)
        self._evaluated = (step, {**scalars, KEY: evaluation.key})
        if self._ranks.is_leader:
            self._around.log.on_evaluation(step, scalars)
        value = scalars.get(evaluation.metric)
        if value is None or not evaluation.is_better(value, self._best):
            return False
        self._best = value
        return True

    def save(self, *, best: bool = False) -> None:
        """Start to checkpoint the current position, once, or again where it turns out to be the best one.

        The ledger hears of it when it is complete.
        """
        if self._saved_step == self.position.step and not best:
            return
        step, evaluated = self._evaluated
        ledger = self._around.ledger
        snapshot = Snapshot(
            self.position,
            self._parts.provenance,
            self._parts.draft.served_state(keep=self._ranks.is_leader),
            self._optimizer.state_tensors(),
            ledger.checkpoint_state() if self._ranks.is_leader else {},
            evaluated if step == self.position.step else {},
            best,
        )
        reached = self.position.step
        self._stall_s += self._around.checkpointer.save(snapshot, lambda: ledger.checkpointed(reached))
        self._saved_step = self.position.step

    def restore(self, checkpoint: CheckpointState) -> None:
        """Continue from ``checkpoint``; one that another run wrote is refused with what differs."""
        check_same_run(checkpoint.path, checkpoint.provenance, self._parts.provenance)
        own, saved = self._parts.draft.served_state(), read_draft_tensors(checkpoint)
        learns = {name for name, parameter in self._parts.draft.draft.named_parameters() if parameter.requires_grad}
        for name in sorted(set(own) | set(saved)):
            if name not in own or name not in saved:
                raise DraftError(f"{checkpoint.path}: the draft's tensors differ, first {name!r}")
            if name not in learns and not torch.equal(own[name].cpu(), saved[name]):
                raise DraftError(
                    f"{checkpoint.path}: {name!r}, which does not learn, is not what this run made it: the vocabulary "
                    "map, the target or an option of the draft is another; resume with what the run was started with"
                )
        self._around.checkpointer.load(checkpoint, self._optimizer.state_tensors())
        self._optimizer.state_changed()
        self.position = checkpoint.position
        self._saved_step = checkpoint.position.step
        if checkpoint.evaluation:
            self._evaluated = (checkpoint.position.step, checkpoint.evaluation)


def sequence_share(algorithm: Algorithm, ranks: Ranks) -> SequenceShare | None:
    """This rank's share of the rows of its micro-batches, ``None`` for all. An algorithm that cannot split them is a
    :class:`ConfigError`.
    """
    if ranks.sequence_size == 1:
        return None
    check_sequences(algorithm, ranks.sequence_size)
    return SequenceShare(ranks.sequence_rank, ranks.sequence_size, ranks.sequence_group)


def check_sequences(algorithm: Algorithm, size: int, config: DraftConfig | None = None) -> None:
    """Refuse sequence groups of ``size`` ranks for an algorithm that cannot split samples, and, where its ``config`` is
    given, for a draft whose heads cannot be dealt out.
    """
    if size == 1:
        return
    if not algorithm.splits_sequences:
        able = [name for name in algorithm_names() if algorithm_type(name).splits_sequences]
        raise ConfigError(
            f"training.sequence_parallel is {size}, but {algorithm.name} trains every sample on one rank; "
            f"set it to 1, or train one of {', '.join(able)}"
        )
    if config is not None:
        check_heads(config, size)


def check_same_run(path: Path, theirs: Provenance, ours: Provenance) -> None:
    """Refuse the checkpoint in ``path``, of another target, dataset, seed, algorithm or draft shape."""
    for expected, found in ((ours.identity, theirs.identity), (ours.draft_config, theirs.draft_config)):
        for key in sorted(set(expected) | set(found)):
            want, got = _jsonable(expected.get(key)), _jsonable(found.get(key))
            if want != got:
                raise DraftError(
                    f"{path} was written with {key} = {got!r}, but this run has {want!r}; "
                    "resume with the configuration that started the run, or choose another run_dir"
                )


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value
