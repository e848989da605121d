"""What the two sides of a run see of the control plane, and the records they exchange.

Capture side: :class:`CaptureControl` (implemented by ``DataFlowController`` in process and by
``ControlPlaneClient`` from another process). Train side: a ``StreamingRefQueue`` for dispatched slots, and
:class:`TrainControl` for acks and checkpoints. Nothing here imports a tensor library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from specforge.contracts.refs import SampleRef, Slot
from specforge.contracts.tasks import PromptTask


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one worker to capture one sample once. ``generation`` numbers the attempts of a sample from 1."""

    task: PromptTask
    generation: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class LeaseReply:
    """``finished`` means that no task will ever be offered again and the worker may leave."""

    leases: tuple[Lease, ...]
    finished: bool


class Features(Protocol):
    """What the controller needs of the feature store: names, never tensors. Every ``FeatureStore`` has it."""

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        """Free the features of these (sample_id, generation) pairs, wherever they are. Unknown ones are no error."""
        ...

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Which refs can be read now."""
        ...

    def stored(self) -> list[tuple[str, int]]:
        """Every readable (sample_id, generation) of the run, whoever wrote it, dead writers included."""
        ...

    def gc(self) -> int:
        """Reclaim what dead writers and readers left behind."""
        ...


class Retention(Protocol):
    """Puts features aside between the epochs that need them, so that the target does not run again for them."""

    def retain(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Move these features out of the store's budget, as far as there is room for them; False: free them.

        What was moved is read with the same ref, and freed by ``Features.abort`` like anything else.
        """
        ...

    def retained(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Which refs can be read and were put aside, by an earlier process of the run too."""
        ...


@dataclass(frozen=True, slots=True)
class CommitReply:
    """One entry a committed ref: accepted, or refused because its generation is stale (free those features)."""

    accepted: tuple[bool, ...]


class CaptureControl(Protocol):
    """What a rollout worker may do."""

    def lease(self, worker_id: str, max_tasks: int, timeout_s: float) -> LeaseReply:
        """Up to ``max_tasks`` leases, in slot order; blocks up to ``timeout_s`` while there is none to give.

        Gives none while credits (samples in flight, resident bytes) are used up. A sample that was held by workers
        that died comes alone, to a worker that holds nothing else.
        """
        ...

    def commit(self, refs: Sequence[SampleRef]) -> CommitReply:
        """The features of ``refs`` are readable. Repeating an accepted commit is accepted and changes nothing."""
        ...

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        """The prompt itself failed (counts towards ``max_attempts``)."""
        ...

    def heartbeat(self, worker_id: str) -> None:
        """Extends every lease of the worker by its duration."""
        ...

    def leave(self, worker_id: str, reason: str | None) -> None:
        """The worker is gone, or goes now: its leases are given to others. ``reason`` None: in good order; else it died
        or its engine broke, which is counted as a crash of every sample that it held; it is given nothing any more, and
        a successor takes another id.
        """
        ...


class TrainControl(Protocol):
    """What the trainer may do. ``step`` counts completed optimizer steps, so the first ack carries step 1."""

    def ack(self, slots: Sequence[Slot], step: int) -> None:
        """These slots were used by optimizer step ``step``: exactly once a slot. Repeating it with the same step
        changes nothing.
        """
        ...

    def checkpointed(self, step: int) -> None:
        """A checkpoint of ``step`` is complete on disk: every slot trained at or before it becomes durable."""
        ...
