"""Stint: the time of one worker id at one capture server, from its first answer to its first failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.capture_server import CaptureItem, CaptureRequest, GenerateRequest, ServerInfo, Sink
from specforge.contracts.refs import SampleRef
from specforge.control_plane.base import CaptureControl, Lease
from specforge.data_plane.base import FeatureStore, PutRequest, StoredFeatures
from specforge.data_plane.encoding import not_finite
from specforge.errors import (
    EngineError,
    FeatureTooLarge,
    PromptRefused,
    ServerBusy,
    ServerRefused,
    ServerUnavailable,
    StaleGeneration,
)
from specforge.faults import fault_point
from specforge.inference.delivery import put_with_patience, ref_of
from specforge.inference.responses import recorded
from specforge.inference.servers.base import CaptureServer, check_info, own_tensors, verify_capture, verify_responses
from specforge.prompts.responses import ResponseOptions

INFO_S = 10.0
"""The longest that a server may take to say what it is."""
SILENCE_S = 10.0
"""A server that failed one request, and has not answered another for so long, is given up."""
ABANDON_S = 10.0
"""How long requests may take to end after their server was closed."""
TICK_S = 0.25
MAX_FAILURES = 4
"""Samples that may fail one after the other, as if by themselves, before it is the server that is suspected."""

_Pair = tuple[str, int]
"""Sample id and generation."""


@dataclass(frozen=True, slots=True)
class ServedSettings:
    """How samples are captured by servers. ``target`` is the run's, ``sink`` where the features go.

    ``worker_id`` is the process's: every stint has an id below it. ``max_in_flight``: requests of one server.
    ``timeout_s``: of one request; ``poll_s``: of one blocking lease call; ``store_wait_s``: the longest that an inline
    put waits for room. ``responses``: how prompts are answered, ``None`` where none is to be. ``accept`` looks at a
    server and what it says of itself before every stint, and raises as ``CaptureServer.info`` does where it is not to
    be used; ``doubt`` is told the address of one at which ``MAX_FAILURES`` samples failed in a row: it is to be looked
    at anew. A server that fails is asked again after at most ``longest_backoff_s``; a run of which none has captured
    for ``unserved_s`` fails.
    """

    worker_id: str
    spec: CaptureSpec
    target: TargetInfo
    sink: Sink
    max_in_flight: int = 8
    timeout_s: float = 300.0
    longest_backoff_s: float = 30.0
    unserved_s: float = 600.0
    poll_s: float = 1.0
    store_wait_s: float = 300.0
    responses: ResponseOptions | None = None
    accept: Callable[[CaptureServer, ServerInfo], None] | None = None
    doubt: Callable[[str], None] | None = None


class Ending(IntEnum):
    """Why a stint ends. Of two reasons the later one in this list counts."""

    NOT_YET = 0
    REMOVED = 1
    """Nobody lists the server any longer."""
    BUSY = 2
    """The server, or the store that it writes to, takes nothing now."""
    UNAVAILABLE = 3
    REFUSED = 4
    FINISHED = 5
    """No task will ever be offered again."""
    STOPPED = 6
    FAILED = 7
    """This side failed: the control plane, or the store."""


class Stint:
    """lease -> capture -> commit at ``server``, several requests in flight, until something ends it.

    Begins with one request at a time, and doubles after as many samples captured. ``answered`` is called at each, and
    at each that failed by itself. The leases of what is not committed in the end are given back: as those of a worker
    that died where the server failed, else in good order; but for a stint that was stopped or that failed, whose owner
    tells the control plane once for all.

    A sample is held from its lease until it is settled: committed, failed or given back, each of which is decided under
    ``_changed``, so that one excludes the others.
    """

    def __init__(
        self,
        server: CaptureServer,
        worker_id: str,
        control: CaptureControl,
        store: FeatureStore,
        settings: ServedSettings,
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        self.ending = Ending.NOT_YET
        self.error: Exception | None = None
        self.has_leased = False
        self.num_served = 0
        self.waits_for_work = False
        self._server, self._worker_id = server, worker_id
        self._control, self._store, self._settings, self._answered = control, store, settings, answered
        self._changed = threading.Condition()
        self._halted = threading.Event()
        self._held: dict[_Pair, Lease] = {}
        self._in_flight: set[_Pair] = set()
        self._limit, self._most, self._num_at_limit = 1, 1, 0
        self._num_failures = 0
        self._heard_at = 0.0
        self._committing = threading.Lock()
        self._ready: list[tuple[Lease, StoredFeatures]] = []
        self._sign_of_life = 0.0
        self._lease_s = float("inf")

    def work(self) -> None:
        """Until the end, with nothing in flight any more. What ended it is in ``ending`` and ``error``."""
        settings, url = self._settings, self._server.url
        try:
            info = self._server.info(min(settings.timeout_s, INFO_S))
            check_info(url, info, settings.target, settings.spec, settings.sink)
            if settings.accept is not None:
                settings.accept(self._server, info)
        except EngineError as error:
            self._end_by(error)
            return
        self._most = max(1, min(settings.max_in_flight, info.max_in_flight))
        for step in (self._lease, self._drain, self._give_back):
            try:
                step()
            except Exception as error:  # noqa: BLE001 - whoever runs the stints raises it in the run's thread
                self.end(Ending.FAILED, error)

    def end(self, ending: Ending, error: Exception | None = None) -> None:
        """Lease nothing more; from any thread. From ``FINISHED`` on requests in flight are cut off."""
        with self._changed:
            if ending <= self.ending:
                return
            self.ending, self.error = ending, error
            self._changed.notify_all()
        if ending >= Ending.FINISHED:
            self._halted.set()
            self._server.close()

    def _end_by(self, error: EngineError) -> None:
        if isinstance(error, ServerBusy):
            self.end(Ending.BUSY, error)
        else:
            self.end(Ending.REFUSED if isinstance(error, ServerRefused) else Ending.UNAVAILABLE, error)

    # The thread of the stint

    def _lease(self) -> None:
        while room := self._wait_for_room():
            asked_at = time.monotonic()
            # A longer wait would hold up heartbeats, and a stop.
            reply = self._control.lease(self._worker_id, room, min(self._settings.poll_s, self._lease_s / 6))
            self.waits_for_work = not reply.leases and not self._held
            if reply.leases:
                self._begin(reply.leases, asked_at)
            if reply.finished:
                self.end(Ending.FINISHED)

    def _wait_for_room(self) -> int:
        """How many more requests the server may be sent; 0 at the end of the stint."""
        while True:
            self._heartbeat_if_due()
            with self._changed:
                room = self._limit - len(self._in_flight)
                if self.ending or room > 0:
                    return 0 if self.ending else room
                self._changed.wait(TICK_S)

    def _begin(self, leases: tuple[Lease, ...], asked_at: float) -> None:
        fault_point("worker.leased")
        with self._changed:
            if not self._held:
                self._sign_of_life = asked_at
            self.has_leased, self._lease_s = True, leases[0].duration_s
            pairs = [_pair(lease) for lease in leases]
            self._held.update(zip(pairs, leases, strict=True))
            if self.ending:
                return
            self._in_flight.update(pairs)
        for lease in leases:
            threading.Thread(target=self._serve, args=(lease,), name=self._worker_id, daemon=True).start()

    def _drain(self) -> None:
        """Until nothing is in flight. A server that failed may still answer what it has; a silent one is closed."""
        began_at, closed_at = time.monotonic(), None
        while True:
            self._heartbeat_if_due()
            with self._changed:
                if not self._in_flight:
                    return
                self._changed.wait(TICK_S)
                ending, heard_at = self.ending, max(began_at, self._heard_at)
            now = time.monotonic()
            failed = ending in {Ending.UNAVAILABLE, Ending.REFUSED}
            if closed_at is None and (ending >= Ending.FINISHED or (failed and now > heard_at + SILENCE_S)):
                self._halted.set()
                self._server.close()
                closed_at = now
            if closed_at is not None and now > closed_at + ABANDON_S:
                return

    def _give_back(self) -> None:
        """What was not committed is not stored either, nor held any longer."""
        with self._changed:
            self._in_flight.clear()
            left, self._held = list(self._held), {}
        if not left:
            return
        self._store.abort(left)
        if self.ending < Ending.FINISHED:
            self._control.leave(self._worker_id, str(self.error) if self.ending is Ending.UNAVAILABLE else None)

    def _heartbeat_if_due(self) -> None:
        now = time.monotonic()
        if self._held and now - self._sign_of_life > self._lease_s / 3:
            self._control.heartbeat(self._worker_id)
            self._sign_of_life = now

    # A thread a request

    def _serve(self, lease: Lease) -> None:
        try:
            captured = self._capture(lease)
            if captured is not None:
                self._commit(*captured)
        except EngineError as error:
            self._end_by(error)
        except Exception as error:  # noqa: BLE001 - whoever runs the stints raises it in the run's thread
            self.end(Ending.FAILED, error)
        finally:
            with self._changed:
                self._in_flight.discard(_pair(lease))
                self._changed.notify_all()

    def _respond(self, lease: Lease) -> Lease | None:
        """The lease with all tokens of its sample, whose response is generated and recorded where there is none yet.

        ``None``: the prompt failed, which is reported, or the lease is over.
        """
        settings, task, url = self._settings, lease.task, self._server.url
        if not task.num_to_generate:
            return lease
        assert settings.responses is not None, "a prompt is to be answered, but this worker was not told how"
        request = GenerateRequest((task.input_ids,), settings.responses.of(task), settings.target.revision)
        try:
            reply = self._server.generate(request, settings.timeout_s)
        except PromptRefused as error:
            self._fail(lease, str(error))
            return None
        verify_responses(url, request, reply, settings.target)
        self._heard_at = time.monotonic()
        try:
            answered = recorded(self._control, self._worker_id, lease, reply.items[0].token_ids)
        except StaleGeneration:
            self._settled([lease])
            return None
        fault_point("worker.recorded")
        return answered

    def _capture(self, lease: Lease) -> tuple[Lease, StoredFeatures] | None:
        """The features of one sample in the store, and the lease with the tokens that they are of.

        ``None`` where the prompt failed, which is reported, or where nobody wants them any longer.
        """
        settings, url = self._settings, self._server.url
        answered = self._respond(lease)
        if answered is None:
            return None
        task = answered.task
        item = CaptureItem(task.sample_id, lease.generation, task.input_ids)
        request = CaptureRequest((item,), settings.spec, settings.sink, settings.target.revision)
        try:
            captured = self._server.capture(request, settings.timeout_s)
        except PromptRefused as error:
            self._fail(lease, str(error))
            return None
        verify_capture(url, request, captured, settings.target)
        fault_point("worker.captured")
        self._heard_at = time.monotonic()
        (got,), tensors = captured.reply.items, captured.tensors[0]
        if got.failure is not None and got.failure.whose == "store":
            raise ServerBusy(f"the store of the capture server {url} took no features: {got.failure.reason}")
        if got.failure is not None:
            self._fail(lease, f"the capture server {url} cannot capture it: {got.failure.reason}")
            return None
        stored: StoredFeatures | None = StoredFeatures(got.store, got.key, got.num_bytes, got.features)
        if settings.sink.kind == "inline":
            stored = self._put(answered, own_tensors(url, item, tensors))
        if stored is not None:
            self._answered()
        fault_point("worker.stored")
        return None if stored is None else (answered, stored)

    def _put(self, lease: Lease, tensors: dict[str, Tensor]) -> StoredFeatures | None:
        """What came back in the answer, once it is known to be finite."""
        task, url = lease.task, self._server.url
        damaged = not_finite(tensors)
        if damaged is not None:
            self._fail(lease, f"the capture server {url} gave NaN or infinite values in feature {damaged!r}")
            return None
        request = PutRequest(task.sample_id, lease.generation, tensors)
        try:
            return put_with_patience(self._store, request, self._settings.store_wait_s, self._halted)
        except FeatureTooLarge as error:
            self._fail(lease, f"{type(error).__name__}: {error}")
            return None

    def _fail(self, lease: Lease, reason: str) -> None:
        """The sample failed, as it seems by itself. Where one after the other does, the server is suspected."""
        if not self._settled([lease]):
            return
        self._control.fail(self._worker_id, lease.task.sample_id, lease.generation, reason)
        self._answered()
        with self._changed:
            self._num_failures += 1
            is_suspect = self._num_failures == MAX_FAILURES
        if is_suspect:
            url = self._server.url
            if self._settings.doubt is not None:
                self._settings.doubt(url)
            raise ServerUnavailable(
                f"at the capture server {url} {MAX_FAILURES} samples failed one after the other, so that it is "
                f"suspected; the last one: {reason}"
            )

    def _commit(self, lease: Lease, stored: StoredFeatures) -> None:
        """Together with all that others have ready: who comes while one commit is on its way waits for the next."""
        with self._changed:
            self._ready.append((lease, stored))
        with self._committing:
            with self._changed:
                ready, self._ready = self._ready, []
                # Whether a commit that raises was carried out is unknown: its features are no longer ours to free.
                held = self._settled([lease for lease, _ in ready])
            # What came after it was given back is of no use, and nobody else knows of it.
            stale = {_pair(lease) for lease, _ in ready} - held
            ready = [each for each in ready if _pair(each[0]) in held]
            if ready:
                reply = self._control.commit([self._ref(*each) for each in ready])
                stale |= {_pair(each[0]) for each, kept in zip(ready, reply.accepted, strict=True) if not kept}
                self._served(len(ready))
            if stale:
                self._store.abort(sorted(stale))
        fault_point("worker.committed")

    def _settled(self, leases: list[Lease]) -> set[_Pair]:
        """Which of ``leases`` were held until now. They are no longer."""
        with self._changed:
            pairs = {_pair(lease) for lease in leases} & self._held.keys()
            for pair in pairs:
                del self._held[pair]
            return pairs

    def _served(self, num_samples: int) -> None:
        """The server is well: it gets more requests at a time."""
        with self._changed:
            self._num_failures = 0
            self.num_served += num_samples
            self._num_at_limit += num_samples
            if self._num_at_limit >= self._limit:
                self._limit, self._num_at_limit = min(2 * self._limit, self._most), 0

    def _ref(self, lease: Lease, stored: StoredFeatures) -> SampleRef:
        settings = self._settings
        return ref_of(
            lease,
            stored,
            worker_id=self._worker_id,
            target_revision=settings.target.revision,
            spec=settings.spec,
        )


def _pair(lease: Lease) -> _Pair:
    return lease.task.sample_id, lease.generation
