"""``specforge serve-target``: the frozen target as a capture server, until a signal."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specforge.control_plane.http_server import check_token
from specforge.errors import EngineError
from specforge.inference.config import TargetConfig
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.serving.server import NAME, TargetServer
from specforge.inference.serving.settings import ServingSettings
from specforge.launch.group import leave_at_once
from specforge.launch.inputs import resolve_device, resolve_dtype
from specforge.launch.runtime import stop_on_signals

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """``threads`` that the target computes with on a CPU. ``port`` 0: any free one. ``token`` None: on loopback only,
    everybody on this host may ask.
    """

    target: TargetConfig
    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    threads: int = 1
    settings: ServingSettings = field(default_factory=ServingSettings)


def open_server(options: ServeOptions) -> TargetServer:
    """The server with its target loaded, to be started. Raises a :class:`UserError` for what cannot be served."""
    check_token(options.token, options.host, NAME)
    torch.set_num_threads(options.threads)
    config = options.target
    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    engine = HFTargetEngine(config.path, dtype, device, config.trust_remote_code)
    return TargetServer(engine, options.settings, options.token, options.host, options.port)


def serve(options: ServeOptions, announce: Callable[[dict[str, Any]], None], ready_file: Path | None) -> None:
    """Serve until SIGINT or SIGTERM. ``announce`` is told what is served, when it answers; ``ready_file`` then holds
    the address.
    """
    server = open_server(options)
    with stop_on_signals(server.ended.set):
        server.start()
        try:
            announce(described(server))
            if ready_file is not None:
                _write(ready_file, server.url)
            server.ended.wait()
        finally:
            has_ended = server.stop()
    if server.failed is not None:
        raise EngineError(f"the target engine is lost: {server.failed}") from server.failed
    if not has_ended:
        _LOG.warning("the running forward was cut off")
        leave_at_once(0)


def described(server: TargetServer) -> dict[str, Any]:
    engine = server.engine
    return {
        "url": server.url,
        "target": engine.info.path,
        "target_revision": engine.info.revision,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
    }


def _write(file: Path, text: str) -> None:
    """Whoever sees the file sees all of it."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(f"{text}\n")
    partial.replace(file)
