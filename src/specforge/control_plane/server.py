"""ControlPlaneServer: a DataFlowController on the network, served from a thread of the controller's process."""

from __future__ import annotations

import ipaddress
import socket
import threading

import uvicorn

from specforge.control_plane.api import Api, ServedController
from specforge.control_plane.channel.network import RefStream
from specforge.control_plane.gate import BoundedHead, Gate, Limits
from specforge.errors import ConfigError, ControlPlaneError


class ControlPlaneServer:
    """Serves ``controller`` at ``url`` between ``start`` and ``stop``.

    Every request but ``/healthz`` carries ``Authorization: Bearer <token>``; ``token`` None asks nobody, on loopback
    only. ``port`` 0 takes any free one; ``listener`` is a socket that listens already (and that somebody else may
    keep open for a successor) and takes the place of both. ``stream`` is the trainer's, for one in another process.
    Bodies of more than ``max_body_bytes``, or not there after ``body_timeout_s``, are refused. Stopping ends blocked
    long polls at once; it does not touch the run.
    """

    def __init__(
        self,
        controller: ServedController,
        token: str | None,
        host: str = "127.0.0.1",
        port: int = 0,
        stream: RefStream | None = None,
        listener: socket.socket | None = None,
        max_body_bytes: int = 16 << 20,
        body_timeout_s: float = 30.0,
    ) -> None:
        listening_at = host if listener is None else str(listener.getsockname()[0])
        if not token and (token is not None or not _is_loopback(listening_at)):
            raise ConfigError(
                f"the control-plane server needs a token, got {token!r} for {listening_at}; generate a random secret"
            )
        self._stopping = threading.Event()
        self._api = Api(controller, stream, self._stopping)
        self._gate = Gate(self._api.app, token, Limits(max_body_bytes, body_timeout_s), self._stopping)
        self._address = (host, port)
        self._listener = listener
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.url = ""

    def start(self) -> None:
        """Returns when the server answers."""
        listener = listen(*self._address) if self._listener is None else self._listener
        self.url = url_of(listener)
        config = uvicorn.Config(
            self._gate,
            loop="asyncio",
            http=BoundedHead,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
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
        self._api.wake()
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


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. An address that cannot be listened on is a ``ConfigError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"the control-plane server cannot listen on {host} port {port} ({error.strerror}); "
            "choose another address, or port 0 for any free one"
        ) from error


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
