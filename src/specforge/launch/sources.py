"""Where a train rank's loader takes its slots from.

One rank takes them off its queue, or captures what is missing first. With several ranks the leader alone has the queue;
every window of slots that it takes goes to all ranks, so that they train the same steps and end at the same one.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from specforge.contracts.codec import from_json, to_json
from specforge.contracts.refs import SampleRef, SlotRef
from specforge.control_plane.base import CaptureControl, CommitReply, LeaseReply, Recorded
from specforge.data_plane.loader import RefSource
from specforge.errors import ProducerFailed
from specforge.training.ranks import Channel

WAIT_S = 30.0
"""One wait of the leader for a lease. Its end is no event: it waits again."""


class Refs(Protocol):
    """A queue of dispatched slots."""

    def get(self, max_slots: int) -> list[SlotRef]: ...

    def ack(self, refs: Sequence[SlotRef]) -> None: ...


class Worker(Protocol):
    """A rollout worker, by itself or driven."""

    def run(self) -> None: ...

    def run_once(self, timeout_s: float) -> bool: ...

    def stop(self) -> None:
        """End after the running sample, and give the rest back. From any thread."""
        ...


class HandOver:
    """The loader's source: what it took is off the channel. Whether it was trained is the ledger's business."""

    def __init__(self, queue: Refs) -> None:
        self._queue = queue

    def get(self, max_slots: int) -> list[SlotRef]:
        refs = self._queue.get(max_slots)
        self._queue.ack(refs)
        return refs


class InlineCapture:
    """A source of refs that drives the rollout worker itself, in the thread that asks: one process, no waiting."""

    def __init__(self, worker: Worker, num_ready: Callable[[], int], take: Callable[[int], list[SlotRef]]) -> None:
        self._worker = worker
        self._num_ready = num_ready
        self._take = take

    def get(self, max_slots: int) -> list[SlotRef]:
        """Up to ``max_slots`` slots in order, capturing what is missing; fewer only at the end."""
        while self._num_ready() < max_slots and self._worker.run_once(timeout_s=0.0):
            pass
        return self._take(max_slots)

    def stop(self) -> None:
        """End the capture after the running sample, once the control plane has nothing left. From any thread."""
        self._worker.stop()


class LeaseControl(CaptureControl, Protocol):
    """What the controller gives its own process beyond that: a wait for a lease that can be ended."""

    def lease(
        self, worker_id: str, max_tasks: int, timeout_s: float, key: str = "", cancelled: Callable[[], bool] = ...
    ) -> LeaseReply: ...


class _PassedOn:
    """``CaptureControl`` over another one, but for the leases."""

    def __init__(self, control: CaptureControl) -> None:
        self._inner = control

    def commit(self, refs: Sequence[SampleRef]) -> CommitReply:
        return self._inner.commit(refs)

    def record(self, worker_id: str, sample_id: str, generation: int, response_ids: Sequence[int]) -> Recorded:
        return self._inner.record(worker_id, sample_id, generation, response_ids)

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        self._inner.fail(worker_id, sample_id, generation, reason)

    def heartbeat(self, worker_id: str) -> None:
        self._inner.heartbeat(worker_id)

    def leave(self, worker_id: str, reason: str | None) -> None:
        self._inner.leave(worker_id, reason)


class UntilReady(_PassedOn):
    """Of the leader's own worker, beside those of other ranks: a wait for a lease ends without one when ``is_ready``.

    What another rank holds becomes ready, or comes back to be leased: the wait ends either way.
    """

    def __init__(self, control: LeaseControl, is_ready: Callable[[], bool]) -> None:
        super().__init__(control)
        self._control = control
        self._is_ready = is_ready

    def lease(self, worker_id: str, max_tasks: int, timeout_s: float) -> LeaseReply:
        return self._control.lease(worker_id, max_tasks, timeout_s, cancelled=self._is_ready)


class WhileLeased(_PassedOn):
    """Remembers whether the last lease gave something."""

    gave = False

    def lease(self, worker_id: str, max_tasks: int, timeout_s: float) -> LeaseReply:
        reply = self._inner.lease(worker_id, max_tasks, timeout_s)
        self.gave = bool(reply.leases)
        return reply


class SharedCapture:
    """``InlineCapture`` of a leader whose followers capture too: it waits for what they hold.

    All lease in small shares what the window of the controller offers, which is one step: whoever is done with a share
    takes the next one.
    """

    def __init__(
        self,
        make_worker: Callable[[CaptureControl], Worker],
        control: LeaseControl,
        num_ready: Callable[[], int],
        take: Callable[[int], list[SlotRef]],
    ) -> None:
        self._wanted = 0
        self._num_ready = num_ready
        self._take = take
        self._worker = make_worker(UntilReady(control, self._is_ready))

    def get(self, max_slots: int) -> list[SlotRef]:
        """Up to ``max_slots`` slots in order, capturing what nobody else does; fewer only at the end."""
        self._wanted = max_slots
        while not self._is_ready() and self._worker.run_once(WAIT_S):
            pass
        return self._take(max_slots)

    def stop(self) -> None:
        """End the capture after the running sample, once the control plane has nothing left. From any thread."""
        self._worker.stop()

    def _is_ready(self) -> bool:
        return self._num_ready() >= self._wanted


class CaptureWhileLeased:
    """What a follower does when its leader asks for capture: all that is leased to it, without waiting for more."""

    def __init__(self, make_worker: Callable[[CaptureControl], Worker], control: CaptureControl) -> None:
        self._control = WhileLeased(control)
        self._worker = make_worker(self._control)
        self._stopped = False

    def __call__(self) -> None:
        while not self._stopped and self._worker.run_once(timeout_s=0.0) and self._control.gave:
            pass

    def stop(self) -> None:
        """End after the running sample; what is left of the leases goes to other ranks. From any thread."""
        self._stopped = True
        self._worker.stop()


class LeaderSource:
    """The leader's source: what ``source`` gives goes to all ranks. ``asks``: followers capture before each window.

    ``close`` after the last step, and after the thread that calls ``get`` has ended, tells the followers that there is
    no more; it is not called when the run failed.
    """

    def __init__(self, source: RefSource, channel: Channel, *, asks: bool) -> None:
        self._source = source
        self._channel = channel
        self._asks = asks
        self._is_over = False

    def get(self, max_slots: int) -> list[SlotRef]:
        if self._is_over:
            return []
        if self._asks:
            self._send(event="capture")
        try:
            refs = self._source.get(max_slots)
        except ProducerFailed as error:
            self._is_over = True
            self._send(event="failed", reason=str(error))
            raise
        self._is_over = len(refs) < max_slots
        self._send(event="slots", refs=[to_json(ref) for ref in refs], last=self._is_over)
        return refs

    def close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._send(event="slots", refs=[], last=True)

    def _send(self, **message: Any) -> None:
        self._channel.broadcast(json.dumps(message).encode())


class FollowerSource:
    """The source of every other rank: the leader's windows, which a thread receives from the first to the last.

    So the leader never waits for a follower's loader, and a ``get`` that waits can be ended by ``cancel``.
    """

    def __init__(self, channel: Channel, capture: Callable[[], None] = lambda: None) -> None:
        self._channel = channel
        self._capture = capture
        self._inbox: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
        self._is_over = False
        self._thread = threading.Thread(target=self._receive, name="windows", daemon=True)
        self._thread.start()

    def get(self, max_slots: int) -> list[SlotRef]:  # noqa: ARG002 - the leader's loader asks for as many
        while not self._is_over:
            message = self._inbox.get()
            if isinstance(message, BaseException):
                raise message
            if message is None:
                self._is_over = True
            elif message["event"] == "capture":
                self._capture()
            elif message["event"] == "failed":
                self._is_over = True
                raise ProducerFailed(message["reason"])
            else:
                self._is_over = message["last"]
                return [from_json(SlotRef, ref) for ref in message["refs"]]
        return []

    def cancel(self) -> None:
        """A ``get`` that waits, and every later one, gives the end. From any thread."""
        self._inbox.put(None)

    def close(self) -> None:
        """Until the leader has closed its side."""
        self._thread.join()

    def _receive(self) -> None:
        try:
            while True:
                message = json.loads(self._channel.broadcast(b""))
                self._inbox.put(message)
                if message["event"] == "failed" or message.get("last"):
                    return
        except BaseException as error:  # noqa: BLE001 - the thread boundary: whoever gets raises it
            self._inbox.put(error)
