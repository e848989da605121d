"""RolloutWorker: the capture side's worker. lease -> capture -> put -> commit, on one engine."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
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
    FeatureStoreError,
    FeatureStoreFull,
    FeatureTooLarge,
    TargetError,
)
from specforge.faults import fault_point
from specforge.inference.engine import CapturedSample, TargetEngine

MAX_REASON_CHARS = 2000
FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 1.0
LEAVE_S = 0.5
"""How long a worker that leaves waits for the control plane to hear of it; its leases expire where it is not heard."""

# What says that the engine, not the prompt, is broken. After an AcceleratorError the device context is lost; running
# out of memory is no such error: it may be one long prompt's fault.
ENGINE_WIDE = (EngineError, TargetError, ConfigError, MemoryError, torch.AcceleratorError)


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How one worker works. ``poll_s`` bounds one blocking lease call of :meth:`RolloutWorker.run`.

    ``store_wait_s`` is the longest a put waits for room before the worker gives up.
    """

    worker_id: str
    spec: CaptureSpec
    max_tasks: int
    poll_s: float
    target_revision: str
    store_wait_s: float = 300.0


class RolloutWorker:
    """Drives one engine. Heartbeats are sent between captures, so a capture that hangs loses its leases on purpose.

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
                self._leave(_reason(error))
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
                features = self._capture_and_put(lease)
                if features is not None:
                    stored.append((lease, features))
        except BaseException:
            # nothing of this batch was committed: no reader can know these features
            self._store.abort([(lease.task.sample_id, lease.generation) for lease, _ in stored])
            raise
        self._commit(stored)
        if self._stopped.is_set():
            self._leave(None)

    def _leave(self, reason: str | None) -> None:
        """Best effort and bounded: whoever stops a worker soon loses patience, and the control plane may be away."""

        def tell() -> None:
            with contextlib.suppress(ControlPlaneError):
                self._control.leave(self._settings.worker_id, reason)

        messenger = threading.Thread(target=tell, name="leave", daemon=True)
        messenger.start()
        messenger.join(LEAVE_S)

    def _capture_and_put(self, lease: Lease) -> StoredFeatures | None:
        """Features of one lease in the store; ``None`` without any (a failure of the prompt is reported first)."""
        try:
            (sample,) = self._engine.capture([lease.task], self._settings.spec)
        except ENGINE_WIDE:
            raise
        except Exception as error:  # noqa: BLE001 - whatever one prompt does to the engine is that prompt's failure
            self._fail(lease, _reason(error))
            return None
        fault_point("worker.captured")
        damaged = not_finite(sample.tensors)
        if damaged is not None:
            self._fail(lease, f"the target gave NaN or infinite values in feature {damaged!r}")
            return None
        try:
            features = self._put(lease, sample)
        except FeatureTooLarge as error:
            self._fail(lease, _reason(error))
            return None
        fault_point("worker.stored")
        return features

    def _put(self, lease: Lease, sample: CapturedSample) -> StoredFeatures | None:
        """Put, waiting for room while the store is full; ``None`` when the worker was stopped meanwhile.

        Cannot spin: every retry follows a blocking wait that doubles up to a second, and the waits of one put end
        after ``store_wait_s``. Credits of the control plane make this path rare.
        """
        request = PutRequest(sample.sample_id, lease.generation, sample.tensors)
        deadline = time.monotonic() + self._settings.store_wait_s
        wait_s = FIRST_RETRY_S
        while True:
            try:
                return self._store.put([request])[0]
            except FeatureStoreFull as error:
                if time.monotonic() + wait_s > deadline:
                    raise FeatureStoreError(
                        f"the feature store stayed full for up to {self._settings.store_wait_s:g} s "
                        f"({error}); give the store more room or lower the number of samples in flight"
                    ) from error
            if self._stopped.wait(wait_s):
                return None
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)
            self._heartbeat_if_due(lease.duration_s)

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
        task, settings = lease.task, self._settings
        return SampleRef(
            sample_id=task.sample_id,
            generation=lease.generation,
            num_tokens=task.num_tokens,
            loss_spans=task.loss_spans,
            store=features.store,
            key=features.key,
            num_bytes=features.num_bytes,
            features=features.features,
            target_revision=settings.target_revision,
            capture_fingerprint=settings.spec.fingerprint,
            worker_id=settings.worker_id,
        )

    def _fail(self, lease: Lease, reason: str) -> None:
        self._control.fail(self._settings.worker_id, lease.task.sample_id, lease.generation, reason)

    def _heartbeat_if_due(self, lease_duration_s: float) -> None:
        now = time.monotonic()
        if now - self._last_sign_of_life > lease_duration_s / 3:
            self._control.heartbeat(self._settings.worker_id)
            self._last_sign_of_life = now


def _reason(error: BaseException) -> str:
    """Message and the tail of the traceback, short enough for the ledger."""
    trace = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {str(error)[:300]}\n{trace[-MAX_REASON_CHARS:]}"
