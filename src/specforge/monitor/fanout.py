"""One monitor that is several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specforge.monitor.base import Monitor


class FanoutMonitor:
    """Passes every call on to each monitor in order; ``close`` closes all of them even if one fails."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self._monitors = tuple(monitors)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for monitor in self._monitors:
            monitor.log(step, scalars)

    def event(self, name: str, **fields: str | float | bool | None) -> None:
        for monitor in self._monitors:
            monitor.event(name, **fields)

    def close(self) -> None:
        errors: list[Exception] = []
        for monitor in self._monitors:
            try:
                monitor.close()
            except Exception as error:  # noqa: BLE001 - all are closed first, all errors are raised below
                errors.append(error)
        if errors:
            raise ExceptionGroup("monitors could not be closed", errors)
