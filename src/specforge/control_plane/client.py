"""ControlPlaneClient: ``CaptureControl`` from another process."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import httpx

from specforge.contracts import codec
from specforge.contracts.refs import SampleRef
from specforge.control_plane import wire
from specforge.control_plane.base import CommitReply, LeaseReply
from specforge.errors import ControlPlaneError

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_GRACE_S = 10.0
"""How much longer than a long poll the client waits for its answer."""


class ControlPlaneClient:
    """Talks to the server at ``url``; safe to call from several threads, connections are kept alive.

    Errors of the controller are raised again as what they are. A connection that breaks is tried again for
    ``retry_s`` seconds (every call changes nothing when repeated); then the server is gone: ``ControlPlaneError``.
    """

    def __init__(self, url: str, token: str, retry_s: float = 10.0) -> None:
        self._url = url
        self._retry_s = retry_s
        self._closed = threading.Event()
        # Proxies of the environment are not for the control plane.
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False)

    def lease(self, worker_id: str, max_tasks: int, timeout_s: float) -> LeaseReply:
        deadline = time.monotonic() + timeout_s
        while True:
            wait_s = min(max(0.0, deadline - time.monotonic()), wire.MAX_WAIT_S)
            body = {"worker_id": worker_id, "call_id": uuid.uuid4().hex, "max_tasks": max_tasks, "timeout_s": wait_s}
            reply = wire.lease_reply_from_json(self._call("/v1/lease", body, wait_s))
            if reply.leases or reply.finished or time.monotonic() >= deadline:
                return reply

    def commit(self, refs: Sequence[SampleRef]) -> CommitReply:
        reply = self._call("/v1/commit", {"refs": [codec.to_json(ref) for ref in refs]})
        return CommitReply(tuple(reply["accepted"]))

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        body = {"worker_id": worker_id, "sample_id": sample_id, "generation": generation, "reason": reason}
        self._call("/v1/fail", body)

    def heartbeat(self, worker_id: str) -> None:
        self._call("/v1/heartbeat", {"worker_id": worker_id})

    def abandon(self, worker_id: str, reason: str) -> None:
        self._call("/v1/abandon", {"worker_id": worker_id, "reason": reason})

    def summary(self) -> dict[str, Any]:
        """See ``DataFlowController.summary``."""
        return self._call("/v1/summary", None)

    def close(self) -> None:
        self._closed.set()
        self._http.close()

    def _call(self, path: str, body: dict[str, Any] | None, wait_s: float = 0.0) -> dict[str, Any]:
        give_up_at: float | None = None
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                method = "GET" if body is None else "POST"
                response = self._http.request(method, path, json=body, timeout=wait_s + _GRACE_S)
                if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                    raise httpx.RemoteProtocolError("the server is stopping")
                return _answer(response)
            except httpx.TransportError as error:
                now = time.monotonic()
                give_up_at = now + self._retry_s if give_up_at is None else give_up_at
                if now >= give_up_at or self._closed.wait(min(pause_s, give_up_at - now)):
                    raise ControlPlaneError(
                        f"the control-plane server at {self._url} is gone: no connection for {self._retry_s:g} s "
                        f"({type(error).__name__}: {error})"
                    ) from error
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        payload = response.json()
    except ValueError:
        payload = f"{response.status_code} {response.text}"
    if response.status_code != httpx.codes.OK or not isinstance(payload, dict):
        raise wire.error_from_json(payload)
    return payload
