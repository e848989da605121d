"""What the two sides of a run see of the control plane, and the records they exchange.

Capture side: :class:`CaptureControl` (implemented by ``DataFlowController`` in process and by
``ControlPlaneClient`` from another process). Train side: a ``StreamingRefQueue`` for dispatched slots, and
:class:`TrainControl` for acks and checkpoints. Nothing here imports a tensor library.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from specforge.contracts.refs import SampleRef, Slot
from specforge.contracts.tasks import PromptTask


def owner_among(worker_id: str, worker_ids: Collection[str]) -> str | None:
    """Which of ``worker_ids`` is ``worker_id``, or has it as a part; ``None`` for none.

    A worker may work in parts, each with leases of its own: ``capture-0/2.1`` is a part of ``capture-0``, which lives,
    leaves and dies with all of them.
    """
    name = worker_id
    while name not in worker_ids:
        name, cut, _ = name.rpartition("/")
        if not cut:
            return None
    return name


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


@dataclass(frozen=True, slots=True)
class Recorded:
    """A sample with its response, as the ledger has it: all tokens, and the response's under the loss."""

    input_ids: tuple[int, ...]
    loss_spans: tuple[tuple[int, int], ...]


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

    def record(self, worker_id: str, sample_id: str, generation: int, response_ids: Sequence[int]) -> Recorded:
        """The target answered a leased prompt that had ``num_to_generate``; comes before the capture, which is one of
        the tokens that this gives back.

        The first response of a sample stays: whoever comes later is given that one, and so are later leases. Of an
        attempt that is no longer live, with nothing recorded yet: ``StaleGeneration``. A sign of life, as a heartbeat.
        """
        ...

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        """The prompt itself failed (counts towards ``max_attempts``)."""
        ...

    def heartbeat(self, worker_id: str) -> None:
        """Extends every lease of the worker, and of its parts, by its duration."""
        ...

    def leave(self, worker_id: str, reason: str | None) -> None:
        """The worker is gone, or goes now: its leases are given to others. ``reason`` None: in good order; else it died
        or its engine broke, which is counted as a crash of every sample that it held; it is given nothing any more, and
        a successor takes another id. What is said of a worker is said of its parts (:func:`owner_among`).
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
