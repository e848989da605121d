"""``specforge train``: runs a RunConfig on this machine, in this process or as children of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from specforge.config.load import dump_run_config
from specforge.config.run import RunConfig
from specforge.errors import ConfigError
from specforge.launch.compose import build_disagg_online_runtime, build_online_runtime
from specforge.launch.runtime import TrainOutcome, stop_on_signals
from specforge.training.checkpoint import list_checkpoints


def train(config: RunConfig, resume: bool = False) -> TrainOutcome:
    """Train to the end. ``KeyboardInterrupt`` when stopped by a signal: a checkpoint is there and ``resume`` goes on.

    A run directory that holds a run already is refused without ``resume``; ``resume`` in an empty one starts from zero.
    """
    with run_lock(config.run_dir):
        if not resume and holds_run(config.run_dir):
            raise ConfigError(
                f"{config.run_dir} already holds a run; add --resume to continue it, or choose another run_dir"
            )
        dump_run_config(config, config.run_dir / "run.yaml")
        if config.topology == "disaggregated":
            return build_disagg_online_runtime(config, resume=resume).run()
        runtime = build_online_runtime(config, resume=resume)
        with stop_on_signals(runtime.request_stop):
            outcome = runtime.run()
        if not outcome.finished:
            raise KeyboardInterrupt
        return outcome


def holds_run(run_dir: Path) -> bool:
    """Whether something was trained or recorded in ``run_dir``."""
    return bool(list_checkpoints(run_dir / "checkpoints")) or (run_dir / "ledger.sqlite").exists()


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """One process a run directory; the lock goes with the process, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{run_dir} is in use by another process; wait for it, stop it, or choose another run_dir"
            ) from None
        yield
    finally:
        os.close(descriptor)


def is_locked(run_dir: Path) -> bool:
    """Whether a process works in ``run_dir`` now."""
    try:
        with run_lock(run_dir):
            return False
    except ConfigError:
        return True
