"""What a child process does. Started by :mod:`specforge.launch.host`, never by hand.

``train``    trains. The first rank (often the only one) owns the controller and the ledger too, and serves the control
             plane on a socket that it inherits; in a colocated run every rank captures as well.
``capture``  loads the target; whenever a train process serves, it leases, captures and commits until nothing is left.

Loading the target and building the trainer overlap. A capture process stays when nothing is left: the trainer reads
features from its arena, and a trainer that dies is rolled back to its checkpoint and asks for more.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from specforge.config.load import load_run_config
from specforge.config.run import RunConfig
from specforge.errors import FeatureNotFound, UserError
from specforge.launch.compose import build_disagg_online_consumer, build_disagg_online_producer, build_online_rank
from specforge.launch.group import Seat, leave_at_once, lost_peer
from specforge.launch.inputs import resolve_device
from specforge.launch.learner import at_rank
from specforge.launch.parent import ParentLink
from specforge.launch.runtime import StopCapture, StopOnce, stop_on_signals
from specforge.launch.train_side import Served


def run_train(config: RunConfig, link: ParentLink, listen_fd: int | None, resume: bool) -> None:
    """The train role; the outcome goes to the parent as ``finished`` or ``stopped``."""
    start = link.wait_for("start")
    if start is None:
        return
    seat = Seat(**start["group"])
    config = at_rank(config, seat.rank, seat.size, torch.cuda.device_count())
    ranks = seat.join(resolve_device(config.training.device), config.training.sequence_parallel)
    served = None
    if listen_fd is not None:
        listener = socket.socket(fileno=listen_fd)
        served = Served(listener, start["token"], frozenset(start["workers"]), start["crashed"])
    build = build_online_rank if config.topology == "colocated" else build_disagg_online_consumer
    with (
        contextlib.closing(build(config, resume=resume, served=served, ranks=ranks)) as runtime,
        stop_on_signals(runtime.request_stop),
    ):
        if ranks.is_leader:
            if config.topology == "disaggregated":
                link.when_lost(runtime.controller.leave)
            link.report("serving")  # before the first answer: no lease is given that the parent cannot know of
        if ranks.is_leader and config.topology == "disaggregated":
            runtime.serve()
        outcome = runtime.run()
        # still here, where a signal that comes late changes nothing
        link.report("finished" if outcome.finished else "stopped", **outcome.to_dict())
        ranks.leave()
        if ranks.size > 1:
            leave_at_once(0)


def run_capture(config: RunConfig, link: ParentLink, worker_id: str) -> None:
    """The capture role: until it is told to stop, because the trainer reads features from this process's arena.

    Unless the run is over the arena stays when this process leaves: what was committed can still be trained.
    """
    stop = StopOnce()
    signal.signal(signal.SIGTERM, lambda *_: stop.request())
    with contextlib.ExitStack() as resources, contextlib.suppress(StopCapture), stop:
        producer = build_disagg_online_producer(config, worker_id=worker_id)
        resources.callback(lambda: producer.close() if link.run_is_over() else None)
        while (endpoint := link.wait_for("endpoint")) is not None:
            producer.run(endpoint["url"], endpoint["token"])
    link.report("stopped")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="specforge.launch.roles")
    parser.add_argument("role", choices=["train", "capture"])
    parser.add_argument("config", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--listen-fd", type=int, help="the socket that the train role serves on")
    parser.add_argument("--worker-id", help="of the capture role")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args(argv)
    link = ParentLink(arguments.report_fd)
    try:
        config = load_run_config(arguments.config, [])
        if arguments.role == "train":
            run_train(config, link, arguments.listen_fd, arguments.resume)
        else:
            run_capture(config, link, arguments.worker_id)
    except UserError as error:
        return _failed(link, 2, message=str(error), user_error=True)
    except FeatureNotFound as error:
        # Ordinary where a store can lose features: the parent says it in one line, and starts this process again.
        return _failed(link, 1, message=f"{type(error).__name__}: {error}", error=type(error).__name__)
    except Exception as error:  # noqa: BLE001 - the process boundary: the parent gets the original traceback
        trace = traceback.format_exc()
        print(trace, file=sys.stderr, flush=True)
        return _failed(
            link,
            1,
            message=f"{type(error).__name__}: {error}",
            traceback=trace,
            error=type(error).__name__,
            lost_peer=lost_peer(error),
        )
    return 0


def _failed(link: ParentLink, code: int, **fields: Any) -> int:
    link.report("failed", **fields)
    if torch.distributed.is_initialized():
        leave_at_once(code)  # threads may wait for ranks that wait for this one
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
