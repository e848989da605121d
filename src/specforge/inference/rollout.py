"""RolloutWorker: the capture side's worker. lease -> (generate -> record ->) capture -> put -> commit, on an engine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.refs import SampleRef
from specforge.control_plane.base import CaptureControl, Lease
from specforge.data_plane.base import FeatureStore, PutRequest, StoredFeatures
from specforge.data_plane.encoding import not_finite
from specforge.errors import (
    ConfigError,
    ControlPlaneError,
    EngineError,
    FeatureTooLarge,
    PromptRefused,
    StaleGeneration,
    TargetError,
)
from specforge.faults import fault_point
from specforge.inference.delivery import leave_soon, put_with_patience, reason_of, ref_of
from specforge.inference.engine import CapturedSample, TargetEngine
from specforge.inference.responses import heartbeats, recorded, response
from specforge.prompts.responses import ResponseOptions

# What says that the engine, not the prompt, is broken. After an AcceleratorError the device context is lost; running
# out of memory is no such error: it may be one long prompt's fault.
ENGINE_WIDE = (EngineError, TargetError, ConfigError, MemoryError, torch.AcceleratorError)


def is_engine_wide(error: Exception) -> bool:
    """Whether ``error`` says that no other prompt can be captured either."""
    return isinstance(error, ENGINE_WIDE) and not isinstance(error, PromptRefused)


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How one worker works. ``poll_s`` bounds one blocking lease call of :meth:`RolloutWorker.run`.

    ``store_wait_s`` is the longest a put waits for room before the worker gives up. ``responses``: how prompts are
    answered; ``None`` where none is to be. ``waits_for_servers``: the engine asks servers, each for a bounded time of
    its own, and may go on to the next: leases are kept while it captures.
    """

    worker_id: str
    spec: CaptureSpec
    max_tasks: int
    poll_s: float
    target_revision: str
    store_wait_s: float = 300.0
    responses: ResponseOptions | None = None
    waits_for_servers: bool = False


class RolloutWorker:
    """Drives one engine. Heartbeats are sent between captures, so a capture that hangs loses its leases on purpose;
    during captures too where servers are waited for.

    A failure of one prompt is reported with ``control.fail`` and the worker goes on. After a failure of the engine or
    the store the worker leaves (``control.leave`` with the reason) and raises it; a worker that is stopped gives back
    what it holds. A refused (stale) commit frees the features at once.
    """

    def __init__(
        self, control: CaptureControl, engine: TargetEngine, store: FeatureStore, settings: RolloutSettings
    ) -> None:
        self._control = control
        self._engine = engine
        self._store = store
        self._settings = settings
        self._stopped = threading.Event()
        self._last_sign_of_life = time.monotonic()

    def run(self) -> None:
        """Work until no task will ever be offered again, or until :meth:`stop`."""
        while not self._stopped.is_set() and self.run_once(self._settings.poll_s):
            pass

    def stop(self) -> None:
        """Make :meth:`run` return after the work it has in hand. May be called from any thread."""
        self._stopped.set()

    def run_once(self, timeout_s: float) -> bool:
        """Capture and commit one batch of leases; ``False`` when no task will ever be offered again.

        Blocks up to ``timeout_s`` for a lease, and answers ``True`` when there was none to give.
        """
        try:
            reply = self._control.lease(self._settings.worker_id, self._settings.max_tasks, timeout_s)
            if reply.leases:
                self._work(reply.leases)
        except Exception as error:
            if not isinstance(error, ControlPlaneError):
                self._leave(reason_of(error))
            raise
        except BaseException:
            self._leave(None)
            raise
        return not reply.finished

    def _work(self, leases: Sequence[Lease]) -> None:
        """Capture, put and commit; what is not committed in the end is not stored either."""
        fault_point("worker.leased")
        self._last_sign_of_life = time.monotonic()
        stored: list[tuple[Lease, StoredFeatures]] = []
        try:
            for lease in leases:
                if self._stopped.is_set():
                    break
                self._heartbeat_if_due(lease.duration_s)
                answered = self._answered(lease)
                features = None if answered is None else self._capture_and_put(answered)
                if answered is not None and features is not None:
                    stored.append((answered, features))
        except BaseException:
            # nothing of this batch was committed: no reader can know these features
            self._store.abort([(lease.task.sample_id, lease.generation) for lease, _ in stored])
            raise
        self._commit(stored)
        if self._stopped.is_set():
            self._leave(None)

    def _leave(self, reason: str | None) -> None:
        leave_soon(self._control, self._settings.worker_id, reason)

    def _answered(self, lease: Lease) -> Lease | None:
        """The lease with all tokens of its sample, whose response is generated and recorded where there is none yet.

        ``None``: the prompt failed, which is reported first, or the lease is over.
        """
        if not lease.task.num_to_generate:
            return lease
        options, worker_id = self._settings.responses, self._settings.worker_id
        assert options is not None, "a prompt is to be answered, but this worker was not told how"
        try:
            with heartbeats(self._control, worker_id, lease.duration_s):
                response_ids = response(self._engine, lease.task, options)
        except Exception as error:
            if is_engine_wide(error):
                raise
            self._fail(lease, reason_of(error))
            return None
        try:
            answered = recorded(self._control, worker_id, lease, response_ids)
        except StaleGeneration:
            return None
        self._last_sign_of_life = time.monotonic()
        fault_point("worker.recorded")
        return answered

    def _capture_and_put(self, lease: Lease) -> StoredFeatures | None:
        """Features of one lease in the store; ``None`` without any (a failure of the prompt is reported first)."""
        try:
            with self._beating(lease):
                (sample,) = self._engine.capture([lease.task], self._settings.spec)
        except Exception as error:
            if is_engine_wide(error):
                raise
            self._fail(lease, reason_of(error))
            return None
        fault_point("worker.captured")
        damaged = not_finite(sample.tensors)
        if damaged is not None:
            self._fail(lease, f"the target gave NaN or infinite values in feature {damaged!r}")
            return None
        try:
            features = self._put(lease, sample)
        except FeatureTooLarge as error:
            self._fail(lease, reason_of(error))
            return None
        fault_point("worker.stored")
        return features

    def _beating(self, lease: Lease) -> contextlib.AbstractContextManager[None]:
        if self._settings.waits_for_servers:
            return heartbeats(self._control, self._settings.worker_id, lease.duration_s)
        return contextlib.nullcontext()

    def _put(self, lease: Lease, sample: CapturedSample) -> StoredFeatures | None:
        """Put, waiting for room while the store is full; ``None`` when the worker was stopped meanwhile."""
        return put_with_patience(
            self._store,
            PutRequest(sample.sample_id, lease.generation, sample.tensors),
            self._settings.store_wait_s,
            self._stopped,
            lambda: self._heartbeat_if_due(lease.duration_s),
        )

    def _commit(self, stored: Sequence[tuple[Lease, StoredFeatures]]) -> None:
        if not stored:
            return
        reply = self._control.commit([self._ref(lease, features) for lease, features in stored])
        stale = [
            (lease.task.sample_id, lease.generation)
            for (lease, _), accepted in zip(stored, reply.accepted, strict=True)
            if not accepted
        ]
        if stale:
            self._store.abort(stale)
        fault_point("worker.committed")

    def _ref(self, lease: Lease, features: StoredFeatures) -> SampleRef:
        settings = self._settings
        return ref_of(
            lease,
            features,
            worker_id=settings.worker_id,
            target_revision=settings.target_revision,
            spec=settings.spec,
        )

    def _fail(self, lease: Lease, reason: str) -> None:
        self._control.fail(self._settings.worker_id, lease.task.sample_id, lease.generation, reason)

    def _heartbeat_if_due(self, lease_duration_s: float) -> None:
        now = time.monotonic()
        if now - self._last_sign_of_life > lease_duration_s / 3:
            self._control.heartbeat(self._settings.worker_id)
            self._last_sign_of_life = now
