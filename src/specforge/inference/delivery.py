"""What every worker of the capture side does around a capture: put with patience, name what was put, take its leave."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.refs import SampleRef
from specforge.control_plane.base import CaptureControl, Lease
from specforge.data_plane.base import FeatureStore, PutRequest, StoredFeatures
from specforge.errors import ControlPlaneError, FeatureStoreFull

MAX_REASON_CHARS = 2000
FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 1.0
LEAVE_S = 0.5
"""How long a worker that leaves waits for the control plane to hear of it; its leases expire where it is not heard."""


def put_with_patience(
    store: FeatureStore,
    request: PutRequest,
    wait_s: float,
    stopped: threading.Event,
    between: Callable[[], None] = lambda: None,
) -> StoredFeatures | None:
    """Put, waiting for room while the store is full; ``None`` when ``stopped`` was set meanwhile.

    Cannot spin: every retry follows a blocking wait that doubles up to a second, and ``between`` after it. The waits
    end after ``wait_s``, with a ``FeatureStoreFull``. Credits of the control plane make this path rare.
    """
    deadline = time.monotonic() + wait_s
    pause_s = FIRST_RETRY_S
    while True:
        try:
            return store.put([request])[0]
        except FeatureStoreFull as error:
            if time.monotonic() + pause_s > deadline:
                raise FeatureStoreFull(
                    f"the feature store stayed full for up to {wait_s:g} s ({error}); give the store more room or "
                    "lower the number of samples in flight"
                ) from error
        if stopped.wait(pause_s):
            return None
        pause_s = min(2 * pause_s, LONGEST_RETRY_S)
        between()


def ref_of(
    lease: Lease, stored: StoredFeatures, *, worker_id: str, target_revision: str, spec: CaptureSpec
) -> SampleRef:
    """What is committed of features that were captured as ``spec`` says."""
    task = lease.task
    return SampleRef(
        sample_id=task.sample_id,
        generation=lease.generation,
        num_tokens=task.num_tokens,
        loss_spans=task.loss_spans,
        store=stored.store,
        key=stored.key,
        num_bytes=stored.num_bytes,
        features=stored.features,
        target_revision=target_revision,
        capture_fingerprint=spec.fingerprint,
        worker_id=worker_id,
    )


def leave_soon(control: CaptureControl, worker_id: str, reason: str | None) -> None:
    """Best effort and bounded: whoever stops a worker soon loses patience, and the control plane may be away."""

    def tell() -> None:
        with contextlib.suppress(ControlPlaneError):
            control.leave(worker_id, reason)

    messenger = threading.Thread(target=tell, name="leave", daemon=True)
    messenger.start()
    messenger.join(LEAVE_S)


def reason_of(error: BaseException) -> str:
    """Message and the tail of the traceback, short enough for the ledger."""
    trace = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {str(error)[:300]}\n{trace[-MAX_REASON_CHARS:]}"
