"""What becomes of captured features: each destination has a thread, so that a copy runs beside the next forward."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CapturedItem, CaptureItem
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import FeatureStore, PutRequest, StoredFeatures
from specforge.data_plane.encoding import not_finite
from specforge.data_plane.tensors import materialised
from specforge.data_plane.tombstones import Tombstones
from specforge.errors import FeatureStoreError, FeatureStoreFull, FeatureTooLarge, SpecForgeError
from specforge.inference.engine import CapturedSample
from specforge.inference.servers.base import expected_features
from specforge.inference.serving.jobs import CaptureJob, Finished, Refused

_LOG = logging.getLogger(__name__)

MAX_WAITING = 4
"""Captured samples that wait for one thread; with more the engine takes up other work."""
FIRST_RETRY_S = 0.02
LONGEST_RETRY_S = 0.5
MAX_REMEMBERED = 4096
"""Stored samples of one sink; where there are more, those that were freed are looked for."""

_Pair = tuple[str, int]


@runtime_checkable
class Addressable(Protocol):
    """A store in which the place of a sample is known before it is there, whoever puts it."""

    def key_of(self, pair: tuple[str, int]) -> str: ...


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
    """Ends jobs in a thread of its own. ``has_changed`` is called when there is room again."""

    def __init__(self, name: str, has_changed: Callable[[], None]) -> None:
        self._has_changed = has_changed
        self._waiting: deque[_HandedOver] = deque()
        self._more = threading.Condition()
        self._stopping = False
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
            self._waiting.append(_HandedOver(job, sample, captured))
            self._more.notify()

    def stop(self, timeout_s: float) -> None:
        """Ends what was handed over, and the thread; waits for it up to ``timeout_s``. Idempotent."""
        with self._more:
            self._stopping = True
            self._more.notify()
        self._thread.join(timeout_s)

    def end(self, job: CaptureJob, outcome: Finished | Refused) -> None:
        """See ``Owner``."""
        if isinstance(outcome, Refused):
            job.done.set_exception(outcome)
        else:
            job.done.set_result(outcome)

    def _run(self) -> None:
        stream: torch.cuda.Stream | None = None
        while True:
            with self._more:
                while not self._waiting and not self._stopping:
                    self._more.wait()
                if not self._waiting:
                    return
                handed = self._waiting[0]
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
            self._has_changed()

    def _end_one(self, job: CaptureJob, sample: CapturedSample) -> None:
        if not self._is_wanted(job):
            return
        try:
            damaged = not_finite(sample.tensors)
            if damaged is not None:
                reason = f"the target gave NaN or infinite values in feature {damaged!r}"
                self.end(job, job.failed("prompt", reason))
                return
            self.end(job, self._written(job, sample))
        except SpecForgeError as error:
            self._broke(job, error)
        except Exception as error:  # noqa: BLE001 - a boundary: who asked is told, the server goes on
            _LOG.exception("writing features failed")
            self._broke(job, error)

    def _is_wanted(self, job: CaptureJob) -> bool:
        """Whether anybody still waits; where not, it is as if the job had never been."""
        return job.num_waiting > 0

    def _written(self, job: CaptureJob, sample: CapturedSample) -> Finished:
        """Keeps the features for the answer, in memory of the host."""
        tensors = {name: materialised(source).cpu() for name, source in sample.tensors.items()}
        item = job.item
        return Finished(CapturedItem(item.sample_id, item.generation, job.num_tokens), tensors)

    def _broke(self, job: CaptureJob, error: Exception) -> None:
        self.end(job, Refused("engine", f"{type(error).__name__}: {error}"))


@dataclass(frozen=True, slots=True)
class _Kept:
    """``asked``: hash of tokens and spec."""

    asked: int
    item: CapturedItem


class StoreWriter(Writer):
    """Puts into one store, and remembers what it put: a sample that is asked for again is not captured again.

    What has been freed stays so: its generation is answered with a failure, as the store would drop it. Features that
    nobody waits for any more when they are there are freed at once.
    """

    def __init__(
        self,
        store: FeatureStore,
        target: tuple[str, int],
        store_wait_s: float,
        has_changed: Callable[[], None],
        on_broken: Callable[[Exception], None],
    ) -> None:
        """``target``: its revision and hidden size. ``on_broken`` is told when the store fails, and refuses all."""
        self.store = store
        self._revision, self._hidden_size = target
        self._store_wait_s = store_wait_s
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self._in_flight: dict[_Pair, tuple[int, CaptureJob]] = {}
        self._kept: dict[_Pair, _Kept] = {}
        self._freed = Tombstones()
        self._closed = threading.Event()
        super().__init__(f"put {store.name}", has_changed)

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
                    reason = "it was captured, and freed since; ask for it with a new generation"
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
            known = self._in_flight.pop(pair, None)
            if known is None or job.done.done():
                return
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

    def close(self, refused: Refused, timeout_s: float, *, leave: bool) -> None:
        """Refuse all, and close the store. ``leave``: what is readable stays so where the store can do that."""
        self.refuse_all(refused)
        self.stop(timeout_s)
        if leave and isinstance(self.store, Outlived):
            self.store.leave()
        else:
            self.store.close()

    def _look(self, items: Sequence[CaptureItem], spec: CaptureSpec) -> None:
        """Learn which of the stored features are still there, and which ones another process put."""
        with self._lock:
            asked = {_pair(item): item for item in items}
            looked_for = asked.keys() if len(self._kept) <= MAX_REMEMBERED else asked.keys() | self._kept.keys()
            kept = {pair: self._kept[pair].item for pair in looked_for if pair in self._kept}
            known = self._in_flight.keys() | kept.keys()
            new = [item for pair, item in asked.items() if pair not in known and pair not in self._freed]
        maybe = [self._as_stored(item, spec, self.store) for item in new] if isinstance(self.store, Addressable) else []
        live = self._live([*kept.values(), *maybe], spec)
        with self._lock:
            for pair in itertools.compress(kept, [not is_live for is_live in live]):
                if self._kept.pop(pair, None) is not None:
                    self._freed.add(pair)
            for item, stored in itertools.compress(zip(new, maybe, strict=False), live[len(kept) :]):
                self._kept.setdefault(_pair(item), _Kept(_asked(item, spec), stored))

    def _live(self, items: Sequence[CapturedItem], spec: CaptureSpec) -> list[bool]:
        if not items:
            return []
        try:
            return self.store.live([self._ref(item, spec) for item in items])
        except FeatureStoreError as error:
            self._on_broken(error)
            raise Refused("engine", f"the feature store failed: {error}") from error

    def _as_stored(self, item: CaptureItem, spec: CaptureSpec, store: Addressable) -> CapturedItem:
        """What the reply would say of ``item`` if it is there."""
        num_tokens = len(item.input_ids)
        features, num_bytes = expected_features(spec, self._hidden_size, num_tokens)
        key = store.key_of(_pair(item))
        return CapturedItem(item.sample_id, item.generation, num_tokens, self.store.name, key, num_bytes, features)

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
        with self._lock:
            if not job.num_waiting:
                self._in_flight.pop(_pair(job.item), None)
            return job.num_waiting > 0 and not job.done.done()

    def _written(self, job: CaptureJob, sample: CapturedSample) -> Finished:
        item = job.item
        request = PutRequest(item.sample_id, item.generation, sample.tensors)
        try:
            stored = self._put(request)
        except FeatureTooLarge as error:
            return job.failed("prompt", str(error))
        except FeatureStoreFull as error:
            return job.failed("store", str(error))
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

    def _put(self, request: PutRequest) -> StoredFeatures:
        """Waits for room, longer after every try."""
        give_up_at = time.monotonic() + self._store_wait_s
        wait_s = FIRST_RETRY_S
        while True:
            try:
                return self.store.put([request])[0]
            except FeatureStoreFull:
                if time.monotonic() + wait_s > give_up_at or self._closed.wait(wait_s):
                    raise
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)

    def _broke(self, job: CaptureJob, error: Exception) -> None:
        # gone before anybody hears of it: whoever asks again finds a store that is opened anew
        self._on_broken(error)
        super()._broke(job, error)


def _pair(item: CaptureItem) -> _Pair:
    return item.sample_id, item.generation


def _asked(item: CaptureItem, spec: CaptureSpec) -> int:
    return hash((item.input_ids, spec))
