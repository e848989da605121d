"""TargetServer: a frozen target behind HTTP, served from threads of this process."""

from __future__ import annotations

import math
import threading

from specforge.contracts.capture_wire import MAX_BODY_BYTES
from specforge.control_plane.gate import Gate, Limits
from specforge.control_plane.http_server import HttpServer, check_token, listen
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.serving.api import Api, refused
from specforge.inference.serving.service import CaptureService
from specforge.inference.serving.settings import ServingSettings

NAME = "capture server"


class TargetServer:
    """Serves ``engine`` at ``url`` between ``start`` and ``stop``.

    Every request but ``/healthz`` carries ``Authorization: Bearer <token>``; ``token`` None asks nobody, on loopback
    only. ``port`` 0 takes any free one. ``ended`` is set when the engine is lost for good, the reason in ``failed``.
    """

    def __init__(
        self,
        engine: HFTargetEngine,
        settings: ServingSettings,
        token: str | None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        check_token(token, host, NAME)
        self.engine = engine
        self.ended = threading.Event()
        self._stopping = threading.Event()
        self._address = (host, port)
        self._service = CaptureService(engine, settings, self._lose)
        api = Api(self._service, self._stopping, settings.answer_timeout_s)
        limits = Limits(MAX_BODY_BYTES, settings.body_timeout_s)
        self._gate = Gate(api.app, token, limits, self._stopping, NAME, refused)
        self._http = HttpServer(self._gate, NAME, graceful_s=math.ceil(settings.grace_s))

    @property
    def url(self) -> str:
        """Empty before the start."""
        return self._http.url

    @property
    def failed(self) -> Exception | None:
        return self._service.failed

    def start(self) -> None:
        """Returns when the server answers."""
        listener = listen(*self._address, NAME)
        self._service.start()
        self._http.start(listener)

    def stop(self) -> bool:
        """New requests and those that wait are refused, what is done is answered. Features that others may still read
        stay. Idempotent. False: the engine did not come to an end in time, and its thread goes on.
        """
        self._stopping.set()
        has_ended = self._service.stop()
        self._http.stop()
        return has_ended

    def _lose(self) -> None:
        """Even the health is answered with 503 from now on."""
        self._stopping.set()
        self.ended.set()
