"""Writes what an engine computed where a request says. Knows no engine.

Legend: S tokens, H hidden size.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge.contracts.capture_server import (
    CapturedItem,
    CaptureItem,
    CaptureRequest,
    InlineSink,
    ItemFailure,
    MooncakeSink,
    SharedDirSink,
    SharedMemorySink,
    Sink,
)
from specforge.contracts.capture_wire import Refusal
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import FeatureStore, PutRequest
from specforge.data_plane.encoding import encoded, not_finite
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.data_plane.sinks import open_sink
from specforge.data_plane.tensors import Source, fill, specs_of
from specforge.errors import (
    ConfigError,
    FeatureStoreError,
    FeatureStoreFull,
    FeatureTooLarge,
)
from specforge.inference.plugins.orders import refusal_of

MAX_REMEMBERED = 65_536
"""Items of one sink that a repeated request is answered with."""
MAX_RECONNECT_S = 5.0
"""How long the engine may wait for a Mooncake master that is away, whatever a sink says."""
MAX_SNAPSHOT_BYTES = 1 << 30
"""Of hidden states that are waiting to be put. More wait for the first of them."""


@dataclass(frozen=True, slots=True)
class RecorderLimits:
    """What requests may make a plug-in do. ``host``: this host's own address, for stores that others connect to.

    ``feature_dirs``: directories below which a ``shared_dir`` may be. ``sink_idle_s``: a sink that was not written to
    for so long makes room for a new one.
    """

    host: str = "127.0.0.1"
    feature_dirs: tuple[str, ...] = ()
    max_sinks: int = 8
    max_feature_bytes: int = 64 << 30
    max_inline_bytes: int = 64 << 20
    sink_idle_s: float = 3600.0


def read_limits(options: dict[str, Any]) -> RecorderLimits:
    """From the options that a user gives a plug-in, where ``host`` is ``advertise_host``. Raises ``ConfigError``."""
    values = {"host" if name == "advertise_host" else name: value for name, value in options.items()}
    defaults = asdict(RecorderLimits())
    for name, value in values.items():
        if name not in defaults or "host" in options:
            known = ", ".join(sorted({"advertise_host", *defaults} - {"host"}))
            raise ConfigError(f"unknown option {name!r} of the SpecForge plug-in; it has {known}")
        if name == "feature_dirs":
            is_right = isinstance(value, list | tuple) and all(isinstance(path, str) for path in value)
        else:
            is_right = isinstance(value, str if name == "host" else int | float) and value is not True
        if not is_right:
            raise ConfigError(
                f"option {name!r} of the SpecForge plug-in may not be {value!r}, its default is {defaults[name]!r}"
            )
    return RecorderLimits(**values | {"feature_dirs": tuple(values.get("feature_dirs", ()))})


def sinks_of(limits: RecorderLimits) -> tuple[str, ...]:
    """Kinds of sinks that can be written to here."""
    directories = ["shared_dir"] if limits.feature_dirs else []
    return ("inline", "shared_memory", *directories, *(["mooncake"] if find_spec("mooncake") is not None else []))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of an order. Both ``None``: done, there is nothing to say."""

    item: CapturedItem | None = None
    refusal: Refusal | None = None
    data: str = ""


@dataclass(slots=True)
class _OpenSink:
    store: FeatureStore
    used_at: float
    items: OrderedDict[tuple[str, int], tuple[CapturedItem, bytes]] = field(default_factory=OrderedDict)
    """By (sample_id, generation), with the digest of what was asked for."""


@dataclass(frozen=True, slots=True)
class _Job:
    ticket: str
    future: Future[Outcome]
    num_bytes: int


class Refused(Exception):
    """An order that cannot be carried out."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


class Recorder:
    """Puts hidden states into the stores of requests, in one thread and in the order in which they were submitted.

    Driven by the engine's steps, in one thread: :meth:`start_step`, any number of submissions, :meth:`collect`. What a
    step submits is collected by the next one at the earliest, so that the puts run beside the engine's computation.

    ``norm`` [S, H] -> [S, H]: the final norm; ``None`` where no request may ask for ``last``. ``named``: how the user
    of this engine writes an option.
    """

    def __init__(
        self,
        limits: RecorderLimits,
        norm: Callable[[Tensor], Tensor] | None,
        clock: Callable[[], float] = time.monotonic,
        named: Callable[[str], str] = str,
    ) -> None:
        self._limits = limits
        self._norm = norm
        self._clock = clock
        self._named = named
        self._step = 0
        self._failures: dict[Sink, tuple[int, str]] = {}
        """Of sinks that failed: in a job of which step at the latest, and why."""
        self._sinks: dict[Sink, _OpenSink] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="specforge-recorder")
        self._submitted: list[_Job] = []
        self._due: list[_Job] = []
        self._stream: Any = None

    def start_step(self) -> None:
        """What was submitted until now is due at the next :meth:`collect`."""
        self._due += self._submitted
        self._submitted = []
        self._step += 1

    def submit_capture(self, ticket: str, request: CaptureRequest, token_ids: Sequence[int], hidden: Tensor) -> None:
        """Record ``request``, of one sample, from ``hidden`` [n, S, H], which nobody else writes to.

        Its layers are those of ``spec.aux_layers`` and then, for ``spec.last_hidden``, the last one before the final
        norm. On an accelerator they are there when what is queued on the current stream is done.
        """
        item = request.items[0]
        asked = replace(request, items=(CaptureItem(item.sample_id, item.generation, tuple(token_ids)),))
        step = self._step
        ready, num_bytes = _event(hidden), hidden.numel() * hidden.element_size()
        while (waiting := self._waiting()) and num_bytes + sum(job.num_bytes for job in waiting) > MAX_SNAPSHOT_BYTES:
            waiting[0].future.result()
        self._submit(ticket, lambda: self._capture(asked, hidden, ready, step), num_bytes)

    def submit_close(self, ticket: str, sink: Sink) -> None:
        """Let go of ``sink``, and of the features that only it holds."""
        self._submit(ticket, lambda: self._close(sink))

    def answer(self, ticket: str, refusal: Refusal) -> None:
        """An order that was refused before there was anything to put."""
        done: Future[Outcome] = Future()
        done.set_result(Outcome(refusal=refusal))
        self._submitted.append(_Job(ticket, done, 0))

    def collect(self) -> dict[str, Outcome]:
        """Outcomes of what is due, by ticket. Waits for them."""
        due, self._due = self._due, []
        return {job.ticket: job.future.result() for job in due}

    def close(self) -> None:
        """The engine ends: what readers may still want stays for them. Idempotent."""
        self._writer.shutdown()
        for opened in self._sinks.values():
            _leave(opened.store)
        self._sinks.clear()

    def _waiting(self) -> list[_Job]:
        return [job for job in (*self._due, *self._submitted) if not job.future.done()]

    def _submit(self, ticket: str, work: Callable[[], Outcome], num_bytes: int = 0) -> None:
        self._submitted.append(_Job(ticket, self._writer.submit(_answered, work), num_bytes))

    def _close(self, sink: Sink) -> Outcome:
        self._failures.pop(sink, None)
        opened = self._sinks.pop(sink, None)
        if opened is not None:
            opened.store.close()
        return Outcome()

    def _capture(self, request: CaptureRequest, hidden: Tensor, ready: Any, step: int) -> Outcome:
        failed_in, why = self._failures.get(request.sink, (-1, ""))
        if step <= failed_in:
            # the engine waits for every put: one wait a step for a store that is away is enough
            raise _refused("engine", why)
        try:
            return self._captured(request, hidden, ready)
        except FeatureStoreError as error:
            self._failures[request.sink] = step, str(error)
            raise

    def _captured(self, request: CaptureRequest, hidden: Tensor, ready: Any) -> Outcome:
        with self._beside(ready, hidden.device):
            known = self._known(request)
            if known is not None:
                return known
            tensors = self._features(request, hidden)
            broken = not_finite(tensors)
            if broken is not None:
                return _failed(request, "prompt", f"the target gives NaN or infinity in feature {broken!r}")
            if isinstance(request.sink, InlineSink):
                return self._inline(request, tensors)
            return self._put(request, tensors)

    def _beside(self, ready: Any, device: torch.device) -> AbstractContextManager[object]:
        """A stream of our own, so that copies do not queue behind the engine's next step."""
        if ready is None:
            return nullcontext()
        ready.synchronize()
        module = torch.get_device_module(device)
        if self._stream is None:
            self._stream = module.Stream(device)
        return module.stream(self._stream)  # type: ignore[no-any-return]

    def _features(self, request: CaptureRequest, hidden: Tensor) -> dict[str, Source]:
        spec, layers = request.spec, list(hidden)
        tensors: dict[str, Source] = {"input_ids": torch.tensor(request.items[0].input_ids, dtype=torch.int32)}
        if spec.aux_layers:
            tensors |= encoded("aux", layers[: len(spec.aux_layers)], spec.dtype)
        if spec.last_hidden:
            assert self._norm is not None
            tensors |= encoded("last", [self._norm(layers[-1])], spec.dtype)
        return tensors

    def _put(self, request: CaptureRequest, tensors: dict[str, Source]) -> Outcome:
        item, sink = request.items[0], request.sink
        opened = self._opened(sink)
        try:
            stored = opened.store.put([PutRequest(item.sample_id, item.generation, tensors)])[0]
        except FeatureStoreFull as error:
            return _failed(request, "store", str(error))
        except FeatureTooLarge as error:
            return _failed(request, "prompt", str(error))
        except FeatureStoreError:
            # Broken, or closed by another hand: the next request opens it anew.
            del self._sinks[sink]
            _leave(opened.store)
            raise
        num_tokens, parts = len(item.input_ids), (stored.store, stored.key, stored.num_bytes, stored.features)
        found = CapturedItem(item.sample_id, item.generation, num_tokens, *parts)
        opened.items[item.sample_id, item.generation] = found, _digest(request)
        while len(opened.items) > MAX_REMEMBERED:
            opened.items.popitem(last=False)
        return Outcome(found)

    def _inline(self, request: CaptureRequest, tensors: dict[str, Source]) -> Outcome:
        item = request.items[0]
        specs, num_bytes = specs_of(tensors)
        if num_bytes > self._limits.max_inline_bytes:
            return _failed(
                request,
                "prompt",
                f"the features of {len(item.input_ids)} tokens have {num_bytes:,} bytes, inline answers at most "
                f"{self._limits.max_inline_bytes:,}; use a feature store, shorter samples, or a larger "
                f"{self._named('max_inline_bytes')}",
            )
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        fill(buffer, specs, tensors)
        kind, num_tokens = request.sink.kind, len(item.input_ids)
        found = CapturedItem(item.sample_id, item.generation, num_tokens, kind, "0", num_bytes, specs)
        return Outcome(found, data=base64.b64encode(buffer.numpy().data).decode())

    def _known(self, request: CaptureRequest) -> Outcome | None:
        """The answer to a sample and generation that was put before; ``None`` for one that was not."""
        opened = self._sinks.get(request.sink)
        item = request.items[0]
        remembered = opened.items.get((item.sample_id, item.generation)) if opened is not None else None
        if opened is None or remembered is None:
            return None
        found, digest = remembered
        opened.used_at = self._clock()
        if digest != _digest(request):
            return _failed(
                request, "store", "it was captured from other tokens or for another spec; ask with a new generation"
            )
        if not opened.store.live([_ref(found)])[0]:
            return _failed(request, "store", "its features were freed; ask with a new generation")
        return Outcome(found)

    def _opened(self, sink: Sink) -> _OpenSink:
        opened = self._sinks.get(sink)
        if opened is None:
            self._check_permitted(sink)
            self._make_room()
            clamped = sink
            if isinstance(sink, MooncakeSink):
                clamped = replace(sink, reconnect_s=min(sink.reconnect_s, MAX_RECONNECT_S))
            opened = self._sinks[sink] = _OpenSink(open_sink(clamped, self._limits.host), 0.0)
            self._failures.pop(sink, None)
        opened.used_at = self._clock()
        return opened

    def _check_permitted(self, sink: Sink) -> None:
        if isinstance(sink, SharedDirSink):
            path = Path(sink.path).resolve()
            if not any(path.is_relative_to(Path(allowed).resolve()) for allowed in self._limits.feature_dirs):
                permitted = ", ".join(self._limits.feature_dirs) or "none"
                raise _refused(
                    "request",
                    f"{sink.path} is not below a directory that this server may write to ({permitted}); start it with "
                    f"that in {self._named('feature_dirs')}",
                )
        if isinstance(sink, SharedMemorySink):
            taken = sum(other.capacity_bytes for other in self._sinks if isinstance(other, SharedMemorySink))
            if taken + sink.capacity_bytes > self._limits.max_feature_bytes:
                raise _refused(
                    "request",
                    f"an arena of {sink.capacity_bytes:,} bytes beside {taken:,} is more than the "
                    f"{self._limits.max_feature_bytes:,} of this server; make the run's store smaller or "
                    f"{self._named('max_feature_bytes')} larger",
                )

    def _make_room(self) -> None:
        if len(self._sinks) < self._limits.max_sinks:
            return
        oldest = min(self._sinks, key=lambda sink: self._sinks[sink].used_at)
        if self._clock() - self._sinks[oldest].used_at < self._limits.sink_idle_s:
            raise _refused(
                "busy",
                f"{len(self._sinks)} feature stores are open here, the most that {self._named('max_sinks')} allows; "
                "end a run, or start the server with more",
            )
        _leave(self._sinks.pop(oldest).store)


def _answered(work: Callable[[], Outcome]) -> Outcome:
    """An engine must survive whatever an order leads to: what goes wrong is its answer."""
    try:
        return work()
    except Refused as refused:
        return Outcome(refusal=refused.refusal)
    except Exception as error:  # noqa: BLE001 - the boundary to the engine
        return Outcome(refusal=refusal_of(error))


def _event(hidden: Tensor) -> Any:
    """Done when what was queued until now on the accelerator is; ``None`` on a CPU."""
    if hidden.device.type == "cpu":
        return None
    event = torch.get_device_module(hidden.device).Event()
    event.record()
    return event


def _failed(request: CaptureRequest, whose: Any, reason: str) -> Outcome:
    item = request.items[0]
    failure = ItemFailure(whose, reason)
    return Outcome(CapturedItem(item.sample_id, item.generation, len(item.input_ids), failure=failure))


def _refused(what: Any, reason: str) -> Refused:
    return Refused(Refusal(what, reason))


def _digest(request: CaptureRequest) -> bytes:
    """Of the tokens, and of what is captured of them."""
    tokens = torch.tensor(request.items[0].input_ids, dtype=torch.int64).numpy().tobytes()
    return hashlib.sha256(request.spec.fingerprint.encode() + tokens).digest()


def _ref(item: CapturedItem) -> SampleRef:
    """As much of a ref as a store needs."""
    return SampleRef(
        sample_id=item.sample_id,
        generation=item.generation,
        num_tokens=item.num_tokens,
        loss_spans=(),
        store=item.store,
        key=item.key,
        num_bytes=item.num_bytes,
        features=item.features,
        target_revision="",
        capture_fingerprint="",
        worker_id="",
    )


def _leave(store: FeatureStore) -> None:
    """Close ``store``; features that readers may want stay for them."""
    if isinstance(store, SharedMemoryFeatureStore):
        store.leave()
    else:
        store.close()
