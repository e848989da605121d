"""MetadataStore: the ledger. Every transition of a sample's life is one method with a stated precondition.

Samples are named by prompt index, slots by their linear number. The life:

    sample   PENDING --lease--> LEASED --commit--> COMMITTED --release--> RELEASED --lease--> ...
                ^                 |                    |
                +- requeue, fail, +                    |
                |  crash                               |
                +------------------ lose --------------+
                +--quarantine--> QUARANTINED --retry--> PENDING
    slot     OPEN --dispatch--> DISPATCHED --ack--> TRAINED --checkpointed--> DURABLE

Each method is all or nothing. A broken precondition is an :class:`~specforge.errors.InvalidTransition` (unless the
method says otherwise) and leaves the store as it was. Implementations may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeVar

from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask

ResultT = TypeVar("ResultT")


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
class LiveAttempt:
    """An attempt that is LEASED (``worker_id``, no ref) or COMMITTED (``ref``, no worker)."""

    attempt: Attempt
    worker_id: str | None
    ref: SampleRef | None


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Sample ``index`` is skipped in its slots numbered ``[from_slot, to_slot)``; ``to_slot`` None: until retried."""

    index: int
    from_slot: int
    to_slot: int | None
    reason: str

    def covers(self, slot: int) -> bool:
        return self.from_slot <= slot and (self.to_slot is None or slot < self.to_slot)


@dataclass(frozen=True, slots=True)
class Position:
    """What a checkpoint covers: of a run in strict order the slots numbered below ``num_slots``, quarantined ones
    excepted; with ``prefix`` False (arrival order) the slots whose ack has a step of at most ``step``, ``num_slots``
    in number.
    """

    num_slots: int
    step: int
    prefix: bool = True


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """What the ledger says of one sample. ``ref`` only while COMMITTED; ``reason`` is the last failure, if any.

    ``num_failures`` counts failures of the prompt itself, ``num_crashes`` workers that died holding it.
    """

    state: SampleState
    generation: int
    num_failures: int
    num_crashes: int
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
    """``durable``: what a method did is on disk when it returns. ``keeps_history``: what is done is still known."""

    durable: bool
    keeps_history: bool

    def transact(self, work: Callable[[], ResultT]) -> ResultT:
        """Run ``work``; the calls to this store inside it are one transaction, all or nothing where ``durable``.

        ``work`` changes nothing but this store: it is run again when the database was away meanwhile. Calls may be
        nested. Other threads wait. A call inside that is refused undoes the whole of a durable store's transaction,
        even where ``work`` goes on.
        """
        ...

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
        """The recorded prompts in index order, read in parts; none from a store that keeps no history."""
        ...

    def tasks_at(self, indices: Sequence[int]) -> list[PromptTask]:
        """The recorded prompts with these indices, in the order asked. Only of a store that keeps history."""
        ...

    def find(self, sample_id: str) -> int | None:
        """The prompt index of a sample; ``None`` if unknown, or from a store that keeps no history."""
        ...

    # Responses

    def record(self, index: int, response: Sequence[int]) -> tuple[int, ...]:
        """The target's response to a prompt, once: answers with the one that was recorded first, which nothing changes
        or forgets, ``rewind`` included.
        """
        ...

    def responses_at(self, indices: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Prompt index -> response, of those of ``indices`` that have one."""
        ...

    def response_lengths(self) -> Iterator[tuple[int, int]]:
        """(prompt index, tokens) of every response, read in parts."""
        ...

    # Samples

    def lease(self, indices: Sequence[int], worker_id: str) -> list[int]:
        """PENDING or RELEASED -> LEASED; answers the new generation of each."""
        ...

    def requeue(self, attempts: Sequence[Attempt]) -> None:
        """LEASED with that generation -> PENDING, and nobody is to blame."""
        ...

    def crash(self, attempts: Sequence[Attempt]) -> list[int]:
        """LEASED with that generation -> PENDING, one more crash: its worker died or fell silent. Answers how many
        there are of each sample."""
        ...

    def crashed(self, at_least: int) -> dict[int, int]:
        """Prompt index -> number of crashes, of the samples that have ``at_least`` (1 or more) and are not
        quarantined. Costs as much as there are such samples."""
        ...

    def acquit(self, indices: Sequence[int]) -> None:
        """Crashes of these samples count from 0 again: a worker captured them and lived."""
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
        """PENDING -> QUARANTINED: the slots of this sample numbered ``from_slot`` or higher are skipped. It takes the
        place of an open quarantine that begins later.
        """
        ...

    def retry(self, index: int, to_slot: int) -> None:
        """End the open quarantine: QUARANTINED -> PENDING. Slots below ``to_slot`` stay skipped (none, where that is
        not beyond the first of them). Failures and crashes count from 0 again.
        """
        ...

    def quarantines(self) -> list[Quarantine]:
        """All of them, ended ones too, by ``from_slot``."""
        ...

    def release(self, attempts: Sequence[Attempt]) -> None:
        """COMMITTED with that generation -> RELEASED: the features are about to be freed."""
        ...

    def lose(self, attempts: Sequence[Attempt]) -> None:
        """COMMITTED with that generation -> PENDING: the features are gone."""
        ...

    def in_flight(self) -> list[LiveAttempt]:
        """Everything LEASED or COMMITTED, by prompt index."""
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

    def rewind(self, to: Position, sample_of: Callable[[int], int], quarantines: Sequence[Quarantine]) -> None:
        """Reconcile the slots with what a checkpoint covers; samples stay what they are.

        The covered slots become DURABLE at a step of at most ``to.step``, the others OPEN. In strict order that
        includes slots of whose training the ledger had not heard; ``sample_of`` gives the prompt index of a slot
        number. In arrival order the ledger must know all ``to.num_slots`` of them (``DataError``). ``quarantines``
        are those of the checkpoint: entered where the ledger has none of that sample and slot, in which case the
        sample becomes QUARANTINED if the quarantine is open. Where both have an open one, the ledger's stays. A sample
        whose open quarantine begins beyond the checkpoint becomes PENDING: its open slots before that are trained.
        """
        ...

    # Reading

    def sample(self, index: int) -> SampleRecord: ...

    def slot_state(self, slot: int) -> SlotState: ...

    def slot_step(self, slot: int) -> int | None:
        """The optimizer step that trained the slot, ``None`` while there is none (or it is no longer kept)."""
        ...

    def trained_from(self, slot: int) -> list[int]:
        """The trained slots numbered ``slot`` or higher, ascending."""
        ...

    def first_untrained(self, sample_of: Callable[[int], int]) -> int:
        """The smallest slot number that is neither trained nor skipped by a quarantine."""
        ...

    def counts(self) -> LedgerCounts: ...

    def close(self) -> None:
        """Idempotent."""
        ...
