"""The ledger of a run directory, from outside of the run: what it says, and the one thing that a user changes in it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specforge.config.load import load_run_config
from specforge.config.run import RunConfig
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.errors import ConfigError
from specforge.launch.inputs import RESOLVED_FILE
from specforge.launch.lock import LOCK_FILE, run_lock
from specforge.launch.plan import ledger_kind, ledger_path, ledger_place
from specforge.training.checkpoint import newest_state


def check_run_dir(run_dir: Path) -> None:
    """Refuse what is no directory of a run."""
    missing = [name for name in (RESOLVED_FILE, LOCK_FILE) if not (run_dir / name).exists()]
    if missing:
        raise ConfigError(
            f"{run_dir} is not a run directory: it has no {missing[0]}; give the directory that run_dir names"
        )


@contextlib.contextmanager
def run_ledger(run_dir: Path, *, read_only: bool) -> Iterator[SqlMetadataStore | None]:
    """The ledger of the run in ``run_dir``; ``None`` where the run keeps none that outlives it."""
    config = load_run_config(run_dir / RESOLVED_FILE, [])
    store = _open(config, read_only)
    try:
        yield store
    finally:
        if store is not None:
            store.close()


def list_quarantined(run_dir: Path) -> list[dict[str, Any]]:
    """The prompts that are set aside now, with why. Of a run without a ledger: as its newest checkpoint has it."""
    check_run_dir(run_dir)
    with run_ledger(run_dir, read_only=True) as store:
        if store is None:
            newest = newest_state(run_dir / "checkpoints")
            found = [] if newest is None else newest.ledger.get("quarantines", [])
            return [{"sample_id": None, **item} for item in found if item["to_slot"] is None]
        open_ones = [item for item in store.quarantines() if item.to_slot is None]
        tasks = store.tasks_at([item.index for item in open_ones])
        records = [store.sample(item.index) for item in open_ones]
        return [
            {
                "sample_id": task.sample_id,
                **asdict(item),
                "num_failures": record.num_failures,
                "num_crashes": record.num_crashes,
                "num_tokens": task.num_tokens,
            }
            for item, task, record in zip(open_ones, tasks, records, strict=True)
        ]


def retry_quarantined(run_dir: Path, sample_ids: Collection[str] | None) -> list[str]:
    """Give set-aside prompts (``None``: all of them) another chance when the run is resumed; their sample ids.

    Slots that the newest checkpoint has passed stay skipped. The run must not be working.
    """
    check_run_dir(run_dir)
    with run_lock(run_dir), run_ledger(run_dir, read_only=False) as store:
        if store is None:
            raise ConfigError(
                f"the run in {run_dir} keeps no ledger, so nothing can be retried in it; start it with "
                "control_plane.ledger.kind = sqlite"
            )
        by_id = {
            task.sample_id: task.index
            for task in store.tasks_at([item.index for item in store.quarantines() if item.to_slot is None])
        }
        unknown = sorted(set(sample_ids or ()) - set(by_id))
        if unknown:
            raise ConfigError(
                f"sample {unknown[0]!r} is not set aside in {run_dir}; "
                f"see specforge quarantine {run_dir} for those that are"
            )
        chosen = list(by_id) if sample_ids is None else [name for name in by_id if name in sample_ids]
        passed = _passed_slots(run_dir)

        def work() -> None:
            for name in chosen:
                store.retry(by_id[name], passed)

        store.transact(work)
        return chosen


def _open(config: RunConfig, read_only: bool) -> SqlMetadataStore | None:
    kind = ledger_kind(config)
    if kind == "postgres":
        place = ledger_place(config)
        return SqlMetadataStore(str(place["ledger_url"]), name=str(place["ledger_name"]), read_only=read_only)
    path = ledger_path(config)
    return SqlMetadataStore(path, read_only=read_only) if kind == "sqlite" and path.exists() else None


def _passed_slots(run_dir: Path) -> int:
    """In arrival order no slot is passed for good: whatever was not trained is open again."""
    config = load_run_config(run_dir / RESOLVED_FILE, [])
    newest = newest_state(run_dir / "checkpoints")
    return newest.position.num_slots if newest is not None and config.control_plane.order == "strict" else 0
