"""The gate in front of the application: what is refused before anything is parsed.

A request needs the token, a body within the limits of size and time, and a server that is not stopping. Whether the
server is well may be asked without any of it but the last.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from specforge.control_plane import wire
from specforge.errors import ContractError, ControlPlaneError

HEAD_TIMEOUT_S = 30.0
MAX_HEAD_BYTES = 64 << 10
MAX_BODIES = 8
"""How many of the largest bodies there may be at one time; bodies that add up to more are refused for now."""


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_body_bytes`` of a request's body, which must be there ``body_timeout_s`` after its headers."""

    max_body_bytes: int
    body_timeout_s: float


Fault = Literal["token", "slow", "large", "full", "stopping"]
"""Why the gate refuses: the token is missing or wrong, the body takes too long or is too large, there are too many
bodies already, the server stops.
"""
Refuse = Callable[[Fault, str], Response]
"""The answer of one server to a fault, of which it is given a sentence."""


def error_response(error: Exception, status: int, *, close: bool = False) -> Response:
    """``close``: the connection is of no more use."""
    headers = {"Connection": "close"} if close else {}
    return Response(wire.error_to_json(error), status, headers, media_type="application/json")


def stopping_response() -> Response:
    """Closes the connection: a client comes back to a successor."""
    return error_response(ControlPlaneError("the control-plane server is stopping"), 503, close=True)


def refused(fault: Fault, message: str) -> Response:
    """``Refuse`` of the control plane."""
    if fault == "stopping":
        return stopping_response()
    error = ControlPlaneError(message) if fault in ("token", "full") else ContractError(message)
    status = {"token": 401, "slow": 408, "large": 413, "full": 503}[fault]
    return error_response(error, status, close=fault in ("slow", "full"))


class Gate:
    """An ASGI application around ``app``, which gets the whole body in one message (and none of a question for the
    health). ``token`` None: nobody is asked.

    ``name`` is the server's in sentences, ``refuse`` writes its answers to what is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        limits: Limits,
        stopping: threading.Event,
        name: str = "control-plane server",
        refuse: Refuse = refused,
    ) -> None:
        self._app = app
        self._name = name
        self._refuse = refuse
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._limits = limits
        self._stopping = stopping
        self._num_body_bytes = 0
        """Of all requests that are read or answered now."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        if refusal is None and _asks_for_health(scope):
            await self._app(scope, receive, send)
        elif refusal is None:
            await self._let_in(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(self._limits.body_timeout_s):
                    refusal = await self._read(parts, receive)
            except TimeoutError:
                refusal = self._too_slow()
            except ClientDisconnect:
                return
            if refusal is None:
                parts[:] = [b"".join(parts)]  # held once
                await self._app(scope, _after(parts[0], receive), send)
            else:
                await refusal(scope, receive, send)
        finally:
            self._num_body_bytes -= sum(map(len, parts))

    def _refusal(self, scope: Scope) -> Response | None:
        if self._stopping.is_set():
            return self._refuse("stopping", f"the {self._name} is stopping")
        if _asks_for_health(scope):
            return None
        headers = dict(scope["headers"])
        if self._expected is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                return self._refuse("token", f"the token of the {self._name} is missing or wrong")
        if int(headers.get(b"content-length", b"0")) > self._limits.max_body_bytes:
            return self._too_large()
        return None

    async def _read(self, parts: list[bytes], receive: Receive) -> Response | None:
        """Append the body to ``parts``, whose bytes count until they are subtracted; what it is refused with."""
        limit = self._limits.max_body_bytes
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            num_bytes += len(parts[-1])
            self._num_body_bytes += len(parts[-1])
            if num_bytes > limit:
                return self._too_large()
            if self._num_body_bytes > MAX_BODIES * limit:
                return self._refuse(
                    "full", f"the {self._name} has too many large requests already; send it again later"
                )
            if not message.get("more_body", False):
                return None

    def _too_slow(self) -> Response:
        limit_s = self._limits.body_timeout_s
        return self._refuse("slow", f"the body of the request was not there after {limit_s:g} s; send it again")

    def _too_large(self) -> Response:
        limit = self._limits.max_body_bytes
        return self._refuse("large", f"the body of the request is larger than {limit} bytes; send smaller batches")


def _asks_for_health(scope: Scope) -> bool:
    return scope["path"] == "/healthz" and scope["method"] in ("GET", "HEAD")


def _after(body: bytes, receive: Receive) -> Receive:
    """``receive`` of an application whose request's body was read already."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


class BoundedHead(HttpToolsProtocol):
    """HTTP/1.1 that closes a connection whose request line and headers take too long, or are too long."""

    _timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Head and body of an answer are two writes: the second must not wait for the client's delayed acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._num_head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The headers of the request are too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._num_head_bytes = 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
