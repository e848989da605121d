"""A real Mooncake master and owner of memory for tests: on free ports of loopback, with timeouts of a few seconds."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from specforge.config.launch import RestartOptions
from specforge.data_plane.config import MooncakeConfig
from specforge.data_plane.mooncake import MooncakeSettings, load_library
from specforge.errors import UserError
from specforge.launch.mooncake import MooncakeService, ServiceTimes

TIMES = ServiceTimes(client_ttl_s=2, put_discard_s=2, put_release_s=3)
RESTARTS = RestartOptions(max_restarts=5, first_backoff_s=0.05, longest_backoff_s=0.5, healthy_after_s=60.0)


def why_not() -> str | None:
    """Why Mooncake cannot run here; ``None`` where it can."""
    try:
        load_library()
    except UserError as error:
        return str(error)
    return None


@contextlib.contextmanager
def temporary_service(
    capacity_bytes: int = 64 * 2**20, *, restarts: RestartOptions = RESTARTS, times: ServiceTimes = TIMES
) -> Iterator[MooncakeService]:
    """A running service whose logs go with it. The test is skipped where Mooncake cannot run."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    given_up: list[str] = []
    with tempfile.TemporaryDirectory(prefix="specforge-mooncake-") as directory:
        service = MooncakeService(
            MooncakeConfig(), capacity_bytes, Path(directory), given_up.append, restarts=restarts, times=times
        )
        service.start()
        try:
            yield service
        finally:
            service.stop()
    assert given_up == []


def settings_of(service: MooncakeService, run_id: str, **changes: object) -> MooncakeSettings:
    """How a store of ``run_id`` reaches ``service``."""
    chosen: dict[str, object] = {"buffer_bytes": 4 * 2**20, "reconnect_s": 10.0} | changes
    addresses = service.addresses
    return MooncakeSettings(run_id, addresses.master, addresses.admin, **chosen)  # type: ignore[arg-type]
