"""ControlPlaneServer: a DataFlowController on the network, served from a thread of the controller's process."""

from __future__ import annotations

import socket
import threading

from specforge.control_plane.api import Api, ServedController
from specforge.control_plane.channel.network import RefStream
from specforge.control_plane.gate import Gate, Limits
from specforge.control_plane.http_server import HttpServer, check_token, listen


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
        check_token(token, host if listener is None else str(listener.getsockname()[0]))
        self._stopping = threading.Event()
        self._api = Api(controller, stream, self._stopping)
        gate = Gate(self._api.app, token, Limits(max_body_bytes, body_timeout_s), self._stopping)
        self._http = HttpServer(gate, "control-plane server")
        self._address = (host, port)
        self._listener = listener
        self.url = ""

    def start(self) -> None:
        """Returns when the server answers."""
        self._http.start(listen(*self._address) if self._listener is None else self._listener)
        self.url = self._http.url

    def stop(self) -> None:
        """Idempotent."""
        self._stopping.set()
        self._api.wake()
        self._http.stop()
