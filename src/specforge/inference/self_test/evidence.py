"""What a server answers when it is asked for the same prompts alone, again, all at once, and in one request."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from specforge.algorithms.base import TargetTables
from specforge.contracts.capture import FLOAT8, CaptureSpec, TargetInfo
from specforge.contracts.capture_server import (
    CaptureItem,
    CaptureRequest,
    Generate,
    GenerateRequest,
    ServerInfo,
    Sink,
)
from specforge.contracts.tasks import PromptTask
from specforge.errors import PromptRefused, ServerRefused
from specforge.inference.engine import CapturedSample
from specforge.inference.self_test.features import FeatureReader, Features, split
from specforge.inference.self_test.prompts import PromptSet
from specforge.inference.servers.base import CaptureServer, verify_capture

SAMPLE_PREFIX = "self-test/"
"""Of the sample ids of a self-test. Those of a run begin with digits."""
MAX_THREADS = 16
TOLERANCES = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 2e-2, FLOAT8: 6e-2}
"""How far, relative to its norm, a row may be from the same row that was computed in another way, by number format."""
SLACK = 3.0
"""The worst of many rows may be this many times as far as a usual one."""
LONG_TOKENS = 3072
"""Of the long prompt: one and a half times the tokens that engines usually compute in one step."""
MAX_LONG_BYTES = 48 << 20
"""Of its features where they are in the answer."""


class Oracle(Protocol):
    """The target as transformers runs it: what a ``TargetEngine`` captures, and no more."""

    info: TargetInfo

    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterable[CapturedSample]: ...


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What to test: that a server writes what ``spec`` wants of ``target`` to ``sink``, from where ``reader`` reads it.

    ``tables``: the target's embedding and head, on the CPU. ``prompts``: token ids of the run, as many or few as there
    are. ``oracle``: the target itself; without one, layer ids are not verified. ``timeout_s``: of one request.
    ``long_tokens``: of the one long prompt at most, where the server takes as many.
    """

    target: TargetInfo
    spec: CaptureSpec
    sink: Sink
    tables: TargetTables
    reader: FeatureReader
    prompts: Sequence[Sequence[int]] = ()
    oracle: Oracle | None = None
    timeout_s: float = 300.0
    long_tokens: int = LONG_TOKENS


@dataclass(frozen=True, slots=True)
class Evidence:
    """Features of every prompt: ``alone`` in a request of its own, ``again`` right behind that in another generation,
    ``at_once`` with the requests of all others in flight, ``joined`` as an item of one request (in reverse order).

    ``next_tokens`` of ``prompts.next_rows``: what the engine generates there, ``None`` for nothing. None at all where
    the server does not generate, for the reason ``no_generation``. ``long``: features of ``prompts.long``, or why there
    are none.
    """

    info: ServerInfo
    prompts: PromptSet
    alone: list[Features]
    again: list[Features]
    at_once: list[Features]
    joined: list[Features]
    next_tokens: list[int | None]
    no_generation: str
    tolerance: float
    long: Features | str


class CaptureFailed(Exception):
    """Prompts without features; the message lists the reasons."""


def tolerance_of(info: ServerInfo, spec: CaptureSpec) -> float:
    """Of the coarser one of the formats that the target computes in and that features are stored in."""
    coarse = TOLERANCES["bfloat16"]
    return max(TOLERANCES.get(info.dtype.removeprefix("torch."), coarse), TOLERANCES.get(spec.dtype, coarse))


def collect(server: CaptureServer, info: ServerInfo, test: SelfTest, prompts: PromptSet) -> Evidence:
    """Ask ``server``. Raises :class:`CaptureFailed` where a prompt has no features, and what the server raises."""
    asker = _Asker(server, test)
    rows = prompts.rows
    alone, again = [], []
    for row in rows:
        alone += asker.ask([row])
        again += asker.ask([row], again=True)
    with ThreadPoolExecutor(max(1, min(len(rows), info.max_in_flight, MAX_THREADS))) as pool:
        at_once = [features for (features,) in pool.map(lambda row: asker.ask([row]), rows)]
    joined = asker.ask(rows[::-1])[::-1]
    next_tokens, why = _generated(server, test, prompts)
    tolerance = tolerance_of(info, test.spec)
    return Evidence(info, prompts, alone, again, at_once, joined, next_tokens, why, tolerance, _long(asker, prompts))


def long_tokens_of(test: SelfTest, max_tokens: int, short_rope: int | None) -> int:
    """Tokens of the long prompt: no more than have the RoPE of the short ones (``short_rope``), or fit an answer."""
    room = test.long_tokens
    if test.sink.kind == "inline":
        room = min(room, MAX_LONG_BYTES // test.spec.layout(test.target.hidden_size, 1)[1])
    return min(room, max_tokens, short_rope or max_tokens)


def _long(asker: _Asker, prompts: PromptSet) -> Features | str:
    if not prompts.long:
        return "the server takes no prompt that is long enough"
    try:
        (features,) = asker.ask([prompts.long])
    except CaptureFailed as error:
        return f"a prompt of {len(prompts.long)} tokens is not captured: {error}"
    return features


class _Asker:
    """Captures prompts under sample ids of its own; their features are freed once they are read. Thread-safe."""

    def __init__(self, server: CaptureServer, test: SelfTest) -> None:
        self._server, self._test = server, test
        self._name = SAMPLE_PREFIX + secrets.token_hex(4)
        self._numbers = itertools.count()
        self._number = 0

    def ask(self, rows: Sequence[Sequence[int]], again: bool = False) -> list[Features]:
        """Features of ``rows``, captured by one request. ``again``: the next generation of the sample that the only
        thread asked for before.
        """
        items = []
        for row in rows:
            self._number = number = self._number if again else next(self._numbers)
            items.append(CaptureItem(f"{self._name}/{number}", 2 if again else 1, tuple(row)))
        request = CaptureRequest(tuple(items), self._test.spec, self._test.sink, self._test.target.revision)
        try:
            return self._capture(request)
        finally:
            self._test.reader.free([(item.sample_id, item.generation) for item in items])

    def _capture(self, request: CaptureRequest) -> list[Features]:
        test = self._test
        try:
            captured = self._server.capture(request, test.timeout_s)
        except PromptRefused as error:
            raise CaptureFailed(str(error)) from error
        verify_capture(self._server.url, request, captured, test.target)
        failures = [item.failure for item in captured.reply.items if item.failure is not None]
        if failures:
            reasons = dict.fromkeys(f"{failure.whose}: {failure.reason:.300}" for failure in failures)
            raise CaptureFailed("; ".join(reasons))
        found = test.reader.read(request, captured)
        return [split(tensors, test.spec, test.target.hidden_size) for tensors in found]


def _generated(server: CaptureServer, test: SelfTest, prompts: PromptSet) -> tuple[list[int | None], str]:
    """The engine's greedy next tokens behind ``prompts.next_rows``; or why there are none."""
    if not test.spec.last_hidden:
        return [], "last is not captured, so no next tokens follow from it"
    asked = tuple(prompts.rows[prompt][: row + 1] for prompt, row in prompts.next_rows)
    request = GenerateRequest(asked, Generate(max_new_tokens=1), test.target.revision)
    try:
        reply = server.generate(request, test.timeout_s)
    except (ServerRefused, PromptRefused) as error:
        return [], f"the server does not generate: {error}"
    if len(reply.items) != len(asked):
        return [], f"the server was asked for {len(asked)} responses, and gave {len(reply.items)}"
    return [item.token_ids[0] if item.token_ids else None for item in reply.items], ""
