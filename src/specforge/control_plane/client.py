"""ControlPlaneClient: ``CaptureControl`` and ``TrainControl`` from another process."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Sequence
from typing import TypeVar

import httpx

from specforge.contracts.codec import Form
from specforge.contracts.refs import SampleRef, Slot
from specforge.control_plane import wire
from specforge.control_plane.base import CommitReply, LeaseReply, Recorded
from specforge.errors import ControlPlaneError

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_GRACE_S = 10.0
"""How much longer than a long poll the client waits for its answer."""

_AWAY = {httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.REQUEST_TIMEOUT}
"""The server is stopping, or the request came too slowly: the same call again may succeed."""

BodyT = TypeVar("BodyT")
ReplyT = TypeVar("ReplyT")


class ControlPlaneClient:
    """Talks to the server at ``url``; safe to call from several threads, connections are kept alive.

    Errors of the controller are raised again as what they are. While the server cannot be reached (refused, reset,
    silent, an answer torn in half, stopping) the same call is made again for ``reconnect_s`` seconds; then
    ``ControlPlaneError``. A call has one key over all its attempts, so it is carried out once.
    """

    def __init__(self, url: str, token: str | None, reconnect_s: float = 120.0) -> None:
        self._url = url
        self._reconnect_s = reconnect_s
        self._closed = threading.Event()
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        # Proxies of the environment are not for the control plane. Every blocked thread has a connection of its own.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.Client(base_url=url, headers=headers, limits=limits, trust_env=False)

    # CaptureControl

    def lease(self, worker_id: str, max_tasks: int, timeout_s: float) -> LeaseReply:
        deadline = time.monotonic() + timeout_s
        while True:
            wait_s = min(max(0.0, deadline - time.monotonic()), wire.MAX_WAIT_S)
            body = wire.LeaseBody(worker_id, min(max_tasks, wire.MAX_BATCH), wait_s)
            reply = self._call("lease", wire.LEASE, body, wait_s)
            if reply.leases or reply.finished or time.monotonic() >= deadline:
                return reply

    def commit(self, refs: Sequence[SampleRef]) -> CommitReply:
        return self._call("commit", wire.COMMIT, wire.CommitBody(tuple(refs)))

    def record(self, worker_id: str, sample_id: str, generation: int, response_ids: Sequence[int]) -> Recorded:
        return self._call("record", wire.RECORD, wire.RecordBody(worker_id, sample_id, generation, tuple(response_ids)))

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        self._call("fail", wire.FAIL, wire.FailBody(worker_id, sample_id, generation, wire.plain_reason(reason)))

    def heartbeat(self, worker_id: str) -> None:
        self._call("heartbeat", wire.HEARTBEAT, wire.HeartbeatBody(worker_id))

    def leave(self, worker_id: str, reason: str | None) -> None:
        plain = None if reason is None else wire.plain_reason(reason)
        self._call("leave", wire.LEAVE, wire.LeaveBody(worker_id, plain))

    # TrainControl

    def ack(self, slots: Sequence[Slot], step: int) -> None:
        self._call("ack", wire.ACK, wire.AckBody(tuple(slots), step))

    def checkpointed(self, step: int) -> None:
        self._call("checkpointed", wire.CHECKPOINTED, wire.CheckpointedBody(step))

    # The stream of refs, see ``NetworkRefReader``

    def poll_refs(self, body: wire.PollBody) -> wire.RefPage:
        return self._call("refs/poll", wire.POLL, body, body.timeout_s)

    def consume_refs(self, consumer: str, stream_id: str, num_refs: int) -> None:
        """``num_refs`` counts from the start of the stream."""
        self._call("refs/consumed", wire.CONSUMED, wire.ConsumedBody(consumer, stream_id, num_refs))

    def summary(self) -> wire.Summary:
        """See ``DataFlowController.summary``."""
        return wire.SUMMARY.read(self._send("GET", "/v1/summary", b"", {}, 0.0))

    def close(self) -> None:
        """Ends calls that wait for the server to come back: ``ControlPlaneError`` in their threads."""
        self._closed.set()
        self._http.close()

    def _call(self, name: str, forms: tuple[Form[BodyT], Form[ReplyT]], body: BodyT, wait_s: float = 0.0) -> ReplyT:
        of_body, of_reply = forms
        headers = {wire.KEY_HEADER: uuid.uuid4().hex}
        return of_reply.read(self._send("POST", f"/v1/{name}", of_body.write(body), headers, wait_s))

    def _send(self, method: str, path: str, content: bytes, headers: dict[str, str], wait_s: float) -> bytes:
        """The answer to one call, however many attempts it takes."""
        give_up_at: float | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            if self._closed.is_set():
                raise ControlPlaneError(f"the client of the control plane at {self._url} was closed")
            try:
                response = self._http.request(method, path, content=content, headers=headers, timeout=wait_s + _GRACE_S)
                if response.status_code not in _AWAY:
                    break
                why = f"it answered {response.status_code}"
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
            now = time.monotonic()
            give_up_at = now + self._reconnect_s if give_up_at is None else give_up_at
            if now >= give_up_at:
                raise ControlPlaneError(
                    f"the control-plane server at {self._url} is gone: no answer for {self._reconnect_s:g} s ({why}); "
                    "look at the log of the train process"
                )
            # Workers that lost the same server do not all come back in the same instant.
            self._closed.wait(min(pause_s * random.uniform(0.5, 1.0), give_up_at - now))  # noqa: S311
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if response.status_code != httpx.codes.OK:
            raise wire.error_from_json(response.status_code, response.content)
        return response.content
