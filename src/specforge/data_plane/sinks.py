"""Opening the store that a capture request names, in the process of a capture server."""

from __future__ import annotations

from pathlib import Path

from specforge.contracts.capture_server import MooncakeSink, SharedDirSink, SharedMemorySink, Sink
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.mooncake import MooncakeFeatureStore, MooncakeSettings
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.errors import ConfigError


def open_sink(sink: Sink, host: str = "127.0.0.1") -> FeatureStore:
    """The writer's store of ``sink``. ``host``: this host's own address, for stores that others connect to.

    Raises ``ConfigError`` or ``FeatureStoreError`` where it cannot be opened.
    """
    if isinstance(sink, SharedMemorySink):
        return SharedMemoryFeatureStore.create(sink.run_id, sink.capacity_bytes, sink.max_samples)
    if isinstance(sink, SharedDirSink):
        return SharedDirFeatureStore(Path(sink.path), sink.run_id, fsync=sink.fsync)
    if isinstance(sink, MooncakeSink):
        return MooncakeFeatureStore(
            MooncakeSettings(
                run_id=sink.run_id,
                master=sink.master,
                admin=sink.admin,
                host=host,
                protocol=sink.protocol,
                device=sink.device,
                metadata_server=sink.metadata_server,
                buffer_bytes=sink.buffer_bytes,
                capacity_bytes=None,
                reconnect_s=sink.reconnect_s,
            )
        )
    raise ConfigError("inline features have no store: they are in the answer")
