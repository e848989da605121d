"""ControlPlaneServer: a DataFlowController on the network, served from a thread of the controller's process."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specforge.contracts import codec
from specforge.contracts.refs import SampleRef
from specforge.control_plane import wire
from specforge.control_plane.base import LeaseReply
from specforge.control_plane.controller import DataFlowController
from specforge.errors import ConfigError, ContractError, ControlPlaneError, SpecForgeError, UserError

_LOG = logging.getLogger(__name__)
_MAX_POLLS = 1024
"""Long polls at one time; each blocks one thread of the server."""


class ControlPlaneServer:
    """Serves ``controller`` at ``url`` between ``start`` and ``stop``.

    Every request but ``/healthz`` carries ``Authorization: Bearer <token>``. ``port`` 0 takes any free one. Bodies
    of more than ``max_body_bytes`` are refused. Stopping ends blocked long polls at once; it does not touch the run.
    """

    def __init__(
        self,
        controller: DataFlowController,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        max_body_bytes: int = 16 << 20,
    ) -> None:
        if not token:
            raise ConfigError("the control-plane server needs a token, got an empty one; generate a random secret")
        self._controller = controller
        self._address = (host, port)
        self._stopping = threading.Event()
        self._app = _Gate(_application(controller, self._stopping), token, max_body_bytes, self._stopping)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.url = ""

    def start(self) -> None:
        """Returns when the server answers."""
        host, port = self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=512)
        except OSError as error:
            raise ConfigError(
                f"the control-plane server cannot listen on {host} port {port} ({error.strerror}); "
                "choose another address, or port 0 for any free one"
            ) from error
        port = listener.getsockname()[1]
        self.url = f"http://[{host}]:{port}" if family == socket.AF_INET6 else f"http://{host}:{port}"
        config = uvicorn.Config(
            self._app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=120,
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._run, args=(self._server, listener), name="control-plane-server")
        self._thread.daemon = True
        self._thread.start()
        self._server.answering.wait()
        if not self._server.started:
            self.stop()
            raise ControlPlaneError(f"the control-plane server at {self.url} did not start")

    def stop(self) -> None:
        """Idempotent."""
        self._stopping.set()
        self._controller.wake()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
            self._server = self._thread = None

    @staticmethod
    def _run(server: _Server, listener: socket.socket) -> None:
        try:
            server.run(sockets=[listener])
        finally:
            listener.close()
            server.answering.set()


class _Server(uvicorn.Server):
    """Says when it has started (or never will)."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()


class _Gate:
    """Refuses, before anything is parsed, requests without the token and bodies over the limit.

    Once the server stops, everything is refused and connections are closed: a client comes back to a successor.
    """

    def __init__(self, app: ASGIApp, token: str, max_body_bytes: int, stopping: threading.Event) -> None:
        self._stopping = stopping
        self._app = app
        self._expected = f"Bearer {token}".encode()
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if self._stopping.is_set():
            await _unavailable()(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if scope["path"] != "/healthz" and not hmac.compare_digest(given, self._expected):
            error = ControlPlaneError("the token of the control-plane server is missing or wrong")
            await JSONResponse(wire.error_to_json(error), 401)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            await JSONResponse(wire.error_to_json(self._too_large()), 413)(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, str(self._too_large()))
            return message

        return limited

    def _too_large(self) -> ContractError:
        return ContractError(f"the body of a request is larger than {self._max_body_bytes} bytes; send smaller batches")


def _unavailable() -> JSONResponse:
    error = ControlPlaneError("the control-plane server is stopping")
    return JSONResponse(wire.error_to_json(error), 503, {"Connection": "close"})


def _application(controller: DataFlowController, stopping: threading.Event) -> FastAPI:
    app = FastAPI(title="SpecForge control plane", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_lease(app, controller, stopping)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/summary")
    def summary() -> dict[str, int | str | None]:
        return controller.summary()

    @app.post("/v1/commit")
    def commit(body: wire.CommitBody) -> dict[str, Any]:
        refs = [codec.from_json(SampleRef, ref) for ref in body.refs]
        return {"accepted": list(controller.commit(refs).accepted)}

    @app.post("/v1/fail")
    def fail(body: wire.FailBody) -> dict[str, str]:
        controller.fail(body.worker_id, body.sample_id, body.generation, body.reason)
        return {}

    @app.post("/v1/heartbeat")
    def heartbeat(body: wire.HeartbeatBody) -> dict[str, str]:
        controller.heartbeat(body.worker_id)
        return {}

    @app.post("/v1/abandon")
    def abandon(body: wire.AbandonBody) -> dict[str, str]:
        controller.abandon(body.worker_id, body.reason)
        return {}

    return app


def _add_lease(app: FastAPI, controller: DataFlowController, stopping: threading.Event) -> None:
    polls = CapacityLimiter(_MAX_POLLS)
    last_leases: dict[str, tuple[str, dict[str, Any]]] = {}

    @app.post("/v1/lease")
    async def lease(body: wire.LeaseBody, request: Request) -> Any:
        call_id, answered = last_leases.get(body.worker_id, ("", {}))
        if call_id == body.call_id:
            return answered
        gone = threading.Event()
        watch = asyncio.create_task(_watch(request.receive, gone, controller.wake))

        def wait_for_leases() -> LeaseReply:
            return controller.lease(
                body.worker_id, body.max_tasks, body.timeout_s, lambda: gone.is_set() or stopping.is_set()
            )

        try:
            leased = await to_thread.run_sync(wait_for_leases, limiter=polls)
        finally:
            watch.cancel()
        if stopping.is_set() and not leased.leases and not leased.finished:
            return _unavailable()
        reply = wire.lease_reply_to_json(leased)
        last_leases[body.worker_id] = (body.call_id, reply)
        return reply


async def _watch(receive: Callable[[], Awaitable[Message]], gone: threading.Event, wake: Callable[[], None]) -> None:
    """A client that hangs up must not be given leases any more."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
    await to_thread.run_sync(wake)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(SpecForgeError)
    def ours(_: Request, error: SpecForgeError) -> JSONResponse:
        status = 422 if isinstance(error, ContractError) else 400 if isinstance(error, UserError) else 409
        return JSONResponse(wire.error_to_json(error), status)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse(wire.error_to_json(ContractError(f"{where}: {first['msg']}")), 422)

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(wire.error_to_json(ContractError(str(error.detail))), error.status_code)

    @app.exception_handler(Exception)
    def unexpected(_: Request, error: Exception) -> JSONResponse:
        _LOG.error("the control plane failed", exc_info=error)
        return JSONResponse(wire.error_to_json(error), 500)
