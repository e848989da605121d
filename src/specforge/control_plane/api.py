"""The calls of the control plane as an HTTP application, described by its own ``/openapi.json``."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import Message

from specforge import __version__
from specforge.contracts.codec import Form
from specforge.control_plane import wire
from specforge.control_plane.answers import Answer, Answers
from specforge.control_plane.base import CaptureControl, LeaseReply, Recorded, TrainControl
from specforge.control_plane.channel.network import RefStream
from specforge.control_plane.gate import error_response, stopping_response
from specforge.control_plane.metrics import Metrics
from specforge.control_plane.openapi import describe_application, describe_call, describe_reading
from specforge.errors import ContractError, ControlPlaneError, SpecForgeError

_LOG = logging.getLogger(__name__)
_MAX_WAITING = 1024
"""Long polls at one time; each blocks one thread of the server."""
_MAX_WORKING = 32
"""Other calls at one time."""

BodyT = TypeVar("BodyT")
ReplyT = TypeVar("ReplyT")


class ServedController(CaptureControl, TrainControl, Protocol):
    """What the server needs of a ``DataFlowController``."""

    def lease(
        self,
        worker_id: str,
        max_tasks: int,
        timeout_s: float,
        key: str = "",
        cancelled: Callable[[], bool] = lambda: False,
    ) -> LeaseReply:
        """``key`` names the call, see ``DataFlowController.lease``."""
        ...

    def wake(self) -> None:
        """Blocked leases look at their ``cancelled`` again."""
        ...

    def summary(self) -> wire.Summary: ...


@dataclass(frozen=True, slots=True)
class Asked(Generic[BodyT]):
    """One request: its body, its key, and whether nobody waits for the answer any more."""

    body: BodyT
    key: str
    cancelled: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Call(Generic[BodyT, ReplyT]):
    """``keyed``: carried out once a key. ``idle``, of a long poll: whether a reply says that nothing came meanwhile."""

    name: str
    forms: tuple[Form[BodyT], Form[ReplyT]]
    run: Callable[[Asked[BodyT]], ReplyT | None]
    keyed: bool = True
    idle: Callable[[ReplyT], bool] | None = None


def control_calls(controller: ServedController, stream: RefStream | None) -> list[Call[Any, Any]]:
    """Every POST of ``/v1``; the text is the function that carries it out."""

    def lease(asked: Asked[wire.LeaseBody]) -> LeaseReply:
        body = asked.body
        return controller.lease(body.worker_id, body.max_tasks, body.timeout_s, asked.key, asked.cancelled)

    def streamed() -> RefStream:
        if stream is None:
            raise ControlPlaneError("this run streams no refs over the network: its trainer runs beside the controller")
        return stream

    def poll(asked: Asked[wire.PollBody]) -> wire.RefPage:
        return streamed().page(asked.body, asked.cancelled)

    def record(asked: Asked[wire.RecordBody]) -> Recorded:
        body = asked.body
        return controller.record(body.worker_id, body.sample_id, body.generation, body.response_ids)

    def fail(asked: Asked[wire.FailBody]) -> None:
        body = asked.body
        controller.fail(body.worker_id, body.sample_id, body.generation, body.reason)

    return [
        Call("lease", wire.LEASE, lease, idle=lambda reply: not reply.leases and not reply.finished),
        Call("commit", wire.COMMIT, lambda asked: controller.commit(asked.body.refs)),
        Call("record", wire.RECORD, record, keyed=False),
        Call("fail", wire.FAIL, fail),
        Call("heartbeat", wire.HEARTBEAT, lambda asked: controller.heartbeat(asked.body.worker_id), keyed=False),
        Call("leave", wire.LEAVE, lambda asked: controller.leave(asked.body.worker_id, asked.body.reason)),
        Call("ack", wire.ACK, lambda asked: controller.ack(asked.body.slots, asked.body.step)),
        Call("checkpointed", wire.CHECKPOINTED, lambda asked: controller.checkpointed(asked.body.step)),
        Call("refs/poll", wire.POLL, poll, keyed=False, idle=lambda page: not page.refs and not page.ended),
        Call("refs/consumed", wire.CONSUMED, lambda asked: streamed().consume(asked.body)),
    ]


class Api:
    """Answers calls; the controller and the stream run in threads, since they block."""

    def __init__(self, controller: ServedController, stream: RefStream | None, stopping: threading.Event) -> None:
        self._controller = controller
        self._stream = stream
        self._stopping = stopping
        self._answers = Answers()
        self._metrics = Metrics(controller.summary)
        self._waiting = CapacityLimiter(_MAX_WAITING)
        self._working = CapacityLimiter(_MAX_WORKING)
        title = "SpecForge control plane"
        self.app = FastAPI(title=title, version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
        self.app.add_exception_handler(HTTPException, _no_such_call)
        for call in control_calls(controller, stream):
            self._add(call)
        self._add_reading()
        document = json.dumps(describe_application(self.app)).encode()
        self._add_get("/openapi.json", None, lambda: document)

    def wake(self) -> None:
        """Blocked calls look whether they are cancelled."""
        self._controller.wake()
        if self._stream is not None:
            self._stream.wake()

    def _add(self, call: Call[Any, Any]) -> None:
        of_body, of_reply = call.forms

        async def endpoint(request: Request) -> Response:
            answer = await self._answer(call, request)
            self._metrics.answered.labels(call.name, str(answer.status)).inc()
            if answer.status == 503:
                return stopping_response()
            return Response(answer.body, answer.status, media_type="application/json")

        self.app.add_api_route(
            f"/v1/{call.name}",
            endpoint,
            methods=["POST"],
            response_model=None,
            name=call.name,
            openapi_extra=describe_call(of_body, of_reply, keyed=call.keyed),
        )

    def _add_reading(self) -> None:
        self._add_get("/healthz", wire.HEALTH, lambda: wire.HEALTH.write(wire.Health("ok")))
        self._add_get("/v1/summary", wire.SUMMARY, lambda: wire.SUMMARY.write(self._controller.summary()))
        self._add_get("/metrics", None, self._metrics.exposition)

    def _add_get(self, path: str, form: Form[Any] | None, read: Callable[[], bytes]) -> None:
        media_type = Metrics.content_type if path == "/metrics" else "application/json"

        async def endpoint(_: Request) -> Response:
            # The summary takes the controller's lock, which a commit may hold while the disk works.
            data = await to_thread.run_sync(read, limiter=self._working)
            return Response(data, media_type=media_type)

        extra = describe_reading(form, public=path == "/healthz")
        self.app.add_api_route(path, endpoint, response_model=None, name=path.rpartition("/")[2], openapi_extra=extra)

    async def _answer(self, call: Call[Any, Any], request: Request) -> Answer:
        try:
            data = await request.body()
            body = call.forms[0].read(data)
            key = _key(request) if call.keyed else ""

            async def work() -> Answer:
                return await self._carry_out(call, body, key, request)

            return await (self._answers.once(key, (call.name, data), work) if call.keyed else work())
        except ContractError as error:
            return Answer(422, wire.error_to_json(error))

    async def _carry_out(self, call: Call[Any, Any], body: Any, key: str, request: Request) -> Answer:
        gone = threading.Event()
        asked = Asked(body, key, lambda: gone.is_set() or self._stopping.is_set())

        def work() -> Answer:
            result = call.run(asked)
            reply = wire.Done() if result is None else result
            if call.idle is not None and asked.cancelled() and call.idle(reply):
                return Answer(503, b"", final=False)
            return Answer(200, call.forms[1].write(reply))

        watch = None if call.idle is None else asyncio.create_task(_watch(request.receive, gone, self.wake))
        try:
            return await to_thread.run_sync(work, limiter=self._working if watch is None else self._waiting)
        except SpecForgeError as error:
            return Answer(422 if isinstance(error, ContractError) else 409, wire.error_to_json(error))
        except Exception as error:  # noqa: BLE001 - a boundary: the client is told, the server goes on
            _LOG.exception("the control plane failed in %s", call.name)
            return Answer(500, wire.error_to_json(error), final=False)
        finally:
            if watch is not None:
                watch.cancel()


async def _watch(receive: Callable[[], Awaitable[Message]], gone: threading.Event, wake: Callable[[], None]) -> None:
    """A client that hangs up must not be given leases any more."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
    await to_thread.run_sync(wake)


def _key(request: Request) -> str:
    key = request.headers.get(wire.KEY_HEADER, "")
    if not 1 <= len(key) <= wire.MAX_KEY_CHARS:
        raise ContractError(
            f"expected a header {wire.KEY_HEADER} of 1 to {wire.MAX_KEY_CHARS} characters, got {len(key)}; give every "
            "call a key of its own, and the same one when it is repeated"
        )
    return key


def _no_such_call(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(ContractError(f"no such call: {error.detail}"), error.status_code)
    response.headers.update(error.headers or {})
    return response
