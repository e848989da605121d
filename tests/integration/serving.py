"""Capture servers as a user starts them: ``specforge serve-target`` in a process of its own."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import runs


@dataclass
class ServedTarget:
    """One server, started again on the port that it had first."""

    directory: Path
    target: Path
    options: tuple[str, ...] = ()
    port: int = 0
    num_starts: int = 0
    command: runs.Command | None = None

    def start(self) -> str:
        """Its address, once it answers."""
        self.num_starts += 1
        ready = self.directory / f"ready-{self.num_starts}"
        target = ("--target", str(self.target), "--dtype", "float32", "--device", "cpu")
        place = ("--port", str(self.port), "--ready-file", str(ready))
        where = self.directory / f"server-{self.num_starts}"
        self.command = command = runs.specforge(where, "serve-target", *target, *place, *self.options)

        def answers() -> bool:
            assert command.process.poll() is None, command.stderr.read_text()
            return ready.exists()

        runs.wait_until(answers, "the server answers")
        url = ready.read_text().strip()
        self.port = int(url.rpartition(":")[2])
        return url

    def kill(self) -> None:
        assert self.command is not None
        self.command.process.send_signal(signal.SIGKILL)
        self.command.process.wait()

    def stop(self) -> None:
        """In order; it must leave by itself."""
        if self.command is None or self.command.process.poll() is not None:
            return
        self.command.process.terminate()
        try:
            assert self.command.wait() == 0, self.command.stderr.read_text()
        finally:
            self.command.process.kill()
