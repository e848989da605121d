"""DataFlowController: owns the life of every sample between the prompts and the optimizer step. Metadata only."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from specforge.contracts.codec import assert_no_tensors
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.backpressure import Credits
from specforge.control_plane.base import CommitReply, Features, Lease, LeaseReply, Recorded, Retention, owner_among
from specforge.control_plane.channel.base import RefWriter
from specforge.control_plane.metadata.base import Attempt, Dispatch, LiveAttempt, MetadataStore, Position, Quarantine
from specforge.control_plane.numbers import RunNumbers
from specforge.control_plane.prompts import SampleOrder, TaskSource
from specforge.control_plane.recovery import Checkpointed, Remains, reconcile
from specforge.control_plane.responses import AnsweredTasks
from specforge.control_plane.window import SUSPECT_AFTER, CaptureWindow, InFlight
from specforge.errors import ConfigError, ContractError, DataError, InvalidTransition, StaleGeneration
from specforge.faults import fault_point

_KEPT_LEASE_CALLS = 1024


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """``window_slots``: how many slots that are not trained yet may be leased or captured, at least ``step_slots``
    (the slots of one optimizer step, always grantable). ``max_resident_bytes``: features leased or resident, ``None``
    is unbounded. ``bytes_per_token`` estimates a sample's features before its capture. ``max_attempts``: failures of
    a prompt before it is quarantined; ``max_crash_attempts``: deaths of workers that held it alone; more than
    ``max_quarantined`` samples in quarantine end the run. ``in_order``: strict order, else arrival order.
    ``release``: features are freed with the ack, or when a checkpoint covers it. ``responses``: how the target answers
    prompts, in words that are compared; a ledger whose responses were made otherwise is refused.
    """

    window_slots: int
    step_slots: int = 1
    max_resident_bytes: int | None = None
    bytes_per_token: int = 0
    lease_s: float = 60.0
    max_attempts: int = 3
    max_crash_attempts: int = 3
    max_quarantined: int = 0
    low_watermark: float = 1.0
    in_order: bool = True
    release: Literal["at_step", "at_checkpoint"] = "at_step"
    responses: str = ""

    def __post_init__(self) -> None:
        if self.lease_s <= 0 or min(self.max_attempts, self.max_crash_attempts) < 1:
            raise ConfigError(f"expected lease_s > 0, max_attempts >= 1 and max_crash_attempts >= 1, got {self}")
        if self.max_quarantined < 0 or self.bytes_per_token < 0:
            raise ConfigError(f"expected max_quarantined >= 0 and bytes_per_token >= 0, got {self}")


class DataFlowController:
    """Implements ``CaptureControl`` and ``TrainControl`` over a ledger; safe to call from any thread.

    Leases are given in slot order; committed refs are published to ``writer`` in slot order too, or as they come
    (``in_order`` False). Features are freed without a lock held, before their bytes are granted again. ``resume``
    comes before everything else; without it the run starts at its first slot. The stream is closed when every slot is
    dispatched: nothing will be published after that.
    """

    def __init__(
        self,
        store: MetadataStore,
        order: SampleOrder,
        tasks: TaskSource,
        writer: RefWriter,
        settings: ControllerSettings,
        features: Features,
        retention: Retention | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        tasks.register(store)
        if not len(tasks) == order.num_samples == store.num_tasks():
            raise DataError(
                f"expected as many prompts as samples in the order and in the ledger, got {len(tasks)} prompts, "
                f"{order.num_samples} samples and {store.num_tasks()} recorded; resume with the prompts that the run "
                "was started with"
            )
        if not settings.in_order and not store.keeps_history:
            raise ConfigError("arrival order needs a ledger that keeps what was trained; use strict order")
        made_by = f" responses={settings.responses}" if settings.responses else ""
        store.bind(f"{order.key} order={'strict' if settings.in_order else 'arrival'}{made_by}")
        limits = Credits(
            settings.window_slots, settings.step_slots, settings.max_resident_bytes, settings.low_watermark
        )
        self._store, self._order, self._writer = store, order, writer
        self._tasks = AnsweredTasks(tasks, store)
        self._settings, self._features, self._retention, self._clock = settings, features, retention, clock
        self._window = CaptureWindow(order, limits, self._estimate_bytes, in_order=settings.in_order)
        self._changed = threading.Condition()
        self._lease_calls: OrderedDict[str, list[Attempt]] = OrderedDict()
        self._numbers = RunNumbers()
        self._dead: set[str] = set()
        self._started = False
        self._drained = False
        self._stopped = False
        self._failure: str | None = None

    def resume(
        self,
        position: Position,
        state: Mapping[str, Any] | None = None,
        live_workers: Collection[str] = (),
        crashed: Mapping[str, str] | None = None,
    ) -> None:
        """Continue from the checkpoint at ``position``; ``state`` is what ``checkpoint_state`` gave for it.

        The checkpoint is the truth: the ledger is reconciled to it, forwards and backwards. Leases of
        ``live_workers`` and features that can still be read stay; what else was in flight is captured again. Leases of
        workers that ``crashed`` (worker -> how it ended) are charged with that, as those that ``leave`` names are.
        """
        crashed = crashed or {}
        with self._changed:
            if self._started:
                raise InvalidTransition("resume comes before the first lease")
            if not 0 <= position.num_slots <= self._order.total or (position.num_slots > 0) != (position.step > 0):
                raise DataError(
                    f"the checkpoint covers {position.num_slots} slots at step {position.step}, but the run has "
                    f"{self._order.total}; resume with the configuration that the run was started with"
                )
            found = reconcile(
                self._store,
                Remains(self._features, self._retention),
                self._order,
                Checkpointed(position, state),
                self._settings.window_slots,
                live_workers,
                crashed,
            )
            deadline = self._clock() + self._settings.lease_s
            adopted, stowed = (self._adopted(items, deadline) for items in (found.kept, found.retained))
            self._window.crashes = self._store.crashed(1)
            self._window.start(found.first_slot, found.trained, found.quarantines, adopted, stowed)
            self._numbers.resume(self._store.counts())
            self._started = True
            for item in found.crashed:
                worker_id = item.worker_id or ""
                reason = crashed[owner_among(worker_id, crashed) or worker_id]
                # From where the run stands: a later slot would be forgotten at the next return to this checkpoint.
                self._judge(item.attempt.sample, worker_id, reason, found.first_slot)
            self._numbers.num_crashes += len({owner_among(item.worker_id or "", crashed) for item in found.crashed})
            self._publish(self._dispatch_ready())
        self._features.abort(found.unwanted)
        self.collect()

    # CaptureControl

    def lease(
        self,
        worker_id: str,
        max_tasks: int,
        timeout_s: float,
        key: str = "",
        cancelled: Callable[[], bool] = lambda: False,
    ) -> LeaseReply:
        """See ``CaptureControl``. Repeated with the ``key`` of an earlier call it gives what is left of its leases.

        A call whose ``cancelled`` turns true ends at the next ``wake`` with no lease.
        """
        deadline = self._clock() + timeout_s
        while True:
            with self._changed:
                self._start()
                # A dead worker's last request may come after the news of its death.
                if self._ended or owner_among(worker_id, self._dead) is not None:
                    return LeaseReply((), finished=True)
                if cancelled():
                    return LeaseReply((), finished=False)
                expired = self._expire()
                leases = self._repeat(key) or self._lease(worker_id, max_tasks, key)
                now = self._clock()
                if not expired and not leases and now < deadline:
                    next_expiry = min((sample.deadline for sample in self._window.leases.values()), default=deadline)
                    self._changed.wait(max(0.0, min(deadline, next_expiry) - now))
            if expired:
                self.collect()
            if leases or now >= deadline:
                fault_point("controller.leased")
                return LeaseReply(leases, finished=False)

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

            def work() -> tuple[list[bool], dict[int, SampleRef], list[int], list[tuple[int, InFlight, SampleRef]]]:
                accepted = self._store.commit(known)
                fresh = {
                    index: ref
                    for (index, ref), ok in zip(known, accepted, strict=True)
                    if ok and index in self._window.leases
                }
                self._store.acquit(acquitted := [index for index in fresh if index in self._window.crashes])
                return accepted, fresh, acquitted, self._dispatch_ready(fresh)

            accepted, fresh, acquitted, ready = self._store.transact(work)
            fault_point("controller.committed")
            for index, ref in fresh.items():
                self._window.commit(index, ref)
            for index in acquitted:
                del self._window.crashes[index]
            answers = iter(accepted)
            reply = tuple(index is not None and next(answers) for index in found)
            self._numbers.num_commits += len(fresh)
            self._numbers.num_late_commits += reply.count(False)
            self._publish(ready)
            self._changed.notify_all()
            return CommitReply(reply)

    def record(self, worker_id: str, sample_id: str, generation: int, response_ids: Sequence[int]) -> Recorded:
        """See ``CaptureControl``. Once the run is over nothing is recorded: ``StaleGeneration``."""
        with self._changed:
            self._start()
            self.heartbeat(worker_id)
            index = self._window.find(sample_id)
            index = self._store.find(sample_id) if index is None else index
            sample = None if index is None else self._window.leases.get(index)
            is_live = sample is not None and sample.generation == generation
            if index is None or self._ended or not (is_live or self._tasks.num_tokens(index) is not None):
                raise StaleGeneration(
                    f"attempt {generation} at sample {sample_id!r} is over: its response is not recorded; go on with "
                    "the next lease"
                )
            task = self._tasks.record(index, response_ids)
            fault_point("controller.recorded")
            return Recorded(task.input_ids, task.loss_spans)

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        """See ``CaptureControl``. Of an attempt that is no longer live it changes nothing."""
        with self._changed:
            self._start()
            self._expire()
            index = self._window.find(sample_id)
            sample = None if index is None else self._window.leases.get(index)
            if self._ended or sample is None or sample.generation != generation:
                return
            num_failures = self._store.fail(sample.attempt, reason)
            self._numbers.num_failures += 1
            self._window.give_back(sample.index)
            if num_failures >= self._settings.max_attempts:
                times = f"failed {num_failures} time{'s' if num_failures > 1 else ''}"
                self._quarantine(sample.index, f"{times}, last in worker {worker_id}: {reason}")
            self._changed.notify_all()

    def heartbeat(self, worker_id: str) -> None:
        with self._changed:
            self._expire()
            for sample in self._window.leased_by(worker_id):
                sample.deadline = self._clock() + self._settings.lease_s

    def leave(self, worker_id: str, reason: str | None) -> None:
        with self._changed:
            self._start()
            samples = self._window.leased_by(worker_id)
            if reason is not None:
                self._dead.add(worker_id)
                self._crash(samples, reason)
            else:
                self._take_back(samples)
            self._changed.notify_all()
        self.collect()

    # TrainControl

    def ack(self, slots: Sequence[Slot], step: int) -> None:
        numbers = [self._order.linear(slot) for slot in slots]
        with self._changed:
            self._start()
            fresh = [number for number in numbers if not self._is_repeated(number, step)]
            unneeded = self._window.unneeded(fresh)
            done, held = (unneeded, []) if self._settings.release == "at_step" else ([], unneeded)
            at = {self._order.index_at(number): number for number in fresh}
            freed = [sample for sample in done if not self._may_retain(at[sample.index])]

            def work() -> None:
                self._store.ack(fresh, step)
                self._store.release([sample.attempt for sample in freed])

            self._store.transact(work)
            fault_point("controller.acked")
            self._window.ack(fresh)
            self._numbers.acked(len(fresh), step)
            # A slot opened from here on finds no live features, and leads to a new generation.
            for sample in freed:
                self._window.retire(sample)
            self._window.hold(held, step)
        self._let_go(done, freed)

    def checkpointed(self, step: int) -> None:
        with self._changed:
            covered = self._window.covered(step)
            freed = [sample for sample in covered if not self._may_retain(sample.last_slot)]

            def work() -> None:
                self._store.checkpointed(step)
                self._store.release([sample.attempt for sample in freed])

            self._store.transact(work)
            fault_point("controller.checkpointed")
            for sample in freed:
                self._window.retire(sample)
            self._numbers.checkpointed(step)
        self._let_go(covered, freed)
        self.collect()

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint must say besides the position, as JSON: the quarantines."""
        with self._changed:
            return {"quarantines": [asdict(quarantine) for quarantine in self._store.quarantines()]}

    # The run

    def collect(self) -> int:
        """Free the features that the ledger does not want, whoever left them; how many samples that were."""
        stored = self._features.stored()
        with self._changed:
            alive = (self._window.in_flight, self._window.stowed)
            wanted = {(sample.sample_id, sample.generation) for samples in alive for sample in samples.values()}
        orphans = [pair for pair in stored if pair not in wanted]
        self._features.abort(orphans)
        self._features.gc()
        return len(orphans)

    def finish(self) -> None:
        """The trainer is done, with or without the last slot: workers are sent home, resident features freed."""
        with self._changed:
            if self._stopped or self._failure is not None:
                return
            self._stopped = True
            # Before the ledger, which may refuse: whoever waits for the stream must not wait for ever.
            self._writer.close()
            self._changed.notify_all()
            leased = list(self._window.leases.values())
            resident = [sample for sample in self._window.in_flight.values() if sample.ref is not None]
            resident += self._window.stowed.values()

            def work() -> None:
                self._store.requeue([sample.attempt for sample in leased])
                self._store.release([sample.attempt for sample in resident])

            self._store.transact(work)
            for sample in [*leased, *resident]:
                self._window.retire(sample)
                self._window.freed(sample)
        self._features.abort([(sample.sample_id, sample.generation) for sample in resident])

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

    def summary(self) -> dict[str, int | float | str | None]:
        """How the run stands, from memory: costs nothing, at any size of the ledger."""
        with self._changed:
            window = self._window
            return {
                "num_samples": self._order.num_samples,
                "num_slots": self._order.total,
                **self._numbers.to_dict(),
                "num_slots_captured_ahead": window.num_captured_ahead,
                "num_leased": len(window.leases),
                "num_resident": len(window.in_flight) - len(window.leases),
                "num_retained": len(window.stowed),
                "resident_bytes": window.resident_bytes,
                "num_quarantined": window.num_quarantined,
                "state": "failed" if self._failure else "finished" if self._stopped else "running",
                "failure": self._failure,
            }

    def account(self) -> dict[str, int | float | str | None]:
        """``summary`` with the ledger's own numbers (``LedgerCounts``), which it has to count."""
        with self._changed:
            return self.summary() | asdict(self._store.counts())

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
            self.resume(Position(0, 0, self._settings.in_order))

    def _estimate_bytes(self, index: int) -> int:
        return self._tasks.max_tokens(index) * self._settings.bytes_per_token

    def _repeat(self, key: str) -> tuple[Lease, ...]:
        """What is left of the leases that an earlier call with this key was given."""
        attempts = self._lease_calls.get(key, ())
        held = [self._window.leases.get(attempt.sample) for attempt in attempts]
        still = [
            sample
            for sample, attempt in zip(held, attempts, strict=True)
            if sample is not None and sample.generation == attempt.generation
        ]
        tasks = self._tasks.at([sample.index for sample in still]) if still else []
        return tuple(self._lease_of(task, sample) for task, sample in zip(tasks, still, strict=True))

    def _lease(self, worker_id: str, max_tasks: int, key: str) -> tuple[Lease, ...]:
        held = self._window.leased_by(worker_id)
        if again := [sample for sample in held if sample.is_adopted]:
            # A worker asks when it has nothing left: the answer that gave it these was lost with an earlier controller.
            self._take_back(again)
            held = [sample for sample in held if not sample.is_adopted]
        if any(self._window.is_suspect(sample.index) for sample in held):
            return ()
        taken = self._window.take(max_tasks, idle=not held)
        if not taken:
            return ()
        indices = [index for index, _ in taken]
        try:
            tasks = self._tasks.at(indices)
            generations = self._store.lease(indices, worker_id)
        except BaseException:
            for index in indices:
                self._window.give_back(index)
            raise
        deadline = self._clock() + self._settings.lease_s
        leased = [
            InFlight(index, task.sample_id, generation, worker_id, deadline, num_bytes)
            for task, (index, num_bytes), generation in zip(tasks, taken, generations, strict=True)
        ]
        for sample in leased:
            self._window.lease(sample)
        self._numbers.num_leases_given += len(leased)
        self._remember(key, leased)
        return tuple(self._lease_of(task, sample) for task, sample in zip(tasks, leased, strict=True))

    def _remember(self, key: str, samples: Sequence[InFlight]) -> None:
        if key:
            self._lease_calls[key] = [sample.attempt for sample in samples]
            if len(self._lease_calls) > _KEPT_LEASE_CALLS:
                self._lease_calls.popitem(last=False)

    def _lease_of(self, task: PromptTask, sample: InFlight) -> Lease:
        return Lease(task, sample.generation, self._settings.lease_s)

    def _take_back(self, samples: Sequence[InFlight]) -> None:
        """Nobody is to blame: they wait for another worker."""
        self._store.requeue([sample.attempt for sample in samples])
        for sample in samples:
            self._window.give_back(sample.index)

    def _expire(self) -> bool:
        """Take back the leases whose time is up; whether there were any."""
        now = self._clock()
        by_worker: dict[str, list[InFlight]] = {}
        for sample in self._window.leases.values():
            if sample.deadline <= now:
                by_worker.setdefault(sample.worker_id, []).append(sample)
        for samples in by_worker.values():
            self._crash(samples, f"it fell silent for more than {self._settings.lease_s:g} s")
        if by_worker:
            self._changed.notify_all()
        return bool(by_worker)

    def _crash(self, samples: Sequence[InFlight], reason: str) -> None:
        """Their worker died, or fell silent, while it held them."""
        if not samples:
            return
        num_crashes = self._store.crash([sample.attempt for sample in samples])
        self._numbers.num_crashes += 1
        for sample, num in zip(samples, num_crashes, strict=True):
            self._window.give_back(sample.index)
            self._window.crashes[sample.index] = num
        for sample in samples:
            self._judge(sample.index, sample.worker_id, reason)

    def _judge(self, index: int, worker_id: str, reason: str, from_slot: int | None = None) -> None:
        """Quarantine a sample that too many workers died of; ``worker_id`` was the last."""
        num = self._window.crashes[index]
        num_alone = num - SUSPECT_AFTER
        if num_alone >= self._settings.max_crash_attempts:
            self._quarantine(
                index,
                f"{num} workers died while they held it, {num_alone} of them while they held nothing else; "
                f"the last was worker {worker_id}: {reason}",
                from_slot,
            )

    def _find(self, ref: SampleRef) -> int | None:
        index = self._window.find(ref.sample_id)
        if index is None:
            return self._store.find(ref.sample_id)
        num_tokens = self._tasks.num_tokens(index)
        if num_tokens is None:
            raise ContractError(f"sample {ref.sample_id!r} has no recorded response; record it before the capture")
        if ref.num_tokens != num_tokens:
            raise ContractError(
                f"sample {ref.sample_id!r}: the prompt has {num_tokens} tokens, its features {ref.num_tokens}"
            )
        return index

    def _is_repeated(self, number: int, step: int) -> bool:
        """Whether the slot was acked before, with this very step."""
        if not self._window.is_trained(number):
            return False
        if self._store.keeps_history and self._store.slot_step(number) != step:
            raise InvalidTransition(
                f"slot {number} was not trained by step {step} but by {self._store.slot_step(number)}: one ack a slot"
            )
        return True

    def _dispatch_ready(
        self, committed: Mapping[int, SampleRef] | None = None
    ) -> list[tuple[int, InFlight, SampleRef]]:
        """Enter what is next in line into the ledger; ``_publish`` follows when that is certain."""
        if self._ended:
            return []
        ready = self._window.dispatchable(committed or {})
        self._store.dispatch([Dispatch(slot, *sample.attempt) for slot, sample, _ in ready])
        return ready

    def _publish(self, ready: Sequence[tuple[int, InFlight, SampleRef]]) -> None:
        if self._ended:
            return
        if ready:
            self._window.dispatched(slot for slot, _, _ in ready)
            self._writer.publish([SlotRef(self._order.slot(slot), ref) for slot, _, ref in ready])
            fault_point("controller.published")
        if self._window.all_dispatched:
            self._drained = True
            self._writer.close()

    def _quarantine(self, index: int, reason: str, from_slot: int | None = None) -> None:
        """Skip a sample ``from_slot`` on, by default from its first open slot."""
        if from_slot is None and not self._window.has_open_slot(index):
            return  # an adopted lease of a slot to come: it is decided when that slot opens
        quarantine = Quarantine(
            index, self._window.first_slot_of(index) if from_slot is None else from_slot, None, reason
        )
        self._store.quarantine(index, quarantine.from_slot, reason)
        self._window.quarantine(quarantine)
        if self._window.num_quarantined > self._settings.max_quarantined:
            (task,) = self._tasks.at([index])
            self.fail_run(
                f"{self._window.num_quarantined} prompts are quarantined, more than max_quarantined = "
                f"{self._settings.max_quarantined}; the last one, sample {task.sample_id!r}, {reason}"
            )
        self._publish(self._dispatch_ready())

    # Without the lock held

    def _free(self, samples: Sequence[InFlight]) -> None:
        """Features first, then their bytes are granted again."""
        try:
            if samples:
                self._features.abort([(sample.sample_id, sample.generation) for sample in samples])
            fault_point("controller.freed")
        finally:
            with self._changed:
                for sample in samples:
                    self._window.freed(sample)
                self._window.advance()
                self._publish(self._dispatch_ready())
                self._changed.notify_all()

    def _adopted(self, items: Sequence[LiveAttempt], deadline: float) -> list[InFlight]:
        tasks = self._tasks.at([item.attempt.sample for item in items])
        return [
            InFlight.adopted(item, task.sample_id, deadline, self._estimate_bytes(task.index))
            for item, task in zip(items, tasks, strict=True)
        ]

    def _may_retain(self, last_slot: int | None) -> bool:
        """Whether features that were trained in ``last_slot`` are needed again in a later epoch, and may be kept."""
        if self._retention is None or last_slot is None:
            return False
        return self._order.slot(last_slot).epoch + 1 < self._order.num_epochs

    def _let_go(self, done: Sequence[InFlight], freed: Sequence[InFlight]) -> None:
        """Free the features of ``freed``, which the ledger has released; put the rest of ``done`` aside, as far as
        there is room. No slot opens before both are done.
        """
        is_freed = {sample.index for sample in freed}
        aside = [sample for sample in done if sample.index not in is_freed]
        self._free([*freed, *self._stow(aside)])

    def _stow(self, samples: Sequence[InFlight]) -> list[InFlight]:
        """Put the features of these samples aside; those for which there was no room, released and to be freed."""
        if not samples or self._retention is None:
            return []
        kept = self._retention.retain([sample.ref for sample in samples if sample.ref is not None])
        with self._changed:
            ours = [self._window.in_flight.get(sample.index) is sample for sample in samples]
            # A slot that another thread opened meanwhile needs them where they are.
            freed = [
                sample
                for sample, is_kept, is_ours in zip(samples, kept, ours, strict=True)
                if is_ours and not is_kept and not self._window.has_open_slot(sample.index)
            ]
            self._store.release([sample.attempt for sample in freed])
            for sample, is_kept, is_ours in zip(samples, kept, ours, strict=True):
                if is_kept and is_ours:
                    self._window.stow(sample)
            for sample in freed:
                self._window.retire(sample)
        # The run may have ended meanwhile, which frees what it knew of.
        ended = [sample for sample, is_ours in zip(samples, ours, strict=True) if not is_ours]
        self._features.abort([(sample.sample_id, sample.generation) for sample in ended])
        return freed
