"""The stores that requests name: opened when they are first mentioned, bounded, and closed when nobody uses them."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from specforge.contracts.capture import TargetInfo
from specforge.contracts.capture_server import InlineSink, MooncakeSink, SharedDirSink, SharedMemorySink, Sink
from specforge.contracts.capture_wire import What
from specforge.data_plane.arena import ArenaName, ArenaShape
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore, collect_orphans
from specforge.data_plane.sinks import open_sink
from specforge.errors import ConfigError, FeatureStoreError, UserError
from specforge.inference.serving.jobs import Refused
from specforge.inference.serving.settings import ServingSettings
from specforge.inference.serving.writers import Outlived, StoreWriter

_LOG = logging.getLogger(__name__)

OPEN_S = 30.0
"""How long a request waits for its store to be opened, and a store for a master that is away."""
CLOSE_S = 5.0
"""How long a store may take to end what it has in hand before it is closed."""
REMEMBER_S = 600.0
"""How long it is known when a sink was closed: longer than a request takes from its arrival to its sink."""

MAX_RECONNECT_S = 3600.0
MIN_ARENA_BYTES = 4096
MAX_ARENA_BYTES = 1 << 50
MAX_ARENA_SAMPLES = 1 << 24

_Run = tuple[str, str]
"""Kind and run id of a sink."""


class OpenSink:
    """One sink from its first mention on. ``num_users``: requests that are worked on; ``last_used`` in seconds;
    ``opened``: its writer, or the :class:`Refused` that it cannot be opened with.
    """

    def __init__(self, sink: Sink, num_bytes: int) -> None:
        self.sink = sink
        self.num_bytes = num_bytes
        self.num_users = 0
        self.last_used = time.monotonic()
        self.opened: Future[StoreWriter] = Future()
        self.opened.set_running_or_notify_cancel()  # who gives up waiting does not end it for the others
        self._lock = threading.Lock()
        self._end: tuple[Refused, bool] | None = None

    @property
    def writer(self) -> StoreWriter | None:
        """``None``: not opened (yet)."""
        is_open = self.opened.done() and self.opened.exception() is None
        return self.opened.result() if is_open else None

    @property
    def holds_features(self) -> bool:
        """Whether its close would take features from their readers."""
        writer = self.writer
        if writer is None or not isinstance(writer.store, Outlived):
            return False
        try:
            return writer.store.health().num_samples > 0
        except FeatureStoreError:
            return False

    def wait(self, timeout_s: float) -> StoreWriter:
        """The writer, once it is open. Raises :class:`Refused`."""
        try:
            return self.opened.result(timeout_s)
        except TimeoutError:
            raise still_opening() from None
        except Refused as refused:
            raise Refused(refused.what, str(refused)) from None

    def open(self, connect: Callable[[], StoreWriter]) -> None:
        """Once, in a thread of its own."""
        writer: StoreWriter | None = None
        try:
            writer = connect()
        except Refused as error:
            refused = error
        except Exception as error:  # noqa: BLE001 - the end of a thread: who waits is told
            _LOG.exception("opening %s failed", self.sink)
            refused = Refused("engine", f"the feature store cannot be opened: {type(error).__name__}: {error}")
        with self._lock:
            end = self._end
            if writer is not None and end is None:
                self.opened.set_result(writer)
                return
        if writer is not None and end is not None:
            refused = end[0]
            _close(writer, *end)
        self.opened.set_exception(refused)

    def close(self, refused: Refused, *, leave: bool) -> None:
        """Does not wait for one that is still being opened: that is closed when it is open."""
        with self._lock:
            self._end = (refused, leave)
            writer = self.writer
        if writer is not None:
            _close(writer, refused, leave)


def still_opening() -> Refused:
    return Refused("busy", f"the store was not open after {OPEN_S:g} s; send the request again later")


def _close(writer: StoreWriter, refused: Refused, leave: bool) -> None:
    with contextlib.suppress(FeatureStoreError):
        writer.close(refused, CLOSE_S, leave=leave)


class OpenSinks:
    """The sinks of one server, whose ``target`` they are for. ``has_changed``: one has room again; ``on_failed``: the
    server is lost.
    """

    def __init__(
        self,
        settings: ServingSettings,
        target: TargetInfo,
        has_changed: Callable[[], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._settings = settings
        self._target = target
        self._has_changed = has_changed
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._open: dict[Sink, OpenSink] = {}
        self._broken: dict[_Run, OpenSink] = {}
        """Not used any more, and kept because their features would go with them: the last one of a run."""
        self._closed: dict[_Run, float] = {}
        """When the runs of the last minutes were over."""
        limit = settings.max_feature_bytes
        if limit is None:
            limit = shutil.disk_usage(SHARED_MEMORY).total // 2 if SHARED_MEMORY.is_dir() else 0
        self._max_bytes = limit

    @property
    def kinds(self) -> tuple[str, ...]:
        """What requests may name here."""
        found = ["inline"]
        if SHARED_MEMORY.is_dir():
            found.append("shared_memory")
        if self._settings.feature_dirs:
            found.append("shared_dir")
        if importlib.util.find_spec("mooncake") is not None:
            found.append("mooncake")
        return tuple(found)

    def acquire(self, sink: Sink, asked_at: float) -> OpenSink:
        """The sink, open or about to be, until :meth:`release`. ``asked_at``: when the request came, by the monotonic
        clock; one from before the sink was closed does not open it again. Raises :class:`Refused`.
        """
        num_bytes = self._checked(sink)
        self.close_idle()
        with self._lock:
            is_short = sink not in self._open and self._lacking(sink, num_bytes) is not None
        if is_short:
            self._close_unused(even_with_features=True)
        with self._lock:
            if asked_at <= self._closed.get(_run(sink), -math.inf):
                raise Refused("busy", "the sink was closed while the request came in: its run is over")
            entry = self._open.get(sink)
            is_new = entry is None
            if entry is None:
                lacking = self._lacking(sink, num_bytes)
                if lacking is not None:
                    raise Refused("busy", lacking)
                entry = self._open[sink] = OpenSink(sink, num_bytes)
            entry.num_users += 1
        if is_new:
            _LOG.info("opening %s", sink)
            threading.Thread(target=self._open_now, args=(entry,), name="open sink", daemon=True).start()
        return entry

    def release(self, entry: OpenSink) -> None:
        with self._lock:
            entry.num_users -= 1
            entry.last_used = time.monotonic()

    def close(self, sink: Sink) -> None:
        """The run is over. Whatever was put for it goes, with whatever sizes the sink was named, and what earlier
        servers of this host left of it.
        """
        run, now = _run(sink), time.monotonic()
        with self._lock:
            self._closed = {run: at for run, at in self._closed.items() if at > now - REMEMBER_S} | {run: now}
            entries = [entry for entry in self._entries() if _run(entry.sink) == run]
            self._remove(entries)
        for entry in entries:
            _LOG.info("closing %s", entry.sink)
            entry.close(Refused("busy", "the sink was closed: its run is over"), leave=False)
        if isinstance(sink, SharedMemorySink) and SHARED_MEMORY.is_dir():
            with contextlib.suppress(ConfigError):
                collect_orphans(ArenaName.new(sink.run_id).run_id)

    def close_idle(self) -> None:
        """Those that nobody has used for long, and that hold nothing for a reader."""
        self._close_unused(even_with_features=False)

    def writers(self) -> list[StoreWriter]:
        with self._lock:
            entries = self._entries()
        return [entry.writer for entry in entries if entry.writer is not None]

    def leave_all(self) -> None:
        """This server ends, and the runs go on: what is readable stays so where the store can do that."""
        with self._lock:
            entries = self._entries()
            self._remove(entries)
        refused = Refused("busy", "the server is stopping")
        closing = [_in_background(entry, refused, leave=True) for entry in entries]
        deadline = time.monotonic() + 2 * CLOSE_S
        for thread in closing:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _close_unused(self, *, even_with_features: bool) -> None:
        oldest = time.monotonic() - self._settings.sink_idle_s
        with self._lock:
            idle = [
                entry
                for entry in self._entries()
                if not entry.num_users and entry.last_used < oldest and (even_with_features or not entry.holds_features)
            ]
            self._remove(idle)
        for entry in idle:
            _LOG.warning("closing %s: unused for %g s", entry.sink, self._settings.sink_idle_s)
            _in_background(entry, Refused("busy", "the sink was closed: it was not used for long"), leave=False)

    def _open_now(self, entry: OpenSink) -> None:
        entry.open(lambda: self._connect(entry))
        if entry.writer is None:
            with self._lock:
                self._remove([entry])

    def _connect(self, entry: OpenSink) -> StoreWriter:
        return StoreWriter(
            self._opened(entry.sink),
            self._target.revision,
            self._settings.store_wait_s,
            self._has_changed,
            self._on_failed,
            lambda error: self._broke(entry, error),
        )

    def _broke(self, entry: OpenSink, error: Exception) -> None:
        """Told by whoever notices it, once or more often."""
        run, writer = _run(entry.sink), entry.writer
        assert writer is not None, "a store that breaks was opened before"
        with self._lock:
            if self._open.get(entry.sink) is not entry:
                return
            del self._open[entry.sink]
            useless: OpenSink | None = entry
            if isinstance(writer.store, Outlived):
                useless, self._broken[run] = self._broken.get(run), entry
        _LOG.error("%s failed: %s", entry.sink, error)
        refused = Refused("engine", f"the feature store failed: {type(error).__name__}: {error}")
        writer.refuse_all(refused)
        if useless is not None:
            # not from the thread of the store itself, which may be the one that says so
            _in_background(useless, refused, leave=useless is entry)

    def _opened(self, sink: Sink) -> FeatureStore:
        try:
            if isinstance(sink, SharedMemorySink):
                # room that earlier servers of the run still hold though nothing can be read there any more
                with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as others:
                    others.gc()
            if isinstance(sink, MooncakeSink):
                sink = replace(sink, reconnect_s=min(sink.reconnect_s, OPEN_S))
            return open_sink(sink, self._settings.advertise_host)
        except FeatureStoreError as error:
            raise Refused("engine", f"the feature store cannot be opened: {error}") from error
        except (UserError, OSError) as error:
            # what an arena's sink may have wrong was found before: a host that is full may have room later
            what: What = "busy" if isinstance(sink, SharedMemorySink) else "request"
            raise Refused(what, str(error)) from error

    def _entries(self) -> list[OpenSink]:
        return [*self._open.values(), *self._broken.values()]

    def _remove(self, entries: list[OpenSink]) -> None:
        for entry in entries:
            if self._open.get(entry.sink) is entry:
                del self._open[entry.sink]
            elif self._broken.get(_run(entry.sink)) is entry:
                del self._broken[_run(entry.sink)]

    def _checked(self, sink: Sink) -> int:
        """Bytes of memory that ``sink`` takes here. Raises :class:`Refused` for one that is never opened here."""
        if isinstance(sink, SharedMemorySink):
            return self._check_arena(sink)
        if isinstance(sink, SharedDirSink):
            self._check_directory(sink)
            return 0
        assert isinstance(sink, MooncakeSink), "inline features have no store"
        if sink.buffer_bytes < 1 or not 0.0 <= sink.reconnect_s <= MAX_RECONNECT_S:
            raise Refused(
                "request",
                f"expected a buffer of some bytes and 0 to {MAX_RECONNECT_S:g} s to reconnect, got "
                f"{sink.buffer_bytes} bytes and {sink.reconnect_s} s",
            )
        return self._within(sink.buffer_bytes)

    def _check_arena(self, sink: SharedMemorySink) -> int:
        try:
            ArenaName.new(sink.run_id)
        except ConfigError as error:
            raise Refused("request", str(error)) from None
        if not (
            MIN_ARENA_BYTES <= sink.capacity_bytes <= MAX_ARENA_BYTES and 0 < sink.max_samples <= MAX_ARENA_SAMPLES
        ):
            raise Refused(
                "request",
                f"expected an arena of {MIN_ARENA_BYTES:,} bytes or more and up to {MAX_ARENA_SAMPLES:,} samples, got "
                f"{sink.capacity_bytes:,} bytes and {sink.max_samples:,} samples",
            )
        return self._within(ArenaShape(sink.capacity_bytes, sink.max_samples).file_bytes)

    def _check_directory(self, sink: SharedDirSink) -> None:
        path = Path(sink.path)
        allowed = [directory.resolve() for directory in self._settings.feature_dirs]
        if "\0" in sink.path or not path.is_absolute() or not any(map(path.resolve().is_relative_to, allowed)):
            named = ", ".join(map(str, allowed)) or "no directory"
            raise Refused(
                "request",
                f"this server writes features below {named}, and was asked to write to {sink.path}; start it with "
                f"--feature-dir {sink.path}",
            )

    def _within(self, num_bytes: int) -> int:
        if num_bytes > self._max_bytes:
            raise Refused(
                "request",
                f"the sink takes {num_bytes:,} bytes, this server gives {self._max_bytes:,} at most to all; start it "
                "with a larger --max-feature-bytes, or make the store smaller",
            )
        return num_bytes

    def _lacking(self, sink: Sink, num_bytes: int) -> str | None:
        """Why ``sink`` cannot be opened now. The broken store that it takes the place of is not held against it."""
        if len(self._open) >= self._settings.max_sinks:
            return (
                f"{len(self._open)} sinks are open, as many as there may be (--max-sinks); close those of runs that "
                "are over, or wait"
            )
        others = [*self._open.values(), *(entry for run, entry in self._broken.items() if run != _run(sink))]
        used = sum(entry.num_bytes for entry in others)
        if used + num_bytes > self._max_bytes:
            return (
                f"the sink takes {num_bytes:,} bytes, and other sinks have {used:,} of {self._max_bytes:,} "
                "(--max-feature-bytes); wait until their runs are over"
            )
        return None


def _run(sink: Sink) -> _Run:
    assert not isinstance(sink, InlineSink), "inline features have no store"
    return sink.kind, sink.run_id


def _in_background(entry: OpenSink, refused: Refused, *, leave: bool) -> threading.Thread:
    """Close it in a thread: a store may take its time."""
    thread = threading.Thread(
        target=entry.close, args=(refused,), kwargs={"leave": leave}, name="close sink", daemon=True
    )
    thread.start()
    return thread
