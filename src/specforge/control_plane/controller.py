"""DataFlowController: owns the life of every sample between the prompts and the optimizer step. Metadata only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from specforge.contracts.codec import assert_no_tensors
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.backpressure import Credits
from specforge.control_plane.base import CommitReply, Lease, LeaseReply
from specforge.control_plane.channel.base import RefWriter
from specforge.control_plane.metadata.base import Dispatch, MetadataStore
from specforge.control_plane.prompts import SampleOrder
from specforge.control_plane.window import CaptureWindow, InFlight
from specforge.errors import ConfigError, ContractError, DataError, InvalidTransition


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """``window_slots``: how many slots beyond the last acked one may be leased or resident, at least ``step_slots``
    (the slots of one optimizer step, always grantable). ``max_resident_bytes``: features leased or resident, ``None``
    is unbounded. ``bytes_per_token`` estimates a sample's features before its capture. ``max_attempts``: failures of
    a prompt before it is quarantined; more than ``max_quarantined`` of those end the run.
    """

    window_slots: int
    step_slots: int = 1
    max_resident_bytes: int | None = None
    bytes_per_token: int = 0
    lease_s: float = 60.0
    max_attempts: int = 3
    max_quarantined: int = 0

    def __post_init__(self) -> None:
        if self.lease_s <= 0 or self.max_attempts < 1 or self.max_quarantined < 0 or self.bytes_per_token < 0:
            raise ConfigError(
                f"expected lease_s > 0, max_attempts >= 1, max_quarantined >= 0 and bytes_per_token >= 0, got {self}"
            )


class DataFlowController:
    """Implements ``CaptureControl`` and ``TrainControl`` over a ledger; safe to call from any thread.

    Leases are given, and committed refs published to ``writer``, strictly in slot order. ``on_release`` receives
    (sample_id, generation) pairs to free in the feature store; it is called without a lock held, before the freed
    bytes are granted again. ``resume`` comes before everything else; without it the run starts at its first slot.
    The stream is closed when every slot is dispatched: nothing will be published after that.
    """

    def __init__(
        self,
        store: MetadataStore,
        order: SampleOrder,
        tasks: Sequence[PromptTask],
        writer: RefWriter,
        settings: ControllerSettings,
        on_release: Callable[[Sequence[tuple[str, int]]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        store.register(tasks)
        if not len(tasks) == order.num_samples == store.num_tasks():
            raise DataError(
                f"expected as many prompts as samples in the order and in the ledger, got {len(tasks)} prompts, "
                f"{order.num_samples} samples and {store.num_tasks()} recorded; resume with the prompts that the run "
                "was started with"
            )
        store.bind(order.key)
        limits = Credits(settings.window_slots, settings.step_slots, settings.max_resident_bytes)
        self._store, self._order, self._tasks, self._writer = store, order, tasks, writer
        self._settings, self._on_release, self._clock = settings, on_release, clock
        self._window = CaptureWindow(order, limits, lambda i: tasks[i].num_tokens * settings.bytes_per_token)
        self._changed = threading.Condition()
        self._started = False
        self._drained = False
        self._stopped = False
        self._failure: str | None = None

    def resume(self, num_slots: int, step: int) -> None:
        """Continue from the checkpoint of optimizer step ``step``, which covers the first ``num_slots`` slots.

        The checkpoint is the truth: the ledger is reconciled to it, forwards and backwards, and whatever was in
        flight is captured again.
        """
        with self._changed:
            if self._started:
                raise InvalidTransition("resume comes before the first lease")
            if not 0 <= num_slots <= self._order.total or (num_slots > 0) != (step > 0):
                raise DataError(
                    f"the checkpoint covers {num_slots} slots at step {step}, but the run has {self._order.total}; "
                    "resume with the configuration that the run was started with"
                )
            self._store.rewind(num_slots, step, self._order.index_at)
            self._started = True
            self._window.start(num_slots, self._store.quarantined())
            self._publish()

    # CaptureControl

    def lease(
        self,
        worker_id: str,
        max_tasks: int,
        timeout_s: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> LeaseReply:
        """See ``CaptureControl``. A call whose ``cancelled`` turns true ends at the next ``wake`` with no lease."""
        deadline = self._clock() + timeout_s
        with self._changed:
            self._start()
            while True:
                if self._ended:
                    return LeaseReply((), finished=True)
                if cancelled():
                    return LeaseReply((), finished=False)
                self._expire()
                leases = self._lease(worker_id, max_tasks)
                now = self._clock()
                if leases or now >= deadline:
                    return LeaseReply(leases, finished=False)
                next_expiry = min((sample.deadline for sample in self._window.leased()), default=deadline)
                self._changed.wait(max(0.0, min(deadline, next_expiry) - now))

    def commit(self, refs: Sequence[SampleRef]) -> CommitReply:
        """See ``CaptureControl``. Once the run is over nothing is accepted, so that the features are freed."""
        for ref in refs:
            assert_no_tensors(ref)
        with self._changed:
            self._start()
            self._expire()
            if self._stopped or self._failure is not None:
                return CommitReply((False,) * len(refs))
            found = [self._find(ref) for ref in refs]
            known = [(index, ref) for index, ref in zip(found, refs, strict=True) if index is not None]
            accepted = iter(self._store.commit(known))
            reply = tuple(index is not None and next(accepted) for index in found)
            for index, ref, ok in zip(found, refs, reply, strict=True):
                sample = None if index is None else self._window.in_flight.get(index)
                if ok and sample is not None and sample.ref is None:
                    self._window.commit(sample.index, ref)
            self._publish()
            self._changed.notify_all()
            return CommitReply(reply)

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        """See ``CaptureControl``. Of an attempt that is no longer live it changes nothing."""
        with self._changed:
            self._start()
            self._expire()
            index = self._window.find(sample_id)
            sample = None if index is None else self._window.in_flight[index]
            if self._ended or sample is None or sample.generation != generation or sample.ref is not None:
                return
            num_failures = self._store.fail(sample.attempt, reason)
            self._window.give_back(sample.index)
            if num_failures >= self._settings.max_attempts:
                self._quarantine(sample.index, f"{reason} (worker {worker_id}, attempt {generation})")
            self._changed.notify_all()

    def heartbeat(self, worker_id: str) -> None:
        with self._changed:
            self._expire()
            for sample in self._window.leased():
                if sample.worker_id == worker_id:
                    sample.deadline = self._clock() + self._settings.lease_s

    def abandon(self, worker_id: str, reason: str) -> None:
        self.fail_run(f"capture worker {worker_id} failed: {reason}")

    # TrainControl

    def ack(self, slots: Sequence[Slot], step: int) -> None:
        numbers = [self._order.linear(slot) for slot in slots]
        with self._changed:
            self._start()
            self._store.ack(numbers, step)
            unneeded = self._window.ack(numbers)
            self._store.release([sample.attempt for sample in unneeded])
            # A slot opened from here on finds no live features, and leads to a new generation.
            for sample in unneeded:
                self._window.retire(sample)
        try:
            if unneeded:
                self._on_release([(sample.sample_id, sample.generation) for sample in unneeded])
        finally:
            with self._changed:
                for sample in unneeded:
                    self._window.freed(sample)
                self._window.advance()
                self._publish()
                self._changed.notify_all()

    def checkpointed(self, step: int) -> None:
        with self._changed:
            self._store.checkpointed(step)

    # The run

    def finish(self) -> None:
        """The trainer is done, with or without the last slot: workers are sent home, resident features freed."""
        with self._changed:
            if self._stopped or self._failure is not None:
                return
            self._stopped = True
            # Before the ledger, which may refuse: whoever waits for the stream must not wait for ever.
            self._writer.close()
            self._changed.notify_all()
            leased = self._window.leased()
            resident = [sample for sample in self._window.in_flight.values() if sample.ref is not None]
            self._store.requeue([sample.attempt for sample in leased])
            self._store.release([sample.attempt for sample in resident])
            for sample in [*leased, *resident]:
                self._window.retire(sample)
                self._window.freed(sample)
        if resident:
            self._on_release([(sample.sample_id, sample.generation) for sample in resident])

    def fail_run(self, reason: str) -> None:
        """A side failed for good: the consumer raises ``ProducerFailed`` with ``reason``, workers are sent home.

        The first reason stays. Without effect once every slot is dispatched: the trainer has all that it needs.
        """
        with self._changed:
            if self._failure is None and not self._stopped and not self._drained:
                self._failure = reason
                self._writer.fail(reason)
            self._changed.notify_all()

    def wake(self) -> None:
        """Blocked leases look at their ``cancelled`` again."""
        with self._changed:
            self._changed.notify_all()

    def summary(self) -> dict[str, int | str | None]:
        """Counts of the ledger (``LedgerCounts``), the run's length, resident bytes, its state and failure."""
        with self._changed:
            state = "failed" if self._failure else "finished" if self._stopped else "running"
            return {
                **asdict(self._store.counts()),
                "num_slots": self._order.total,
                "num_slots_captured_ahead": self._window.next_dispatch - self._window.first_open,
                "resident_bytes": self._window.resident_bytes,
                "state": state,
                "failure": self._failure,
            }

    def close(self) -> None:
        """Close the ledger. The run is over, or the process about to end."""
        with self._changed:
            self._store.close()

    # With the lock held

    @property
    def _ended(self) -> bool:
        return self._drained or self._stopped or self._failure is not None

    def _start(self) -> None:
        if not self._started:
            self.resume(0, 0)

    def _lease(self, worker_id: str, max_tasks: int) -> tuple[Lease, ...]:
        taken = self._window.take(max_tasks)
        try:
            generations = self._store.lease([index for index, _ in taken], worker_id) if taken else []
        except BaseException:
            for index, _ in taken:
                self._window.give_back(index)
            raise
        deadline = self._clock() + self._settings.lease_s
        leases: list[Lease] = []
        for (index, num_bytes), generation in zip(taken, generations, strict=True):
            task = self._tasks[index]
            self._window.lease(InFlight(index, task.sample_id, generation, worker_id, deadline, num_bytes))
            leases.append(Lease(task, generation, self._settings.lease_s))
        return tuple(leases)

    def _expire(self) -> None:
        now = self._clock()
        expired = [sample for sample in self._window.leased() if sample.deadline <= now]
        if expired:
            self._store.requeue([sample.attempt for sample in expired])
            for sample in expired:
                self._window.give_back(sample.index)
            self._changed.notify_all()

    def _find(self, ref: SampleRef) -> int | None:
        index = self._window.find(ref.sample_id)
        if index is None:
            return self._store.find(ref.sample_id)
        if ref.num_tokens != self._tasks[index].num_tokens:
            raise ContractError(
                f"sample {ref.sample_id!r}: the prompt has {self._tasks[index].num_tokens} tokens, "
                f"its features {ref.num_tokens}"
            )
        return index

    def _publish(self) -> None:
        """Dispatch what is next in line; the ledger first, then the channel."""
        if self._ended:
            return
        ready = self._window.dispatchable()
        if ready:
            self._store.dispatch([Dispatch(slot, *sample.attempt) for slot, sample, _ in ready])
            self._window.dispatched([slot for slot, _, _ in ready])
            self._writer.publish([SlotRef(self._order.slot(slot), ref) for slot, _, ref in ready])
        if self._window.next_dispatch == self._order.total:
            self._drained = True
            self._writer.close()

    def _quarantine(self, index: int, reason: str) -> None:
        self._store.quarantine(index, self._window.next_slot_of(index), reason)
        self._window.quarantine(index)
        num_quarantined = len(self._window.quarantined)
        if num_quarantined > self._settings.max_quarantined:
            self.fail_run(
                f"{num_quarantined} prompts are quarantined, more than max_quarantined = "
                f"{self._settings.max_quarantined}; the last one, sample {self._tasks[index].sample_id!r}, failed "
                f"{self._settings.max_attempts} times: {reason}"
            )
        self._publish()
