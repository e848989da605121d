"""What the engine works on, one sample or one prompt at a time or several together, and the queue of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CapturedItem, CaptureItem, Generate, GeneratedItem, ItemFailure
from specforge.contracts.capture_wire import What
from specforge.data_plane.tensors import Source
from specforge.errors import SpecForgeError

OutcomeT = TypeVar("OutcomeT")


class Refused(SpecForgeError):
    """A request that gets no reply but a ``capture_wire.Refusal``, with this message as its reason."""

    def __init__(self, what: What, reason: str) -> None:
        super().__init__(reason)
        self.what: What = what


def settle(done: Future[OutcomeT], outcome: OutcomeT | Refused) -> None:
    """The first outcome counts; a later one, of whoever did not know that it is over, is dropped."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, Refused):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)


@dataclass(frozen=True, slots=True)
class Finished:
    """A captured sample as the reply names it. ``tensors`` of an inline sink, else ``None``, as of one that failed."""

    item: CapturedItem
    tensors: Mapping[str, Source] | None = None


class Owner(Protocol):
    """Where the features of a job go. It alone ends the job, once, and knows who waits for it."""

    @property
    def has_room(self) -> bool:
        """Whether it takes another sample now."""
        ...

    def end(self, job: CaptureJob, outcome: Finished | Refused) -> None: ...


@dataclass(eq=False, slots=True)
class CaptureJob:
    """``num_waiting`` requests wait for ``done``; it belongs to the ``owner``."""

    item: CaptureItem
    spec: CaptureSpec
    owner: Owner
    done: Future[Finished] = field(default_factory=Future)
    num_waiting: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.item.input_ids)

    @property
    def is_ready(self) -> bool:
        return self.owner.has_room

    def goes_with(self, other: Job) -> bool:
        return isinstance(other, CaptureJob) and other.spec == self.spec

    def refuse(self, refused: Refused) -> None:
        self.owner.end(self, refused)

    def failed(self, whose: str, reason: str) -> Finished:
        """The outcome without features."""
        failure = ItemFailure("prompt" if whose == "prompt" else "store", reason)
        item = self.item
        return Finished(CapturedItem(item.sample_id, item.generation, self.num_tokens, failure=failure))


@dataclass(eq=False, slots=True)
class GenerateJob:
    """One prompt of one request. ``is_wanted``: somebody still waits for it."""

    prompt: tuple[int, ...]
    options: Generate
    done: Future[GeneratedItem] = field(default_factory=Future)
    is_wanted: bool = True

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.options.max_new_tokens

    @property
    def is_ready(self) -> bool:
        return True

    def goes_with(self, other: Job) -> bool:
        """Drawn responses would not be batched anyway."""
        return isinstance(other, GenerateJob) and other.options == self.options and not self.options.temperature

    def answer(self, token_ids: tuple[int, ...], *, stopped: bool) -> None:
        settle(self.done, GeneratedItem(token_ids, stopped))

    def refuse(self, refused: Refused) -> None:
        settle(self.done, refused)


Job = CaptureJob | GenerateJob


class JobQueue:
    """First in, first out, but for jobs whose owner has no room: those wait. ``max_batch_tokens`` 0: no batches."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, jobs: Sequence[Job]) -> bool:
        """False: closed."""
        with self._changed:
            if not self._closed:
                self._jobs += jobs
                self._changed.notify_all()
            return not self._closed

    def remove(self, job: Job) -> bool:
        """Whether it was still waiting."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            return True

    def take(self, timeout_s: float, when_idle: Callable[[], None]) -> list[Job] | None:
        """What to work on next, together; ``None`` once closed. ``when_idle`` is called after every ``timeout_s``."""
        while True:
            with self._changed:
                if not self._closed and not self._is_anything_ready():
                    self._changed.wait(timeout_s)
                if self._closed:
                    return None
                if self._is_anything_ready():
                    return self._next_batch()
            when_idle()

    def wake(self) -> None:
        """Some owner may have room again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> list[Job]:
        """Nothing more is taken or put; what was waiting."""
        with self._changed:
            self._closed = True
            left, self._jobs = self._jobs, []
            self._changed.notify_all()
            return left

    def _is_anything_ready(self) -> bool:
        return any(job.is_ready for job in self._jobs)

    def _next_batch(self) -> list[Job]:
        first = next(job for job in self._jobs if job.is_ready)
        batch, longest = [first], first.num_tokens
        for job in self._jobs if self._max_batch_tokens else ():
            wide = max(longest, job.num_tokens)
            if (
                job is not first
                and job.is_ready
                and first.goes_with(job)
                and wide * (len(batch) + 1) <= self._max_batch_tokens
            ):
                batch.append(job)
                longest = wide
        taken = set(map(id, batch))
        self._jobs = [job for job in self._jobs if id(job) not in taken]
        return batch


def when_all(jobs: Sequence[Job]) -> Future[None]:
    """Done when all of ``jobs`` are, whatever came of them."""
    done: Future[None] = Future()
    lock = threading.Lock()
    num_left = len(jobs)

    def one_more(_: object) -> None:
        nonlocal num_left
        with lock:
            num_left -= 1
            is_last = num_left == 0
        if is_last:
            done.set_result(None)

    for job in jobs:
        job.done.add_done_callback(one_more)
    return done
