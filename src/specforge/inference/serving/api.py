"""The calls of a capture server over HTTP. Every answer that is not 200 is a ``capture_wire.Refusal``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from specforge.contracts import capture_wire as wire
from specforge.contracts.capture_server import InlineSink
from specforge.control_plane.gate import Fault
from specforge.data_plane.inline import MEDIA_TYPE, write_inline
from specforge.errors import ContractError
from specforge.inference.serving.jobs import Refused, when_all
from specforge.inference.serving.openapi import describe
from specforge.inference.serving.service import CaptureService, Ticket
from specforge.inference.serving.sinks import OPEN_S, still_opening

_LOG = logging.getLogger(__name__)

JSON = "application/json"
CHUNK_BYTES = 4 << 20
_MAX_WORKING = 16
"""Requests that are read, or whose answers are written, at one time."""
_MAX_CLOSING = 4
"""Requests to close a sink, which may take some seconds."""

ResultT = TypeVar("ResultT")


def refusal(what: wire.What, reason: str, status: int | None = None, *, close: bool = False) -> Response:
    """``close``: the connection is of no more use."""
    text = reason.encode(errors="replace").decode()
    headers = {"Connection": "close"} if close else {}
    body = wire.REFUSAL.write(wire.Refusal(what, text))
    return Response(body, wire.STATUS[what] if status is None else status, headers, media_type=JSON)


def refused(fault: Fault, message: str) -> Response:
    """``Refuse`` of a capture server."""
    kinds: dict[Fault, wire.What] = {
        "token": "token",
        "slow": "busy",
        "large": "request",
        "full": "busy",
        "stopping": "busy",
    }
    return refusal(kinds[fault], message, close=fault in ("slow", "full", "stopping"))


class Api:
    """Answers calls. What computes or blocks runs in threads."""

    def __init__(self, service: CaptureService, stopping: threading.Event, answer_timeout_s: float) -> None:
        self._service = service
        self._stopping = stopping
        self._answer_timeout_s = answer_timeout_s
        self._working = CapacityLimiter(_MAX_WORKING)
        self._closing = CapacityLimiter(_MAX_CLOSING)
        document = json.dumps(describe()).encode()
        calls: Mapping[str, Callable[[Request], Awaitable[Response]]] = {
            "capture": self._capture,
            "generate": self._generate,
            "sinks/close": self._close_sink,
        }
        self.app = Starlette(
            routes=[
                Route("/healthz", _constant(b'{"status":"ok"}')),
                Route("/openapi.json", _constant(document)),
                Route("/v1/info", _constant(wire.INFO.write(service.info))),
                *(Route(f"/v1/{name}", partial(self._answer, call), methods=["POST"]) for name, call in calls.items()),
            ],
            exception_handlers={HTTPException: _no_such_call},
        )

    async def _answer(self, call: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        try:
            return await call(request)
        except ContractError as error:
            return refusal("request", str(error))
        except Refused as error:
            return refusal(error.what, str(error), close=error.what == "busy" and self._stopping.is_set())
        except Exception as error:  # noqa: BLE001 - a boundary: the client is told, the server goes on
            _LOG.exception("a request failed")
            return refusal("engine", f"{type(error).__name__}: {error}")

    async def _capture(self, request: Request) -> Response:
        asked_at = time.monotonic()
        asked = await self._in_thread(wire.read_capture, await request.body())
        async with self._holding(await self._in_thread(self._service.admit, asked, asked_at)) as ticket:
            if ticket.sink is not None and not await _until(ticket.sink.opened, request, OPEN_S):
                raise still_opening()
            await self._in_thread(self._service.begin, ticket, asked)
            await _until(when_all(ticket.jobs), request)
            reply, tensors = self._service.captured(ticket)
            if not isinstance(asked.sink, InlineSink):
                return Response(wire.CAPTURE[1].write(reply), media_type=JSON)
            features = await self._in_thread(write_inline, reply, tensors)
            ticket.jobs.clear()  # the features are in the body now, and need not be held twice
            answer = FeaturesAnswer(features, self._answer_timeout_s, partial(self._service.release, ticket))
            ticket.is_handed_on = True
            return answer

    async def _generate(self, request: Request) -> Response:
        asked = await self._in_thread(wire.read_generate, await request.body())
        async with self._holding(await self._in_thread(self._service.generate, asked)) as ticket:
            await _until(when_all(ticket.jobs), request)
            return Response(wire.GENERATE[1].write(self._service.generated(ticket)), media_type=JSON)

    async def _close_sink(self, request: Request) -> Response:
        asked = wire.CLOSE_SINK.read(await request.body())
        await to_thread.run_sync(self._service.close_sink, asked, limiter=self._closing)
        return Response(b"{}", media_type=JSON)

    @contextlib.asynccontextmanager
    async def _holding(self, ticket: Ticket) -> AsyncIterator[Ticket]:
        """Released in the end; where it goes wrong, or the client hangs up, its jobs are given up."""
        try:
            yield ticket
        except BaseException:
            await to_thread.run_sync(self._service.abandon, ticket)
            raise
        finally:
            if not ticket.is_handed_on:
                self._service.release(ticket)

    async def _in_thread(self, work: Callable[..., ResultT], *arguments: Any) -> ResultT:
        return await to_thread.run_sync(partial(work, *arguments), limiter=self._working)


class FeaturesAnswer(Response):
    """Features in a body, sent in parts; ``when_sent`` is called in any case, after ``timeout_s`` at the latest."""

    def __init__(self, features: bytearray, timeout_s: float, when_sent: Callable[[], None]) -> None:
        super().__init__(memoryview(features), media_type=MEDIA_TYPE)
        self._timeout_s = timeout_s
        self._when_sent = when_sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        body = memoryview(self.body)
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        try:
            # a client that stops reading is cut off when this returns early
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await send(start)
                    for begin in range(0, len(body), CHUNK_BYTES):
                        part = body[begin : begin + CHUNK_BYTES]
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._when_sent()


async def _until(future: Future[Any], request: Request, timeout_s: float | None = None) -> bool:
    """Wait until ``future`` is done, whatever comes of it, or the time is over: False. Raises :class:`Refused` when the
    client hangs up before.
    """
    loop = asyncio.get_running_loop()
    finished = asyncio.Event()

    def tell(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is there to be told
            loop.call_soon_threadsafe(finished.set)

    future.add_done_callback(tell)
    done = asyncio.create_task(finished.wait())
    gone = asyncio.create_task(_hung_up(request))
    try:
        ended, _ = await asyncio.wait((done, gone), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if gone in ended and not finished.is_set():
            raise Refused("busy", "the client hung up")
        return finished.is_set()
    finally:
        done.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _constant(body: bytes) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(_: Request) -> Response:
        return Response(body, media_type=JSON)

    return endpoint


async def _no_such_call(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = refusal("request", f"no such call: {error.detail}", error.status_code)
    response.headers.update(error.headers or {})
    return response
