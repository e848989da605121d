"""``specforge train``: runs a RunConfig on this machine, in this process or as children of it."""

from __future__ import annotations

import contextlib
import itertools
import logging
from pathlib import Path

from specforge.config.load import dump_run_config
from specforge.config.run import RunConfig
from specforge.errors import ConfigError, FeatureNotFound
from specforge.launch.compose import build_disagg_online_runtime, build_online_runtime
from specforge.launch.inputs import RESOLVED_FILE
from specforge.launch.lock import ORPHANS_LEAVE_S, run_lock
from specforge.launch.runtime import TrainOutcome, stop_on_signals
from specforge.training.checkpoint import list_checkpoints

_LOG = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False) -> TrainOutcome:
    """Train to the end. ``KeyboardInterrupt`` when stopped by a signal: a checkpoint is there and ``resume`` goes on.

    A run directory that holds a run already is refused without ``resume``; ``resume`` in an empty one starts from zero.
    """
    # The processes of a killed run wait for its Mooncake before they see that it is gone.
    with run_lock(config.run_dir, ORPHANS_LEAVE_S + config.data_plane.mooncake.reconnect_s) as lock:
        if not resume and holds_run(config.run_dir):
            raise ConfigError(
                f"{config.run_dir} already holds a run; add --resume to continue it, or choose another run_dir"
            )
        if config.topology == "disaggregated":
            return build_disagg_online_runtime(config, resume=resume, keep_open=(lock,)).run()
        for num_losses in itertools.count(1):
            try:
                outcome = _train_in_this_process(config, resume)
                break
            except FeatureNotFound as error:
                # A store that runs elsewhere can lose features: back to the checkpoint, and capture them again.
                if num_losses > config.launch.restarts.max_restarts:
                    raise
                _LOG.warning("%s; going on from the last checkpoint", error)
                resume = True
        if not outcome.finished:
            raise KeyboardInterrupt
        return outcome


def _train_in_this_process(config: RunConfig, resume: bool) -> TrainOutcome:
    with contextlib.closing(build_online_runtime(config, resume=resume)) as runtime:
        # only now: until nothing was refused, the file tells how the run was started
        dump_run_config(config, config.run_dir / RESOLVED_FILE)
        with stop_on_signals(runtime.request_stop):
            return runtime.run()


def holds_run(run_dir: Path) -> bool:
    """Whether something was trained or recorded in ``run_dir``."""
    return bool(list_checkpoints(run_dir / "checkpoints")) or (run_dir / "ledger.sqlite").exists()
