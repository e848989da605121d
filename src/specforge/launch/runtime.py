"""The two assembled sides of a run. Built by ``compose``; nothing here names a concrete store, engine or algorithm."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from specforge.contracts.batches import StepBatches
from specforge.contracts.refs import Slot
from specforge.errors import ProducerFailed, RunFailed
from specforge.launch.child import ChildSpec
from specforge.launch.host import HostExecutor
from specforge.monitor.base import Monitor
from specforge.training.checkpoint import weights_sha256
from specforge.training.checkpointer import Checkpointer
from specforge.training.ranks import Ranks
from specforge.training.sharding import ShardedDraft
from specforge.training.trainer import Trainer


class Controller(Protocol):
    """What the train side needs of the controller beyond acks."""

    def fail_run(self, reason: str) -> None: ...

    def finish(self) -> None: ...

    def leave(self, worker_id: str, reason: str | None) -> None: ...

    def summary(self) -> dict[str, Any]: ...

    def account(self) -> dict[str, Any]: ...


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


@dataclass(frozen=True, slots=True)
class TrainParts:
    """One rank's side of the training, assembled.

    ``server`` and its token only where others capture; ``close_ranks`` ends what ranks do together, in the same order
    on all of them, and is not called when the run failed. ``stop_capture`` ends the capture of this process, if it has
    one, after the running sample.
    """

    trainer: Trainer
    checkpointer: Checkpointer
    draft: ShardedDraft
    controller: Controller
    batches: Iterable[StepBatches[Tensor]]
    ranks: Ranks = field(default_factory=Ranks)
    close_ranks: Callable[[], None] = lambda: None
    endpoint: tuple[Server, str] | None = None
    stop_capture: Callable[[], None] = lambda: None


class TrainRuntime:
    """Controller, loader and trainer, ready to run; the server only where the capture side is elsewhere."""

    def __init__(self, parts: TrainParts, resources: contextlib.ExitStack) -> None:
        self.trainer = parts.trainer
        self.controller = parts.controller
        self.ranks = parts.ranks
        self._parts = parts
        self._resources = resources
        self._stopping = False

    def serve(self) -> tuple[str, str]:
        """Start the control-plane server; (url, token) for the capture side."""
        if self._parts.endpoint is None:
            raise RunFailed("this runtime has no control-plane server: its capture side is in the same process")
        server, token = self._parts.endpoint
        server.start()
        self._resources.callback(server.stop)
        return server.url, token

    def request_stop(self) -> None:
        """End with a checkpoint after the running optimizer step, or the sample that is captured for the next one. Safe
        to call from any thread and from a signal handler.
        """
        self._stopping = True
        self.trainer.request_stop()
        # The lock of the controller may be held by the very thread that a signal interrupted, hence another thread.
        threading.Thread(target=self._end_the_wait, name="stop", daemon=True).start()

    def close(self) -> None:
        """Idempotent; ``run`` closes too."""
        self._resources.close()

    def run(self) -> TrainOutcome:
        """Train to the end. Whatever happens, what was learned is in a checkpoint and everything is closed."""
        with self._resources:
            try:
                finished = self._train()
            except BaseException:
                self.controller.fail_run("the trainer failed")
                self._parts.checkpointer.settle()
                raise
            self.controller.finish()
            position, draft = self.trainer.position, self._parts.draft.served_state()
            outcome = TrainOutcome(
                finished=finished,
                step=position.step,
                num_slots=position.num_slots,
                draft_weights_sha256=weights_sha256(draft) if self.ranks.is_leader else "",
                ledger=self.controller.account(),
            )
            self._parts.close_ranks()
            return outcome

    def _end_the_wait(self) -> None:
        """For samples that will not come."""
        self.controller.fail_run("stop requested")
        self._parts.stop_capture()

    def _train(self) -> bool:
        """Whether the training came to its end. A stop leaves a checkpoint, as does a capture side that failed."""
        try:
            return self.trainer.fit(self._parts.batches)
        except ProducerFailed:
            self.trainer.save()
            self._parts.checkpointer.wait()
            # All ranks are here, but the signal that stopped the run may not have reached all of them.
            if not self.ranks.main.sum([float(self._stopping)])[0]:
                raise
            return False


class Rollout(Protocol):
    """A rollout worker, or what drives several."""

    def run(self) -> None: ...


class CaptureRuntime:
    """The capture side in a process of its own: one engine, or servers, for one control plane after the other."""

    def __init__(
        self, connect: Callable[[str, str, contextlib.ExitStack], Rollout], resources: contextlib.ExitStack
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


class StepLog:
    """Passes the scalars of every ``every``-th step on, and records once how far capture was at the first step."""

    def __init__(self, monitor: Monitor, summary: Callable[[], dict[str, Any]], every: int) -> None:
        self._monitor = monitor
        self._summary = summary
        self._every = every
        self._first = True

    def on_step(self, step: int, scalars: dict[str, float]) -> None:
        if self._first:
            self._first = False
            counts = self._summary()
            captured = counts["num_slots_trained"] + counts["num_slots_captured_ahead"]
            self._monitor.event("first_step", step=step, num_captured=captured, num_slots=counts["num_slots"])
        if step % self._every == 0:
            self._monitor.log(step, scalars)

    def on_evaluation(self, step: int, scalars: dict[str, float]) -> None:
        self._monitor.log(step, scalars)


class Follower:
    """What a rank that does not lead has in the place of controller, ledger and log: the leader's are everybody's."""

    def ack(self, slots: Sequence[Slot], step: int) -> None: ...

    def checkpoint_state(self) -> dict[str, Any]:
        return {}

    def checkpointed(self, step: int) -> None: ...

    def on_step(self, step: int, scalars: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, scalars: dict[str, float]) -> None: ...

    def fail_run(self, reason: str) -> None: ...

    def finish(self) -> None: ...

    def leave(self, worker_id: str, reason: str | None) -> None: ...

    def summary(self) -> dict[str, Any]:
        return {}

    def account(self) -> dict[str, Any]:
        return {}


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


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a clean stop, from a thread; a second SIGINT interrupts at once.

    The main thread may be inside a collective, which waits for another rank and runs no Python signal handler until
    that one comes: the thread hears of a signal from the interpreter's own handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arrived, arrive = socket.socketpair()
    arrive.setblocking(False)

    def handle(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def listen() -> None:
        while number := arrived.recv(1):
            if number[0] in previous:
                request_stop()

    with arrived, arrive:
        listener = threading.Thread(target=listen, name="signals", daemon=True)
        listener.start()
        wakeup = signal.set_wakeup_fd(arrive.fileno(), warn_on_full_buffer=False)
        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            arrive.shutdown(socket.SHUT_WR)
            listener.join()
