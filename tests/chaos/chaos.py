"""A run whose processes are killed at random, and what must be true of it afterwards."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import runs

from specforge.config.load import load_run_config
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.launch.plan import run_id
from specforge.launch.status import last_metrics

VICTIMS = {"train": 1, "capture-0": 1, "capture-1": 1}
"""Who is killed, and how often relative to the others."""
DEADLINE_S = 900.0
BATCH = 4
NUM_SAMPLES = 24
LAST_KILL = 0.85
"""No kill is planned for later than this share of the run."""
LONGEST_PAUSE_S = 1.0


def write_run(directory: Path, target: Path, *, num_epochs: int, **overrides: Any) -> Path:
    """A disaggregated run with two capture workers that may die as often as they like."""
    options: dict[str, Any] = {
        "topology": "disaggregated",
        "training__num_epochs": num_epochs,
        "training__checkpoint_every": 5,
        "launch__num_capture_workers": 2,
        # What is kept for later epochs would leave the capture workers nothing to do.
        "data_plane__retain_bytes": 0,
        "launch__restarts__max_restarts": 10_000,
        "launch__restarts__first_backoff_s": 0.05,
        "launch__restarts__longest_backoff_s": 0.2,
    }
    return runs.write_run(directory, target, **(options | overrides))


@dataclass
class Chaos:
    """Drives a run to its end, killing on the way.

    The moments are random in the progress of the run, not in time, so that a fast machine does not finish first; every
    other kill follows the one before it at once, and hits what has just been started. ``kills`` counts them by victim;
    ``steps_at_kills`` says which optimizer step had last been logged at each.
    """

    run_yaml: Path
    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    steps_at_kills: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def run(self, num_kills: int, num_steps: int, half_way: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """``num_kills`` SIGKILLs, ``half_way`` once in between; then the run is left alone. What it printed."""
        command = self._start()
        pids: set[int] = set()
        due = sorted(self._random.randrange(int(LAST_KILL * num_steps)) for _ in range((num_kills + 1) // 2))
        for number in range(num_kills):
            if number == num_kills // 2:
                half_way()
            if number % 2 == 0:
                self._wait(command, due[number // 2])
            time.sleep(LONGEST_PAUSE_S * self._random.random())
            victim = self._random.choices(list(VICTIMS), list(VICTIMS.values()))[0]
            family = runs.wait_until(lambda name=victim: self._family(command, name), f"{victim} is there")
            pids |= {process.pid for process in family.values()}
            runs.kill(family[victim])
            self.kills[victim] += 1
            self.steps_at_kills.append(self._last_step())
        command.process.wait(DEADLINE_S)
        result = command.succeed()
        assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        return result

    def _wait(self, command: runs.Command, step: int) -> None:
        """Until the run has come to ``step``. Fails when it is over."""

        def is_there() -> bool:
            if command.process.poll() is not None:
                sys.stderr.write(command.stderr.read_text())
                raise AssertionError(f"the run ended with {command.process.returncode} after {dict(self.kills)}")
            return self._last_step() >= step

        runs.wait_until(is_there, f"step {step}")

    def _last_step(self) -> int:
        metrics = last_metrics(self.run_yaml.parent / "run" / "metrics.jsonl")
        return 0 if metrics is None else metrics.get("step", 0)

    @staticmethod
    def _family(command: runs.Command, victim: str) -> dict[str, psutil.Process] | None:
        try:
            family = command.family()
        except psutil.NoSuchProcess:
            return None  # it is being replaced
        return family if victim in family else None

    def _start(self) -> runs.Command:
        return runs.specforge(self.run_yaml.parent / "output", "train", "-c", str(self.run_yaml), "--json")

    def _pause(self, command: runs.Command) -> None:
        """A random while. Fails when the run is over."""
        time.sleep(self._random.choice(self.longest_pauses_s) * self._random.random())
        if command.process.poll() is not None:
            sys.stderr.write(command.stderr.read_text())
            raise AssertionError(f"the run ended with {command.process.returncode} after {dict(self.kills)}")


def check_account(run_yaml: Path, num_epochs: int, ledger: str | Path | None = None, **options: Any) -> None:
    """By the ledger's own account every slot was trained once, in its step, and nothing is in quarantine."""
    config = load_run_config(run_yaml)
    store = SqlMetadataStore(ledger or config.run_dir / "ledger.sqlite", read_only=True, **options)
    try:
        counts = store.counts()
        total = NUM_SAMPLES * num_epochs
        assert [store.slot_step(slot) for slot in range(total)] == [slot // BATCH + 1 for slot in range(total)]
        assert (counts.num_slots_trained, counts.num_slots_durable) == (total, total)
        assert counts.num_leased == counts.num_committed == counts.num_quarantined == counts.num_slots_dispatched == 0
        assert store.quarantines() == []
    finally:
        store.close()


def check_nothing_left(run_yaml: Path) -> None:
    """No shared memory of the run, no temporary file in its directory."""
    config = load_run_config(run_yaml)
    assert [path.name for path in Path("/dev/shm").iterdir() if run_id(config) in path.name] == []
    leftovers = [path for path in config.run_dir.rglob("*") if ".partial" in path.name or path.name.endswith(".tmp")]
    assert leftovers == []
