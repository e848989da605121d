"""Who is alive: a process named by PID namespace, pid and start time, so that a reused pid is another process.

Where the system has no ``/proc`` (macOS), the pid alone names a process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """``namespace`` is the inode of the PID namespace, ``start_ticks`` the start time in clock ticks since boot."""

    namespace: int
    pid: int
    start_ticks: int

    @classmethod
    def current(cls) -> ProcessIdentity:
        status = _state_and_start(os.getpid())
        assert status is not None
        return cls(_namespace(), os.getpid(), status[1])

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity | None:
        """The inverse of ``str``; ``None`` for any other text."""
        parts = text.split("-")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            return None
        return cls(*(int(part) for part in parts))

    def __str__(self) -> str:
        return f"{self.namespace}-{self.pid}-{self.start_ticks}"

    def is_here(self) -> bool:
        """Of this process's PID namespace: elsewhere it can neither be judged nor work with this one."""
        return self.namespace == _namespace()

    def is_dead(self) -> bool:
        """Certainly dead. A process of another PID namespace cannot be judged from here and counts as alive."""
        if not self.is_here():
            return False
        status = _state_and_start(self.pid)
        return status is None or status[1] != self.start_ticks or status[0] in "ZX"


def _namespace() -> int:
    file = PROC / "self" / "ns" / "pid"
    return file.stat().st_ino if file.exists() else 0


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """State letter and start time of ``pid``; a zombie (Z) is dead, only its parent has not noticed."""
    if not (PROC / "self").exists():
        return _answers_to_signals(pid)
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name is in parentheses and may hold anything; field 3 follows the last one, field 22 is the start.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _answers_to_signals(pid: int) -> tuple[str, int] | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is there, and somebody else's
    return "R", 0
