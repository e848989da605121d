"""What a run directory says about its run, without touching it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specforge.control_plane.metadata.sql import ledger_summary
from specforge.errors import ConfigError
from specforge.launch.inputs import RESOLVED_FILE
from specforge.launch.lock import LOCK_FILE, is_locked
from specforge.training.checkpoint import Checkpointer, list_checkpoints


def run_status(run_dir: Path) -> dict[str, Any]:
    """Checkpoints, last metrics, ledger counts, and whether a process works in ``run_dir``."""
    missing = [name for name in (RESOLVED_FILE, LOCK_FILE) if not (run_dir / name).exists()]
    if missing:
        raise ConfigError(
            f"{run_dir} is not a run directory: it has no {missing[0]}; give the directory that run_dir names"
        )
    newest = Checkpointer(run_dir / "checkpoints").newest_state()
    ledger = run_dir / "ledger.sqlite"
    return {
        "run_dir": str(run_dir),
        "running": is_locked(run_dir),
        "checkpoints": [path.name for path in list_checkpoints(run_dir / "checkpoints")],
        "position": None if newest is None else asdict(newest.position),
        "metrics": last_metrics(run_dir / "metrics.jsonl"),
        "ledger": ledger_summary(ledger) if ledger.exists() else None,
    }


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file."""
    if not path.exists():
        return None
    for line in reversed(path.read_bytes().splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a torn last line
        if isinstance(row, dict):
            return row
    return None
