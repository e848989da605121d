"""The stores that requests name: opened when they are first mentioned, bounded, and closed when nobody uses them."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from specforge.contracts.capture import TargetInfo
from specforge.contracts.capture_server import MooncakeSink, SharedDirSink, SharedMemorySink, Sink
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

CLOSE_S = 5.0
"""How long a store may take to end what it has in hand before it is closed."""


MAX_RECONNECT_S = 3600.0
MIN_ARENA_BYTES = 4096
MAX_ARENA_BYTES = 1 << 50
MAX_ARENA_SAMPLES = 1 << 24


class OpenSink:
    """One sink from its first mention on. ``num_users``: requests that are worked on; ``last_used`` in seconds."""

    def __init__(self, sink: Sink, num_bytes: int) -> None:
        self.sink = sink
        self.num_bytes = num_bytes
        self.num_users = 0
        self.last_used = time.monotonic()
        self._opening = threading.Lock()
        self._writer: StoreWriter | None = None
        self._refused: Refused | None = None

    @property
    def writer(self) -> StoreWriter:
        assert self._writer is not None, "a sink is opened before it is used"
        return self._writer

    def open(self, connect: Callable[[], StoreWriter]) -> None:
        """Once; those who come meanwhile wait. Raises :class:`Refused`, to all of them the same, and after a close."""
        with self._opening:
            if self._writer is None and self._refused is None:
                try:
                    self._writer = connect()
                except Refused as refused:
                    self._refused = refused
            if self._refused is not None:
                raise Refused(self._refused.what, str(self._refused))

    def close(self, refused: Refused, *, leave: bool) -> None:
        with self._opening:
            self._refused = refused
            if self._writer is not None:
                with contextlib.suppress(FeatureStoreError):
                    self._writer.close(refused, CLOSE_S, leave=leave)


class OpenSinks:
    """The sinks of one server, whose ``target`` they are for. ``has_changed``: one has room again."""

    def __init__(self, settings: ServingSettings, target: TargetInfo, has_changed: Callable[[], None]) -> None:
        self._settings = settings
        self._target = target
        self._has_changed = has_changed
        self._lock = threading.Lock()
        self._open: dict[Sink, OpenSink] = {}
        self._broken: list[OpenSink] = []
        """Not used any more, and kept because their features would go with them."""
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

    def acquire(self, sink: Sink) -> OpenSink:
        """The open sink, until :meth:`release`. Raises :class:`Refused`."""
        num_bytes = self._checked(sink)
        self.close_idle()
        with self._lock:
            found = self._open.get(sink)
            if found is None:
                self._check_room(num_bytes)
                found = self._open[sink] = OpenSink(sink, num_bytes)
                _LOG.info("opening %s", sink)
            found.num_users += 1
        entry = found
        try:
            entry.open(lambda: self._connect(entry))
        except Refused:
            self.release(entry)
            self._forget(entry)
            raise
        return entry

    def release(self, entry: OpenSink) -> None:
        with self._lock:
            entry.num_users -= 1
            entry.last_used = time.monotonic()

    def close(self, sink: Sink) -> None:
        """The run is over. Whatever was put for it goes, what earlier servers of this host left of it included."""
        with self._lock:
            entries = [entry for entry in self._entries() if entry.sink == sink]
            self._remove(entries)
        for entry in entries:
            _LOG.info("closing %s", sink)
            entry.close(Refused("busy", "the sink was closed: its run is over"), leave=False)
        if isinstance(sink, SharedMemorySink) and SHARED_MEMORY.is_dir():
            with contextlib.suppress(ConfigError):
                collect_orphans(ArenaName.new(sink.run_id).run_id)

    def close_idle(self) -> None:
        """Those that nobody has used for long; their features go."""
        oldest = time.monotonic() - self._settings.sink_idle_s
        with self._lock:
            idle = [entry for entry in self._entries() if not entry.num_users and entry.last_used < oldest]
            self._remove(idle)
        for entry in idle:
            _LOG.warning("closing %s: unused for %g s", entry.sink, self._settings.sink_idle_s)
            entry.close(Refused("busy", "the sink was closed: it was not used for long"), leave=False)

    def leave_all(self) -> None:
        """This server ends, and the runs go on: what is readable stays so where the store can do that."""
        with self._lock:
            entries = self._entries()
            self._remove(entries)
        for entry in entries:
            entry.close(Refused("busy", "the server is stopping"), leave=True)

    def _connect(self, entry: OpenSink) -> StoreWriter:
        sink = entry.sink

        def on_broken(error: Exception) -> None:
            _LOG.error("%s failed: %s", sink, error)
            self._forget(entry)
            writer = entry.writer
            writer.refuse_all(Refused("engine", f"the feature store failed: {type(error).__name__}: {error}"))
            if isinstance(writer.store, Outlived):
                with self._lock:
                    self._broken.append(entry)
            else:
                # not from the thread of the store itself, which may be the one that says so
                refused = Refused("engine", "the feature store failed")
                threading.Thread(target=entry.close, args=(refused,), kwargs={"leave": True}, daemon=True).start()

        return StoreWriter(
            self._opened(sink),
            (self._target.revision, self._target.hidden_size),
            self._settings.store_wait_s,
            self._has_changed,
            on_broken,
        )

    def _opened(self, sink: Sink) -> FeatureStore:
        try:
            if isinstance(sink, SharedMemorySink):
                # room that earlier servers of the run still hold though nothing can be read there any more
                with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as others:
                    others.gc()
            return open_sink(sink, self._settings.advertise_host)
        except FeatureStoreError as error:
            raise Refused("engine", f"the feature store cannot be opened: {error}") from error
        except (UserError, OSError) as error:
            # what an arena's sink may have wrong was found before: a host that is full may have room later
            what: What = "busy" if isinstance(sink, SharedMemorySink) else "request"
            raise Refused(what, str(error)) from error

    def _forget(self, entry: OpenSink) -> None:
        with self._lock:
            self._remove([entry])

    def _entries(self) -> list[OpenSink]:
        return [*self._open.values(), *self._broken]

    def _remove(self, entries: list[OpenSink]) -> None:
        for entry in entries:
            if self._open.get(entry.sink) is entry:
                del self._open[entry.sink]
            elif entry in self._broken:
                self._broken.remove(entry)

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

    def _check_room(self, num_bytes: int) -> None:
        if len(self._open) >= self._settings.max_sinks:
            raise Refused(
                "busy",
                f"{len(self._open)} sinks are open, as many as there may be (--max-sinks); close those of runs "
                "that are over, or wait",
            )
        used = sum(entry.num_bytes for entry in self._entries())
        if used + num_bytes > self._max_bytes:
            raise Refused(
                "busy",
                f"the sink takes {num_bytes:,} bytes, and other sinks have {used:,} of {self._max_bytes:,} "
                "(--max-feature-bytes); wait until their runs are over",
            )
