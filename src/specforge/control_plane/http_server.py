"""HttpServer: an ASGI application on a socket, served from a thread of this process."""

from __future__ import annotations

import ipaddress
import socket
import threading

import uvicorn
from starlette.types import ASGIApp

from specforge.control_plane.gate import BoundedHead
from specforge.errors import ConfigError, ControlPlaneError


class HttpServer:
    """Serves ``app`` at ``url`` between ``start`` and ``stop``. ``name`` is its name in sentences and of its thread.

    ``stop`` lets answers that are on their way take up to ``graceful_s``.
    """

    def __init__(self, app: ASGIApp, name: str, graceful_s: int = 2) -> None:
        self._app = app
        self._name = name
        self._graceful_s = graceful_s
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.url = ""

    def start(self, listener: socket.socket) -> None:
        """Returns when the server answers. It closes ``listener`` in the end."""
        self.url = url_of(listener)
        config = uvicorn.Config(
            self._app,
            loop="asyncio",
            http=BoundedHead,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=120,
            timeout_graceful_shutdown=self._graceful_s,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._run, args=(self._server, listener), name=self._name, daemon=True)
        self._thread.start()
        self._server.answering.wait()
        if not self._server.started:
            self.stop()
            raise ControlPlaneError(f"the {self._name} at {self.url} did not start")

    def stop(self) -> None:
        """Idempotent."""
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


def listen(host: str, port: int, name: str = "control-plane server") -> socket.socket:
    """A listening socket; port 0 takes any free one. An address that cannot be listened on is a ``ConfigError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(
            f"the {name} cannot listen on {host} port {port} ({error.strerror}); "
            "choose another address, or port 0 for any free one"
        ) from error


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


def check_token(token: str | None, host: str, name: str = "control-plane server") -> None:
    """Nobody is asked for a token on loopback alone, and an empty one is none: else a ``ConfigError``."""
    if not token and (token is not None or not _is_loopback(host)):
        raise ConfigError(f"the {name} needs a token, got {token!r} for {host}; generate a random secret")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
