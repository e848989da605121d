"""The training loop. Everything that differs between topologies and algorithms is plugged in.

batches --> forward_loss --> backward --> clip and step --> ack --> log, checkpoint
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from specforge.algorithms.base import Algorithm, DraftModel, StepContext, TargetTables
from specforge.contracts.batches import StepBatches
from specforge.contracts.refs import Slot
from specforge.errors import DraftError
from specforge.training.checkpoint import Checkpoint, Checkpointer, Provenance, TrainPosition
from specforge.training.guard import drop_nonfinite_samples
from specforge.training.metrics import StepSums
from specforge.training.optimizer import MasterOptimizer
from specforge.training.schedule import Schedule


class Ledger(Protocol):
    """Who is told that slots were trained and that a checkpoint is complete, and has a say in what it holds."""

    def ack(self, slots: Sequence[Slot], step: int) -> None: ...

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint keeps for the ledger, as JSON data. Asked before the checkpoint is written."""
        ...

    def checkpointed(self, step: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Trainable:
    """The draft that learns, the frozen tables it shares with the target, and the algorithm that trains it."""

    algorithm: Algorithm
    draft: DraftModel
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


class Trainer:
    """Trains ``trainable.draft``. The state that a checkpoint holds is the draft, the optimizer and the position."""

    def __init__(
        self,
        trainable: Trainable,
        optimizer: MasterOptimizer,
        schedule: Schedule,
        settings: TrainerSettings,
        checkpointer: Checkpointer,
        ledger: Ledger,
        on_step: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.position = TrainPosition()
        self._parts = trainable
        self._optimizer = optimizer
        self._schedule = schedule
        self._settings = settings
        self._checkpointer = checkpointer
        self._ledger = ledger
        self._on_step = on_step
        self._stop_requested = False
        self._saved_step = -1

    def request_stop(self) -> None:
        """Stop with a checkpoint after the optimizer step that is running. Safe to call from a signal handler."""
        self._stop_requested = True

    def fit(self, batches: Iterable[StepBatches[Tensor]]) -> bool:
        """Train until the batches end, ``total_steps`` are done or a stop was requested; ``True`` when finished."""
        finished = self.position.step >= self._settings.total_steps
        stream = iter(batches)
        while not finished and not self._stop_requested:
            waiting_since = time.perf_counter()
            step_batches = next(stream, None)
            if step_batches is None:
                finished = True
                break
            waited_s = time.perf_counter() - waiting_since
            scalars = self.train_step(step_batches)
            self._ledger.ack(step_batches.slots, self.position.step)
            self._on_step(self.position.step, scalars | {"wait_s": waited_s})
            finished = self.position.step >= self._settings.total_steps
            if self.position.step % self._settings.checkpoint_every == 0:
                self.save()
        self.save()
        return finished

    def train_step(self, step_batches: StepBatches[Tensor]) -> dict[str, float]:
        """One optimizer step over all micro-batches; the denominator is known before the first backward."""
        started = time.perf_counter()
        parts, position = self._parts, self.position
        step_batches, num_nonfinite = drop_nonfinite_samples(step_batches)
        context = StepContext(position.step, self._settings.total_steps, self._settings.seed)
        weight = sum(parts.algorithm.supervised_weight(batch, context) for batch in step_batches.micro_batches)
        sums = StepSums()
        parts.draft.train()
        for batch in step_batches.micro_batches:
            with self._autocast():
                output = parts.algorithm.forward_loss(parts.draft, parts.tables, batch, context)
            (output.loss_sum / (weight or 1.0)).backward()
            sums.add(output)
        lr = self._schedule.lr_at(position.step)
        norm = self._optimizer.step(lr) if weight else 0.0
        self._optimizer.zero_grad()
        skipped = int(not math.isfinite(norm))
        self.position = TrainPosition(
            step=position.step + 1,
            num_slots=step_batches.num_slots,
            num_skipped_updates=position.num_skipped_updates + skipped,
            num_nonfinite_samples=position.num_nonfinite_samples + num_nonfinite,
        )
        return sums.scalars(weight) | {
            "lr": lr,
            "grad_norm": norm,
            "num_tokens": float(sum(len(batch.input_ids) for batch in step_batches.micro_batches)),
            "num_skipped_updates": float(self.position.num_skipped_updates),
            "num_nonfinite_samples": float(self.position.num_nonfinite_samples),
            "step_s": time.perf_counter() - started,
        }

    def _autocast(self) -> torch.autocast:
        dtype = self._settings.compute_dtype
        return torch.autocast(self._settings.device_type, dtype, enabled=dtype != torch.float32)

    def save(self) -> None:
        """Checkpoint the current position, once, and tell the ledger."""
        if self._saved_step == self.position.step:
            return
        tensors = (self._parts.draft.served_state(), self._optimizer.state_tensors())
        self._checkpointer.save(self.position, tensors, self._parts.provenance, self._ledger.checkpoint_state())
        self._saved_step = self.position.step
        self._ledger.checkpointed(self.position.step)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``; one that another run wrote is refused with what differs."""
        check_same_run(checkpoint.path, checkpoint.provenance, self._parts.provenance)
        with torch.no_grad():
            own = self._parts.draft.state_dict()
            if set(own) != set(checkpoint.draft):
                difference = sorted(set(own) ^ set(checkpoint.draft))
                raise DraftError(f"{checkpoint.path}: the draft's tensors differ, first {difference[0]!r}")
            for name, tensor in own.items():
                tensor.copy_(checkpoint.draft[name])
        self._optimizer.load_state_tensors(checkpoint.optimizer)
        self.position = checkpoint.position
        self._saved_step = checkpoint.position.step


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
