"""What becomes of captured features: each destination has a thread, so that a copy runs beside the next forward."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CapturedItem, CaptureItem
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import FeatureStore, PutRequest
from specforge.data_plane.encoding import not_finite
from specforge.data_plane.tensors import materialised
from specforge.data_plane.tombstones import Tombstones
from specforge.errors import FeatureStoreError, FeatureStoreFull, FeatureTooLarge
from specforge.inference.delivery import put_with_patience
from specforge.inference.engine import CapturedSample
from specforge.inference.serving.jobs import CaptureJob, Finished, Refused, settle

_LOG = logging.getLogger(__name__)

MAX_WAITING = 4
"""Captured samples that wait for one thread; with more the engine takes up other work."""
MAX_REMEMBERED = 4096
"""Stored samples of one sink; where there are more, those that were freed are looked for whenever the number of them
has doubled.
"""

_Pair = tuple[str, int]


@runtime_checkable
class Outlived(Protocol):
    """A store whose features would go with its ``close``, and need not."""

    def leave(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _HandedOver:
    """``captured``: when the device has computed the features (``None``: it has)."""

    job: CaptureJob
    sample: CapturedSample
    captured: torch.cuda.Event | None


class Writer:
    """Ends jobs in a thread of its own. ``has_changed`` is called when there is room again, ``on_failed`` when the
    thread is lost, and with it the server.
    """

    def __init__(self, name: str, has_changed: Callable[[], None], on_failed: Callable[[Exception], None]) -> None:
        self._has_changed = has_changed
        self._on_failed = on_failed
        self._waiting: deque[_HandedOver] = deque()
        self._more = threading.Condition()
        self._stopping = False
        self._refused: Refused | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        return len(self._waiting) < MAX_WAITING

    def hand_over(self, job: CaptureJob, sample: CapturedSample) -> None:
        """Takes the features of ``job``, which the calling thread has just asked the device for."""
        captured = None
        if any(tensor.is_cuda for tensor in sample.tensors.values() if isinstance(tensor, torch.Tensor)):
            captured = torch.cuda.Event()
            captured.record()
        with self._more:
            refused = self._refused
            if refused is None:
                self._waiting.append(_HandedOver(job, sample, captured))
                self._more.notify_all()
        if refused is not None:
            self.end(job, refused)

    def drained(self, timeout_s: float) -> bool:
        """Waits until nothing that was handed over is held any more; whether it is so."""
        with self._more:
            return self._more.wait_for(lambda: not self._waiting, timeout_s)

    def refuse_all(self, refused: Refused) -> None:
        """What was handed over gets ``refused``, and all that comes."""
        with self._more:
            self._refused = refused
            left = [handed.job for handed in self._waiting]
        for job in left:
            self.end(job, refused)

    def stop(self, timeout_s: float) -> None:
        """Ends what was handed over, and the thread; waits for it up to ``timeout_s``. Idempotent."""
        with self._more:
            self._stopping = True
            self._more.notify_all()
        self._thread.join(timeout_s)

    def end(self, job: CaptureJob, outcome: Finished | Refused) -> None:
        """See ``Owner``."""
        settle(job.done, outcome)

    def _run(self) -> None:
        stream: torch.cuda.Stream | None = None
        try:
            while (handed := self._next()) is not None:
                with contextlib.ExitStack() as beside:
                    if handed.captured is not None:
                        # beside the next forward, which is on the device's default stream; every copy to the host ends
                        # before the call that asks for it does, so nothing is freed under it
                        stream = stream or torch.cuda.Stream()
                        stream.wait_event(handed.captured)
                        beside.enter_context(torch.cuda.stream(stream))
                    self._end_one(handed.job, handed.sample)
                del handed
                with self._more:
                    self._waiting.popleft()
                    self._more.notify_all()
                self._has_changed()
        except Exception as error:  # noqa: BLE001 - the end of a thread: the server says so and ends
            _LOG.exception("a thread that writes features ended")
            self.refuse_all(Refused("engine", f"{type(error).__name__}: {error}"))
            self._on_failed(error)

    def _next(self) -> _HandedOver | None:
        """Stays in the queue until it is done with; ``None`` at the end."""
        with self._more:
            self._more.wait_for(lambda: self._waiting or self._stopping)
            return self._waiting[0] if self._waiting else None

    def _end_one(self, job: CaptureJob, sample: CapturedSample) -> None:
        if not self._is_wanted(job):
            return
        outcome: Finished | Refused
        try:
            damaged = not_finite(sample.tensors)
            if damaged is None:
                outcome = self._written(job, sample)
            else:
                outcome = job.failed("prompt", f"the target gave NaN or infinite values in feature {damaged!r}")
        except torch.AcceleratorError:
            raise  # the context of the device is gone
        except Exception as error:  # noqa: BLE001 - a boundary: who asked is told, the server goes on
            _LOG.exception("writing features failed")
            outcome = Refused("engine", f"{type(error).__name__}: {error}")
        self.end(job, outcome)

    def _is_wanted(self, job: CaptureJob) -> bool:
        """Whether anybody still waits; where not, it is as if the job had never been."""
        return job.num_waiting > 0 and not job.done.done()

    def _written(self, job: CaptureJob, sample: CapturedSample) -> Finished | Refused:
        """Keeps the features for the answer, in memory of the host."""
        tensors = {name: materialised(source).cpu() for name, source in sample.tensors.items()}
        item = job.item
        return Finished(CapturedItem(item.sample_id, item.generation, job.num_tokens), tensors)


@dataclass(frozen=True, slots=True)
class _Kept:
    """``asked``: hash of tokens and spec."""

    asked: int
    item: CapturedItem


class StoreWriter(Writer):
    """Puts into one store, and remembers what it put: a sample that is asked for again is not captured again.

    What has been freed stays so: its generation is answered with a failure, as the store would drop it. So is one that
    another process put, of which nobody here knows what it was made of. Features that nobody waits for any more when
    they are there are freed at once.
    """

    def __init__(
        self,
        store: FeatureStore,
        revision: str,
        store_wait_s: float,
        has_changed: Callable[[], None],
        on_failed: Callable[[Exception], None],
        on_broken: Callable[[Exception], None],
    ) -> None:
        """``revision`` of the target. ``on_broken`` is told when the store fails, and refuses all."""
        self.store = store
        self._revision = revision
        self._store_wait_s = store_wait_s
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self._in_flight: dict[_Pair, tuple[int, CaptureJob]] = {}
        self._kept: dict[_Pair, _Kept] = {}
        self._freed = Tombstones()
        self._look_at_all_above = MAX_REMEMBERED
        self._closed = threading.Event()
        super().__init__(f"put {store.name}", has_changed, on_failed)

    def claim(self, items: Sequence[CaptureItem], spec: CaptureSpec) -> tuple[list[CaptureJob], list[CaptureJob]]:
        """A job for each of ``items``, maybe done, maybe another request's; and those of them that are to be queued.

        Raises :class:`Refused` for a generation that was asked for with other tokens, and after :meth:`close`.
        """
        self._look(items, spec)
        jobs: list[CaptureJob] = []
        new: list[CaptureJob] = []
        with self._lock:
            if self._closed.is_set():
                raise Refused("busy", "the sink was closed while the request came in; send it again")
            self._check_same(items, spec)
            for item in items:
                pair = _pair(item)
                job = CaptureJob(item, spec, self)
                if pair in self._kept:
                    job.done.set_result(Finished(self._kept[pair].item))
                elif pair in self._in_flight:
                    job = self._in_flight[pair][1]
                    job.num_waiting += 1
                elif pair in self._freed:
                    reason = "it was captured before, and is not known any more; ask for it with a new generation"
                    job.done.set_result(job.failed("store", reason))
                else:
                    self._in_flight[pair] = (_asked(item, spec), job)
                    new.append(job)
                jobs.append(job)
        return jobs, new

    def give_up(self, job: CaptureJob, take_back: Callable[[CaptureJob], bool]) -> None:
        """One request less waits. ``take_back``: gets a job out of the queue, or says that it has been begun."""
        pair = _pair(job.item)
        with self._lock:
            job.num_waiting -= 1
            if job.num_waiting == 0 and not job.done.done() and take_back(job):
                del self._in_flight[pair]

    def end(self, job: CaptureJob, outcome: Finished | Refused) -> None:
        pair = _pair(job.item)
        with self._lock:
            known = self._in_flight.get(pair)
            if known is None or known[1] is not job:
                return
            del self._in_flight[pair]
            is_stored = isinstance(outcome, Finished) and outcome.item.failure is None
            is_wanted = job.num_waiting > 0
            if isinstance(outcome, Finished) and is_stored and is_wanted:
                self._kept[pair] = _Kept(known[0], outcome.item)
            elif is_stored:
                self._freed.add(pair)
            super().end(job, outcome)
        if is_stored and not is_wanted:
            with contextlib.suppress(FeatureStoreError):
                self.store.abort([pair])

    def refuse_all(self, refused: Refused) -> None:
        """What is in flight gets ``refused``, and nothing more is claimed or put. What is stored stays readable."""
        with self._lock:
            self._closed.set()
            left = [job for _, job in self._in_flight.values()]
        for job in left:
            self.end(job, refused)
        super().refuse_all(refused)

    def close(self, refused: Refused, timeout_s: float, *, leave: bool) -> None:
        """Refuse all, and close the store. ``leave``: what was handed over is put before, and what is readable stays so
        where the store can do that.
        """
        if leave:
            self.drained(timeout_s)
        self.refuse_all(refused)
        self.stop(timeout_s)
        if leave and isinstance(self.store, Outlived):
            self.store.leave()
        else:
            self.store.close()

    def _look(self, items: Sequence[CaptureItem], spec: CaptureSpec) -> None:
        """Learn which of the stored features that are asked for were freed; of all, where they have become many."""
        with self._lock:
            looked_for = {_pair(item) for item in items} & self._kept.keys()
            if len(self._kept) > self._look_at_all_above:
                looked_for = set(self._kept)
                self._look_at_all_above = 2 * len(self._kept)
            kept = {pair: self._kept[pair].item for pair in looked_for}
        live = self._live(list(kept.values()), spec)
        with self._lock:
            for pair in itertools.compress(kept, [not is_live for is_live in live]):
                if self._kept.pop(pair, None) is not None:
                    self._freed.add(pair)
            if len(looked_for) > MAX_REMEMBERED:
                self._look_at_all_above = max(MAX_REMEMBERED, 2 * len(self._kept))

    def _live(self, items: Sequence[CapturedItem], spec: CaptureSpec) -> list[bool]:
        if not items:
            return []
        try:
            return self.store.live([self._ref(item, spec) for item in items])
        except FeatureStoreError as error:
            self._on_broken(error)
            raise Refused("engine", f"the feature store failed: {error}") from error

    def _ref(self, item: CapturedItem, spec: CaptureSpec) -> SampleRef:
        return SampleRef(
            sample_id=item.sample_id,
            generation=item.generation,
            num_tokens=item.num_tokens,
            loss_spans=(),
            store=item.store,
            key=item.key,
            num_bytes=item.num_bytes,
            features=item.features,
            target_revision=self._revision,
            capture_fingerprint=spec.fingerprint,
            worker_id="",
        )

    def _check_same(self, items: Sequence[CaptureItem], spec: CaptureSpec) -> None:
        for item in items:
            pair = _pair(item)
            before = self._kept[pair].asked if pair in self._kept else self._in_flight.get(pair, (None,))[0]
            if before not in (None, _asked(item, spec)):
                raise Refused(
                    "request",
                    f"sample {item.sample_id!r}, generation {item.generation}, was asked for with other tokens or "
                    "another spec before; another attempt has another generation",
                )

    def _is_wanted(self, job: CaptureJob) -> bool:
        pair = _pair(job.item)
        with self._lock:
            known = self._in_flight.get(pair)
            if known is None or known[1] is not job:
                return False
            if not job.num_waiting:
                del self._in_flight[pair]
            return job.num_waiting > 0

    def _written(self, job: CaptureJob, sample: CapturedSample) -> Finished | Refused:
        item = job.item
        request = PutRequest(item.sample_id, item.generation, sample.tensors)
        try:
            stored = put_with_patience(self.store, request, self._store_wait_s, self._closed)
        except FeatureTooLarge as error:
            return job.failed("prompt", str(error))
        except FeatureStoreFull as error:
            return job.failed("store", str(error))
        except FeatureStoreError as error:
            if self._is_taken(_pair(item)):
                return job.failed("store", f"{error}, by another process; ask for it with a new generation")
            # gone before anybody hears of it: whoever asks again finds a store that is opened anew
            self._on_broken(error)
            return Refused("engine", f"{type(error).__name__}: {error}")
        if stored is None:
            return Refused("busy", "the sink was closed")
        return Finished(
            CapturedItem(
                item.sample_id,
                item.generation,
                job.num_tokens,
                stored.store,
                stored.key,
                stored.num_bytes,
                stored.features,
            )
        )

    def _is_taken(self, pair: _Pair) -> bool:
        """Whether there are features in the place of ``pair``, which are those of somebody else."""
        try:
            is_taken = pair in self.store.stored()
        except FeatureStoreError:
            return False
        if is_taken:
            with self._lock:
                self._freed.add(pair)
        return is_taken


def _pair(item: CaptureItem) -> _Pair:
    return item.sample_id, item.generation


def _asked(item: CaptureItem, spec: CaptureSpec) -> int:
    return hash((item.input_ids, spec))
