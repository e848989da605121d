"""ServerTargetEngine: live capture servers as the ``TargetEngine`` of a process. Features come back in the answers."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.capture_server import CaptureItem, CaptureRequest, Generate, GenerateRequest
from specforge.contracts.tasks import PromptTask
from specforge.errors import EngineError, PromptRefused, ServerBusy, ServerRefused, ServerUnavailable
from specforge.inference.engine import CapturedSample, Generation
from specforge.inference.servers.base import (
    INLINE,
    CaptureServer,
    check_info,
    own_tensors,
    verify_capture,
    verify_responses,
)
from specforge.inference.servers.stint import INFO_S
from specforge.inference.servers.terms import Terms

_LOG = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 10.0
MAX_ATTEMPTS = 4
"""Servers that may fail at one request, at least; that many for each server where there are more."""
PROMPTS_AT_A_TIME = 16

_GENERATION_ONLY = CaptureSpec((), last_hidden=False)
_ResultT = TypeVar("_ResultT")


class ServerTargetEngine:
    """``TargetEngine`` over ``servers``, which it closes. Safe to call from several threads.

    Each server works on up to ``max_in_flight`` requests. What one fails at is asked of another, or of the same one
    later; one that cannot serve at all is asked no more. Raises ``PromptRefused`` for a prompt that cannot be captured;
    ``ServerUnavailable`` where servers failed ``MAX_ATTEMPTS`` times at one request, or none answers, or all are busy,
    for ``patience_s``; ``ServerRefused`` where none is left: each with the reasons of all.
    """

    def __init__(
        self,
        servers: Sequence[CaptureServer],
        info: TargetInfo,
        max_in_flight: int = 8,
        timeout_s: float = 300.0,
        patience_s: float = 60.0,
        terms: Terms | None = None,
    ) -> None:
        self.info = info
        self._terms = terms or Terms()
        self._max_in_flight, self._timeout_s, self._patience_s = max_in_flight, timeout_s, patience_s
        self._desks = [_Desk(server) for server in servers]
        self._changed = threading.Condition()
        self._closed = False

    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterator[CapturedSample]:
        """See ``TargetEngine``. Asks for later samples before earlier ones are there: a few more than are in flight."""
        yield from self._in_order([partial(self._capture, task, spec) for task in tasks])

    def generate(self, prompts: Sequence[Sequence[int]], options: Generate) -> list[Generation]:
        """See ``TargetEngine``. A server may batch prompts, where greedy ones may fall otherwise than alone."""
        size = PROMPTS_AT_A_TIME
        parts = [tuple(map(tuple, prompts[start : start + size])) for start in range(0, len(prompts), size)]
        requests = [GenerateRequest(part, options, self.info.revision) for part in parts]
        found = self._in_order([partial(self._generate, request) for request in requests])
        return [generation for part in found for generation in part]

    def close(self) -> None:
        """Idempotent. Ends what is in flight, with ``ServerUnavailable``."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for desk in self._desks:
            desk.server.close()

    def _in_order(self, works: Sequence[Callable[[], _ResultT]]) -> Iterator[_ResultT]:
        """Results of ``works``, several at work ahead of the one that is waited for."""
        ahead = min(len(works), len(self._desks) * self._max_in_flight)
        if ahead <= 1:
            yield from (work() for work in works)
            return
        waiting: deque[Future[_ResultT]] = deque()
        todo = iter(works)
        pool = ThreadPoolExecutor(ahead, thread_name_prefix="capture")
        try:
            for work in itertools.islice(todo, ahead + 1):
                waiting.append(pool.submit(work))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(work) for work in itertools.islice(todo, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _capture(self, task: PromptTask, spec: CaptureSpec) -> CapturedSample:
        numbers = itertools.count(1)

        def ask(server: CaptureServer) -> CapturedSample:
            # A server must not answer with what it made for an earlier, failed attempt.
            item = CaptureItem(task.sample_id, next(numbers), task.input_ids)
            request = CaptureRequest((item,), spec, INLINE, self.info.revision)
            captured = server.capture(request, self._timeout_s)
            verify_capture(server.url, request, captured, self.info)
            failure, tensors = captured.reply.items[0].failure, captured.tensors[0]
            if failure is not None:
                kind = PromptRefused if failure.whose == "prompt" else ServerBusy
                raise kind(f"the capture server {server.url} cannot capture {task.sample_id!r}: {failure.reason}")
            return CapturedSample(task.sample_id, dict(own_tensors(server.url, item, tensors)))

        return self._ask(ask, spec)

    def _generate(self, request: GenerateRequest) -> list[Generation]:
        def ask(server: CaptureServer) -> list[Generation]:
            reply = server.generate(request, self._timeout_s)
            verify_responses(server.url, request, reply, self.info)
            return [Generation(item.token_ids, item.stopped) for item in reply.items]

        return self._ask(ask, _GENERATION_ONLY)

    def _ask(self, ask: Callable[[CaptureServer], _ResultT], spec: CaptureSpec) -> _ResultT:
        """What ``ask`` gets of the first server that does not fail it."""
        num_failures, busy_since = 0, float("inf")
        while True:
            desk = self._sit(spec)
            try:
                result = ask(desk.server)
            except PromptRefused:
                self._rise(desk, None)
                raise
            except ServerBusy as error:
                self._rise(desk, error)
                # It did not try: that is no failure, but it may not go on for ever.
                busy_since = min(busy_since, time.monotonic())
                if time.monotonic() - busy_since > self._patience_s:
                    raise ServerUnavailable(
                        self._said(f"no capture server has had room for {self._patience_s:g} s")
                    ) from error
            except EngineError as error:
                self._rise(desk, error)
                num_failures += isinstance(error, ServerUnavailable)
                if num_failures >= max(MAX_ATTEMPTS, len(self._desks)):
                    raise ServerUnavailable(self._said(f"{num_failures} requests for the same failed")) from error
                busy_since = float("inf")
            else:
                self._rise(desk, None)
                return result

    def _sit(self, spec: CaptureSpec) -> _Desk:
        """The server with the fewest failures and most room, once there is one that answers and that fits ``spec``.

        It has one request more.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            desk = self._free_desk(deadline)
            try:
                self._check(desk, spec)
            except EngineError as error:
                self._rise(desk, error)
                continue
            return desk

    def _free_desk(self, deadline: float) -> _Desk:
        with self._changed:
            while True:
                now = time.monotonic()
                usable = [desk for desk in self._desks if not desk.refused]
                if self._closed:
                    raise ServerUnavailable("the connections to the capture servers were closed")
                if not usable:
                    raise ServerRefused(self._said("no capture server can serve this run"))
                well = [desk for desk in usable if desk.rests_until <= now]
                if not well and now > deadline:
                    raise ServerUnavailable(self._said(f"no capture server has answered for {self._patience_s:g} s"))
                free = [desk for desk in well if desk.num_in_flight < min(desk.most, self._max_in_flight)]
                if free:
                    desk = min(free, key=lambda desk: (desk.num_failures, desk.num_in_flight))
                    desk.num_in_flight += 1
                    return desk
                # Full ones are told of; a resting one comes back by itself.
                deadline = max(deadline, now + self._patience_s) if well else deadline
                rests = [desk.rests_until - now for desk in usable if desk.rests_until > now]
                self._changed.wait(min(rests, default=None))

    def _check(self, desk: _Desk, spec: CaptureSpec) -> None:
        """Ask the server what it is, the first time and after each failure."""
        if spec in desk.fits:
            return
        info = desk.server.info(min(INFO_S, self._timeout_s))
        if spec is _GENERATION_ONLY:
            info = replace(info, sinks=(INLINE.kind,))  # responses need none
        check_info(desk.server.url, info, self.info, spec, INLINE)
        self._terms.accept(desk.server.url, info)
        with self._changed:
            desk.fits.add(spec)
            desk.most = max(1, info.max_in_flight)

    def _rise(self, desk: _Desk, error: EngineError | None) -> None:
        """One request less for it; it rests for a while after a failure, and is used no more after a refusal."""
        with self._changed:
            desk.num_in_flight -= 1
            if error is None:
                desk.num_failures = 0
            elif desk.rests_until <= time.monotonic():  # else it is known: several requests fail together
                if str(error) != desk.trouble and not self._closed:
                    _LOG.warning("%s", error)
                desk.trouble = str(error)
                desk.fits.clear()
                desk.num_failures += 1
                rest_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(desk.num_failures - 1, 16))
                desk.rests_until = time.monotonic() + rest_s
            desk.refused |= isinstance(error, ServerRefused)
            self._changed.notify_all()

    def _said(self, what: str) -> str:
        reasons = "; ".join(desk.trouble or f"{desk.server.url}: no answer yet" for desk in self._desks)
        return f"{what}: {reasons or 'none is named, give target.servers some urls'}"


@dataclass(slots=True, eq=False)
class _Desk:
    """What is known of one server. ``num_failures``: one after the other, up to now. ``fits``: what it was found to be
    able to capture since the last of them.
    """

    server: CaptureServer
    num_in_flight: int = 0
    most: int = 1
    num_failures: int = 0
    rests_until: float = 0.0
    refused: bool = False
    trouble: str = ""
    fits: set[CaptureSpec] = field(default_factory=set)
