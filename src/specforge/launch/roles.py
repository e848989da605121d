"""What a child process does. Started by :mod:`specforge.launch.host`, never by hand.

``train``    owns the controller and its server, the ledger and the trainer; reports its endpoint, then trains.
``capture``  loads the target, waits for the endpoint on standard input, then leases, captures and commits.

Loading the target and building the trainer overlap: the two processes start together and meet at the endpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from specforge.config.load import load_run_config
from specforge.config.run import RunConfig
from specforge.errors import UserError
from specforge.launch.compose import build_disagg_online_consumer, build_disagg_online_producer
from specforge.launch.host import Report
from specforge.launch.runtime import StopCapture, StopOnce


class ParentLink:
    """The two pipes to the parent. When the parent is gone, this process gets a SIGTERM."""

    def __init__(self, report_fd: int) -> None:
        self._report = os.fdopen(report_fd, "wb", buffering=0)
        self._endpoint: tuple[str, str] | None = None
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._listen, name="parent-link", daemon=True).start()

    def report(self, event: Any, **fields: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody is left to be told
            self._report.write(Report(event, fields).to_line())

    def endpoint(self) -> tuple[str, str] | None:
        """Blocks until the parent sends (url, token); ``None`` when it went away instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._endpoint is not None or self._closed)
            return self._endpoint

    def wait_for_end(self) -> None:
        """Blocks until the parent is gone; the parent's SIGTERM comes first in an orderly run."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed)

    def _listen(self) -> None:
        # Unbuffered: a thread blocked in a buffered reader would hold its lock while the interpreter shuts down.
        with os.fdopen(os.dup(0), "rb", buffering=0) as pipe:
            while line := pipe.readline():
                self._receive(Report.from_line(line))
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, report: Report) -> None:
        with self._changed:
            self._endpoint = (report.fields["url"], report.fields["token"])
            self._changed.notify_all()


def run_train(config: RunConfig, link: ParentLink, resume: bool) -> None:
    """The train role: (result) goes to the parent as ``finished`` or ``stopped``."""
    with contextlib.closing(build_disagg_online_consumer(config, resume=resume)) as runtime:
        signal.signal(signal.SIGTERM, lambda *_: runtime.request_stop())
        url, token = runtime.serve()
        link.report("endpoint", url=url, token=token)
        outcome = runtime.run()
    link.report("finished" if outcome.finished else "stopped", **outcome.to_dict())


def run_capture(config: RunConfig, link: ParentLink, name: str) -> None:
    """The capture role: until it is told to stop, because the trainer reads features from this process's arena."""
    stop = StopOnce()
    signal.signal(signal.SIGTERM, lambda *_: stop.request())
    with contextlib.suppress(StopCapture), contextlib.ExitStack() as resources, stop:
        producer = build_disagg_online_producer(config, worker_id=f"{name}-{os.getpid()}")
        resources.callback(producer.close)
        endpoint = link.endpoint()
        if endpoint is not None:
            producer.run(*endpoint)
            link.wait_for_end()
    link.report("stopped")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="specforge.launch.roles")
    parser.add_argument("role", choices=["train", "capture"])
    parser.add_argument("config", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args(argv)
    link = ParentLink(arguments.report_fd)
    try:
        config = load_run_config(arguments.config, [])
        if arguments.role == "train":
            run_train(config, link, arguments.resume)
        else:
            run_capture(config, link, arguments.name)
    except UserError as error:
        link.report("failed", message=str(error), user_error=True)
        return 2
    except Exception as error:  # noqa: BLE001 - the process boundary: the parent gets the original traceback
        trace = traceback.format_exc()
        print(trace, file=sys.stderr, flush=True)
        link.report("failed", message=f"{type(error).__name__}: {error}", traceback=trace)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
