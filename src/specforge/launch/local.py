"""``specforge train``: runs a RunConfig in this process, as children of it, or as one of the ranks of torchrun."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from specforge.config.load import dump_run_config
from specforge.config.run import RunConfig
from specforge.errors import ConfigError, FeatureNotFound, RunFailed
from specforge.launch.compose import (
    build_disagg_online_runtime,
    build_online_rank,
    build_online_ranks_runtime,
    build_online_runtime,
    resolve,
)
from specforge.launch.group import Seat, leave_at_once, lost_peer, torchrun_seat
from specforge.launch.inputs import RESOLVED_FILE, read_run_inputs, resolve_device
from specforge.launch.learner import at_rank
from specforge.launch.lock import ORPHANS_LEAVE_S, run_lock
from specforge.launch.offline import verify_features
from specforge.launch.plan import idle_ranks
from specforge.launch.runtime import TrainOutcome, stop_on_signals
from specforge.launch.stores import clear_at_the_end
from specforge.training.checkpoint import list_checkpoints
from specforge.training.ranks import LEADER

_LOG = logging.getLogger(__name__)


def train(config: RunConfig, resume: bool = False) -> TrainOutcome:
    """Train to the end. ``KeyboardInterrupt`` when stopped by a signal: a checkpoint is there and ``resume`` goes on.

    A run directory that holds a run already is refused without ``resume``; ``resume`` in an empty one starts from zero.
    """
    seat = torchrun_seat(os.environ)
    if seat is not None:
        return _train_as_rank(config, seat, resume)
    with _held(config, resume) as lock:
        if config.topology == "disaggregated":
            return build_disagg_online_runtime(config, resume=resume, keep_open=(lock,)).run()
        if config.launch.num_train_ranks > 1:
            return build_online_ranks_runtime(config, resume=resume, keep_open=(lock,)).run()
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


def speaks_for_the_run() -> bool:
    """Whether the outcome of this process is that of the run: not so of torchrun's other ranks."""
    seat = torchrun_seat(os.environ)
    return seat is None or seat.rank == LEADER


def leave_as_rank() -> None:
    """The last call of one of torchrun's ranks, after all of its output; of any other process without effect."""
    if torchrun_seat(os.environ) is not None:
        leave_at_once(0)


@contextlib.contextmanager
def _held(config: RunConfig, resume: bool) -> Iterator[int]:
    """The lock of a run that may be started, or resumed."""
    # The processes of a killed run wait for its Mooncake before they see that it is gone.
    with run_lock(config.run_dir, ORPHANS_LEAVE_S + config.data_plane.mooncake.reconnect_s) as lock:
        if not resume and holds_run(config.run_dir):
            raise ConfigError(
                f"{config.run_dir} already holds a run; add --resume to continue it, or choose another run_dir"
            )
        yield lock


def _train_as_rank(config: RunConfig, seat: Seat, resume: bool) -> TrainOutcome:
    """This process is one of those that torchrun started. The outcome of the leader is that of the run."""
    if config.topology == "disaggregated":
        raise ConfigError(
            "topology is disaggregated, whose processes torchrun does not start: run specforge train by itself with "
            f"launch.num_train_ranks={seat.size}, or use topology=colocated"
        )
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"num_train_ranks": seat.size})})
    num_devices = torch.cuda.device_count()
    own = at_rank(config, seat.rank, seat.size, num_devices)
    with contextlib.ExitStack() as resources:
        resources.enter_context(interrupted_when_terminated())
        if seat.rank == LEADER:
            # the others wait for it where they meet
            resources.enter_context(_held(config, resume))
            config = _resolved(config, resources)
        ranks = seat.join(resolve_device(own.training.device), own.training.sequence_parallel)
        try:
            told = ranks.main.broadcast(config.model_dump_json().encode())
            own = at_rank(RunConfig.model_validate_json(told), seat.rank, seat.size, num_devices)
            with contextlib.closing(build_online_rank(own, ranks, resume=resume)) as runtime:
                if ranks.is_leader:
                    dump_run_config(config, config.run_dir / RESOLVED_FILE)
                with stop_on_signals(runtime.request_stop):
                    outcome = runtime.run()
            ranks.main.wait()  # what the leader started for all stays until all have closed what they had of it
        except Exception as error:
            if not lost_peer(error):
                raise
            raise RunFailed(
                f"train rank {seat.rank} lost another rank, whose own message says why; here it showed as "
                f"{type(error).__name__}: {error}"
            ) from error
        ranks.leave()
    if not outcome.finished:
        raise KeyboardInterrupt
    return outcome


@contextlib.contextmanager
def interrupted_when_terminated() -> Iterator[None]:
    """SIGTERM is a ``KeyboardInterrupt``, once, so that what was opened is closed; for the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is to disturb the closing
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _resolved(config: RunConfig, resources: contextlib.ExitStack) -> RunConfig:
    """``config`` as all ranks read it, with what it needs started until ``resources`` close."""
    inputs = read_run_inputs(config)
    verify_features(config, inputs.tasks)
    for warning in idle_ranks(config):
        _LOG.warning("%s", warning)
    config = resolve(config, inputs.plan, resources)
    resources.callback(clear_at_the_end, config)
    return config


def holds_run(run_dir: Path) -> bool:
    """Whether something was trained or recorded in ``run_dir``."""
    return bool(list_checkpoints(run_dir / "checkpoints")) or (run_dir / "ledger.sqlite").exists()
