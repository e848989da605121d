"""The two assembled sides of a run. Built by ``compose``; nothing here names a concrete store, engine or algorithm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from specforge.contracts.batches import StepBatches
from specforge.contracts.refs import SlotRef
from specforge.errors import ProducerFailed, RunFailed
from specforge.launch.child import ChildSpec
from specforge.launch.host import HostExecutor
from specforge.monitor.base import Monitor
from specforge.training.trainer import Trainer


class Controller(Protocol):
    """What the train side needs of the controller beyond acks."""

    def fail_run(self, reason: str) -> None: ...

    def finish(self) -> None: ...

    def leave(self, worker_id: str, reason: str | None) -> None: ...

    def summary(self) -> dict[str, Any]: ...

    def account(self) -> dict[str, Any]: ...


class Worker(Protocol):
    """A rollout worker, by itself or driven."""

    def run(self) -> None: ...

    def run_once(self, timeout_s: float) -> bool: ...


class Server(Protocol):
    """A control-plane server."""

    url: str

    def start(self) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """How the train side ended. ``finished`` is false when it was told to stop and left a checkpoint."""

    finished: bool
    step: int
    num_slots: int
    draft_weights_sha256: str
    ledger: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TrainRuntime:
    """Controller, loader and trainer, ready to run; the server only where the capture side is elsewhere."""

    def __init__(
        self,
        trainer: Trainer,
        controller: Controller,
        batches: Iterable[StepBatches[Tensor]],
        weights_sha256: Callable[[], str],
        resources: contextlib.ExitStack,
        endpoint: tuple[Server, str] | None = None,
    ) -> None:
        self.trainer = trainer
        self.controller = controller
        self._batches = batches
        self._weights_sha256 = weights_sha256
        self._resources = resources
        self._endpoint = endpoint
        self._stopping = threading.Event()

    def serve(self) -> tuple[str, str]:
        """Start the control-plane server; (url, token) for the capture side."""
        if self._endpoint is None:
            raise RunFailed("this runtime has no control-plane server: its capture side is in the same process")
        server, token = self._endpoint
        server.start()
        self._resources.callback(server.stop)
        return server.url, token

    def request_stop(self) -> None:
        """End with a checkpoint after the running optimizer step. Safe to call from a signal handler."""
        self._stopping.set()
        self.trainer.request_stop()
        # The trainer may be blocked waiting for samples that will not come; the lock of the controller may be held by
        # the very thread that the signal interrupted, hence another thread.
        threading.Thread(target=self.controller.fail_run, args=("stop requested",), daemon=True).start()

    def close(self) -> None:
        """Idempotent; ``run`` closes too."""
        self._resources.close()

    def run(self) -> TrainOutcome:
        """Train to the end. Whatever happens, what was learned is in a checkpoint and everything is closed."""
        with self._resources:
            try:
                finished = self.trainer.fit(self._batches)
            except ProducerFailed:
                self.trainer.save()
                if not self._stopping.is_set():
                    raise
                finished = False
            except BaseException:
                self.controller.fail_run("the trainer failed")
                raise
            self.controller.finish()
            position = self.trainer.position
            return TrainOutcome(
                finished=finished,
                step=position.step,
                num_slots=position.num_slots,
                draft_weights_sha256=self._weights_sha256(),
                ledger=self.controller.account(),
            )


class CaptureRuntime:
    """The capture side in a process of its own: one engine and one arena, for one rollout worker after the other."""

    def __init__(
        self, connect: Callable[[str, str, contextlib.ExitStack], Worker], resources: contextlib.ExitStack
    ) -> None:
        self._connect = connect
        self._resources = resources

    def run(self, url: str, token: str) -> None:
        """Lease, capture and commit until the control plane says that nothing is left."""
        with contextlib.ExitStack() as connection:
            self._connect(url, token, connection).run()

    def close(self) -> None:
        """The features go with it: only at the end of the run."""
        self._resources.close()


class StopCapture(BaseException):
    """A capture process was told to stop. Not an error, hence no ``Exception``."""


class StopOnce:
    """Unwinds the main thread from inside its ``with`` block: one ``StopCapture`` at most, whatever arrives when."""

    def __init__(self) -> None:
        self._requested = False
        self._armed = False

    def request(self) -> None:
        """For signal handlers."""
        self._requested = True
        if self._armed:
            self._armed = False
            raise StopCapture

    def __enter__(self) -> None:
        self._armed = True
        if self._requested:
            raise StopCapture

    def __exit__(self, *_: object) -> None:
        self._armed = False


class Refs(Protocol):
    """A queue of dispatched slots."""

    def get(self, max_slots: int) -> list[SlotRef]: ...

    def ack(self, refs: Sequence[SlotRef]) -> None: ...


class HandOver:
    """The loader's source: what it took is off the channel. Whether it was trained is the ledger's business."""

    def __init__(self, queue: Refs) -> None:
        self._queue = queue

    def get(self, max_slots: int) -> list[SlotRef]:
        refs = self._queue.get(max_slots)
        self._queue.ack(refs)
        return refs


class StepLog:
    """Passes the scalars of every ``every``-th step on, and records once how far capture was at the first step."""

    def __init__(self, monitor: Monitor, summary: Callable[[], dict[str, Any]], every: int) -> None:
        self._monitor = monitor
        self._summary = summary
        self._every = every
        self._first = True

    def __call__(self, step: int, scalars: dict[str, float]) -> None:
        if self._first:
            self._first = False
            counts = self._summary()
            captured = counts["num_slots_trained"] + counts["num_slots_captured_ahead"]
            self._monitor.event("first_step", step=step, num_captured=captured, num_slots=counts["num_slots"])
        if step % self._every == 0:
            self._monitor.log(step, scalars)


class HostRuntime:
    """A run whose sides are children of this process. ``resources`` are closed when it ends."""

    def __init__(self, executor: HostExecutor, children: Sequence[ChildSpec], resources: contextlib.ExitStack) -> None:
        self._executor = executor
        self._children = children
        self._resources = resources

    def run(self) -> TrainOutcome:
        """Until all children ended. ``KeyboardInterrupt`` when they were stopped: a checkpoint is there."""
        with self._resources, stop_on_signals(self._executor.request_stop):
            outcome = TrainOutcome(**self._executor.run(self._children)["train"])
        if not outcome.finished:
            raise KeyboardInterrupt
        return outcome


class InlineCapture:
    """A source of refs that drives the rollout worker itself, in the thread that asks: one process, no waiting."""

    def __init__(self, worker: Worker, num_ready: Callable[[], int], take: Callable[[int], list[SlotRef]]) -> None:
        self._worker = worker
        self._num_ready = num_ready
        self._take = take

    def get(self, max_slots: int) -> list[SlotRef]:
        """Up to ``max_slots`` slots in order, capturing what is missing; fewer only at the end."""
        while self._num_ready() < max_slots and self._worker.run_once(timeout_s=0.0):
            pass
        return self._take(max_slots)


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a clean stop; a second SIGINT interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        request_stop()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
