"""Monitor: what a run calls to tell what it is doing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Monitor(Protocol):
    """A sink of scalars and events. Called by one thread; nothing may be called after ``close``."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars of optimizer step ``step`` (completed steps, so the first is 1). A resumed run may repeat a step."""
        ...

    def event(self, name: str, **fields: str | float | bool | None) -> None:
        """Something happened once: a checkpoint was written, a phase began."""
        ...

    def close(self) -> None:
        """Write what is left and let go. Idempotent."""
        ...
