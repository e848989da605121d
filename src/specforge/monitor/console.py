"""Progress for a person: bars with rate and time left on a terminal, a line every few seconds elsewhere.

Everything goes to standard error, so that the standard output of a command is its result alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_INTERVAL_S = 5.0
"""Seconds between two lines of a bar that is not on a terminal."""


class Bar(Protocol):
    """The progress of one thing with a known number of units."""

    def update_to(self, done: int, note: str = "") -> None:
        """``done`` units are done in all; ``note`` (such as the loss) is shown beside them until the next one."""
        ...


@contextmanager
def progress(
    description: str,
    total: int,
    unit: str = "",
    done: int = 0,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Bar]:
    """A bar of ``total`` units (``unit`` names them) of which ``done`` are done already, for a ``with`` block."""
    console = Console(stderr=True) if console is None else console
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(description, total=total, completed=done, note="")
            yield _TerminalBar(bars, task)
    else:
        lines = _LineBar(f"{description}:", (done, total), unit, console, clock)
        yield lines
        lines.finish()


class ConsoleMonitor:
    """Shows the steps of a training run as one bar, from now until :meth:`close`."""

    def __init__(
        self, total_steps: int, first_step: int = 0, description: str = "training", console: Console | None = None
    ) -> None:
        """``first_step`` steps were done before (a resumed run)."""
        self._open = ExitStack()
        self._bar = self._open.enter_context(progress(description, total_steps, "steps", first_step, console))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Moves the bar to ``step`` and shows the first four scalars."""
        self._bar.update_to(step, "  ".join(f"{name} {value:.4g}" for name, value in list(scalars.items())[:4]))

    def event(self, name: str, **fields: str | float | bool | None) -> None:
        """Events are for the log."""

    def close(self) -> None:
        self._open.close()


class _TerminalBar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def update_to(self, done: int, note: str = "") -> None:
        self._bars.update(self._task, completed=done, note=note)


class _LineBar:
    """Prints a line when enough time has passed since the last one; never from a thread of its own."""

    def __init__(
        self, description: str, span: tuple[int, int], unit: str, console: Console, clock: Callable[[], float]
    ) -> None:
        self._description, self._unit = description, unit
        self._first, self._total = span
        self._done = self._first
        self._console, self._clock = console, clock
        self._started = self._printed = clock()
        self._note = ""

    def update_to(self, done: int, note: str = "") -> None:
        self._done = done
        self._note = note or self._note
        if self._clock() - self._printed >= LINE_INTERVAL_S:
            self._printed = self._clock()
            self._print(self._remaining())

    def finish(self) -> None:
        self._print(f" in {self._clock() - self._started:.0f} s")

    def _remaining(self) -> str:
        rate = (self._done - self._first) / max(self._clock() - self._started, 1e-9)
        if rate <= 0:
            return ""
        return f" {rate:.3g}/s, {max(0, self._total - self._done) / rate:.0f} s left"

    def _print(self, timing: str) -> None:
        parts = (self._description, f"{self._done}/{self._total}", self._unit, timing, f" {self._note}")
        line = " ".join(part for part in parts if part.strip())
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s", style="progress.data.speed")
