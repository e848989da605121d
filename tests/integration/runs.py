"""Small training runs as a user starts them: a command line in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from specforge.testing.tiny_target import generated_text

DEADLINE_S = 120.0


def write_run(directory: Path, target: Path, **overrides: Any) -> Path:
    """A run.yaml of 24 samples, 2 epochs, 12 steps; ``overrides`` with dots as double underscores."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = generated_text(24 * 8, seed=1).splitlines()
    data = directory / "texts.jsonl"
    texts = ["\n".join(lines[start : start + 8]) for start in range(0, 24 * 8, 8)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config: dict[str, Any] = {
        "run_dir": str(directory / "run"),
        "target": {"path": str(target), "dtype": "float32", "device": "cpu"},
        "data": {"path": str(data), "max_length": 64},
        "algorithm": {"name": "eagle3", "ttt_steps": 3},
        "training": {"num_epochs": 2, "global_batch_size": 4, "lr": 1e-3, "checkpoint_every": 2, "device": "cpu"},
    }
    for key, value in overrides.items():
        *sections, last = key.split("__")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Command:
    """A running command with its output in files."""

    arguments: list[str]
    directory: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    @property
    def stdout(self) -> Path:
        return self.directory / "stdout.txt"

    @property
    def stderr(self) -> Path:
        return self.directory / "stderr.txt"

    def wait(self) -> int:
        return self.process.wait(timeout=DEADLINE_S)

    def succeed(self) -> dict[str, Any]:
        """Wait for success; what it printed as JSON."""
        code = self.wait()
        assert code == 0, self.stderr.read_text()
        return json.loads(self.stdout.read_text())

    def family(self) -> dict[str, psutil.Process]:
        """The processes of the command by role: ``parent``, and the children's names as they are there."""
        parent = psutil.Process(self.process.pid)
        named = {"parent": parent}
        for child in parent.children():
            line = child.cmdline()
            if "--name" in line:
                named[line[line.index("--name") + 1]] = child
        return named


def specforge(directory: Path, *arguments: str) -> Command:
    return Command(["-m", "specforge", *arguments], directory)


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``; fails after a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"never happened: {what}")


def num_steps(run_dir: Path) -> int:
    """Optimizer steps that the metrics of a run show."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b'"step":') if path.exists() else 0


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def busy_share(process: psutil.Process, seconds: float) -> float:
    """Share of a core that ``process`` used during the next ``seconds``."""
    before, started = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / (time.monotonic() - started)
