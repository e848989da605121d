"""MetadataStore: the ledger. Every transition of a sample's life is one method with a stated precondition.

Samples are named by prompt index, slots by their linear number. The life:

    sample   PENDING --lease--> LEASED --commit--> COMMITTED --release--> RELEASED --lease--> ...
                ^---- requeue / fail ----+
                +--quarantine--> QUARANTINED
    slot     OPEN --dispatch--> DISPATCHED --ack--> TRAINED --checkpointed--> DURABLE

Each method is all or nothing. A broken precondition is an :class:`~specforge.errors.InvalidTransition` (unless the
method says otherwise) and leaves the store as it was. Implementations may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask


class SampleState(StrEnum):
    PENDING = "pending"
    LEASED = "leased"
    COMMITTED = "committed"
    RELEASED = "released"
    QUARANTINED = "quarantined"


class SlotState(StrEnum):
    OPEN = "open"
    DISPATCHED = "dispatched"
    TRAINED = "trained"
    DURABLE = "durable"


class Attempt(NamedTuple):
    """One capture of a sample (a prompt index). Attempts of a sample are numbered from 1, and the number only grows."""

    sample: int
    generation: int


class Dispatch(NamedTuple):
    """Slot number ``slot`` is served by features ``generation`` of sample number ``sample``."""

    slot: int
    sample: int
    generation: int


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """What the ledger says of one sample. ``ref`` only while COMMITTED; ``reason`` is the last failure, if any."""

    state: SampleState
    generation: int
    num_failures: int
    ref: SampleRef | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """Numbers of the whole ledger. Slots trained are counted whether durable or not; steps are optimizer steps."""

    num_samples: int
    num_leased: int
    num_committed: int
    num_quarantined: int
    num_slots_dispatched: int
    num_slots_trained: int
    num_slots_durable: int
    num_unique_samples_trained: int
    last_step: int
    durable_step: int


class MetadataStore(Protocol):
    """``durable``: what a method did is on disk when it returns."""

    durable: bool

    # The run

    def register(self, tasks: Sequence[PromptTask]) -> None:
        """Record prompts, in index order; may be called for one part after the other.

        Repeating it with the same prompts changes nothing; another prompt at a recorded index, a sample id used
        twice or a gap in the indices is a ``DataError``. A store that keeps no history checks only the indices.
        """
        ...

    def bind(self, order_key: str) -> None:
        """The ledger belongs to the run with this sample order. Another order than before is a ``ConfigError``."""
        ...

    def num_tasks(self) -> int:
        """How many prompts are registered."""
        ...

    def tasks(self) -> Iterator[PromptTask]:
        """The recorded prompts in index order; none from a store that keeps no history."""
        ...

    def find(self, sample_id: str) -> int | None:
        """The prompt index of a sample; ``None`` if unknown, or from a store that keeps no history."""
        ...

    # Samples

    def lease(self, indices: Sequence[int], worker_id: str) -> list[int]:
        """PENDING or RELEASED -> LEASED; answers the new generation of each."""
        ...

    def requeue(self, attempts: Sequence[Attempt]) -> None:
        """LEASED with that generation -> PENDING: the lease expired, or its worker is gone."""
        ...

    def commit(self, refs: Sequence[tuple[int, SampleRef]]) -> list[bool]:
        """LEASED with the ref's generation -> COMMITTED: True. Repeated for features accepted before: True.

        Any other commit is late: False, and nothing changes for that sample.
        """
        ...

    def fail(self, attempt: Attempt, reason: str) -> int:
        """LEASED with that generation -> PENDING, one more failure of the prompt; answers how many there are."""
        ...

    def quarantine(self, index: int, from_slot: int, reason: str) -> None:
        """PENDING -> QUARANTINED: the slots of this sample numbered ``from_slot`` or higher are skipped."""
        ...

    def quarantined(self) -> dict[int, int]:
        """Quarantined prompt index -> the slot number from which it is skipped."""
        ...

    def release(self, attempts: Sequence[Attempt]) -> None:
        """COMMITTED with that generation -> RELEASED: the features are about to be freed."""
        ...

    # Slots

    def dispatch(self, entries: Sequence[Dispatch]) -> None:
        """OPEN -> DISPATCHED; the sample must be COMMITTED with that generation."""
        ...

    def ack(self, slots: Sequence[int], step: int) -> None:
        """DISPATCHED -> TRAINED by optimizer step ``step`` (at least 1)."""
        ...

    def checkpointed(self, step: int) -> None:
        """TRAINED at or before ``step`` -> DURABLE. An older step than before changes nothing."""
        ...

    def rewind(self, num_slots: int, step: int, sample_of: Callable[[int], int]) -> None:
        """Reconcile with the checkpoint of ``step``, which covers the slots numbered below ``num_slots``.

        Those become DURABLE at a step of at most ``step`` (also where the ledger had not heard of their training),
        the rest OPEN. What was LEASED or COMMITTED becomes PENDING, its features being gone. ``sample_of`` gives
        the prompt index of a slot number. Generations, failures and quarantines stay.
        """
        ...

    # Reading

    def sample(self, index: int) -> SampleRecord: ...

    def slot_state(self, slot: int) -> SlotState: ...

    def slot_step(self, slot: int) -> int | None:
        """The optimizer step that trained the slot, ``None`` while there is none (or it is no longer kept)."""
        ...

    def counts(self) -> LedgerCounts: ...

    def close(self) -> None:
        """Idempotent."""
        ...
