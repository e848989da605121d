"""A metrics log: one JSON object a line, appended, to be followed while it grows; a killed run loses one line at most.

Scalars are ``{"time_s": unix time, "step": n, "loss": ...}``, events ``{"time_s": ..., "event": name, ...}``. A scalar
that is not finite is written as ``null``, as JSON has no other word for it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonlMonitor:
    """Appends to ``path``; a last line that a killed process left torn is cut off first."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "r+b")
        self._clock = clock
        _cut_torn_line(self._file)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._append({"step": step, **scalars})

    def event(self, name: str, **fields: str | float | bool | None) -> None:
        self._append({"event": name, **fields})

    def close(self) -> None:
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        record = {"time_s": round(self._clock(), 3), **record}
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._file.write(json.dumps(plain, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        self._file.flush()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log in the order they were written, without a torn last line. A missing file has none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def read_scalars(path: Path) -> list[dict[str, Any]]:
    """One record a step, ascending; of a step that a resumed run repeated, the last one."""
    by_step = {record["step"]: record for record in read_records(path) if "step" in record}
    return [by_step[step] for step in sorted(by_step)]


def _cut_torn_line(file: Any) -> None:
    """Leave ``file`` at its end, right after a line break. Reads backwards in blocks."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 4096)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            position = start + found + 1
            break
        position = start
    file.seek(position)
    file.truncate()
