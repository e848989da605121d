"""What a run directory says about its run, without touching it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specforge.launch.ledger import check_run_dir, run_ledger
from specforge.launch.lock import is_locked
from specforge.training.checkpoint import best_state, list_checkpoints, newest_state


def run_status(run_dir: Path) -> dict[str, Any]:
    """Checkpoints, last metrics, ledger counts, and whether a process works in ``run_dir``."""
    check_run_dir(run_dir)
    newest, best = (find(run_dir / "checkpoints") for find in (newest_state, best_state))
    with run_ledger(run_dir, read_only=True) as store:
        counts = None if store is None else asdict(store.counts())
    return {
        "run_dir": str(run_dir),
        "running": is_locked(run_dir),
        "checkpoints": [path.name for path in list_checkpoints(run_dir / "checkpoints")],
        "best": None if best is None else best.path.name,
        "position": None if newest is None else asdict(newest.position),
        "metrics": last_metrics(run_dir / "metrics.jsonl"),
        "ledger": counts,
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
