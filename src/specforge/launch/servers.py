"""The capture servers of a run: which there are, how they are reached, and what they are told of the store."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from specforge.config.run import RunConfig
from specforge.contracts.capture_server import InlineSink, MooncakeSink, SharedDirSink, SharedMemorySink, Sink
from specforge.data_plane.config import SharedDirStore, SharedMemoryStore
from specforge.errors import ConfigError, EngineError
from specforge.inference.config import ServersConfig
from specforge.inference.servers.base import CaptureServer
from specforge.inference.servers.listing import ServerListing
from specforge.launch.capture_token import read_token
from specforge.launch.engines import connect_server
from specforge.launch.plan import max_resident_samples, run_id, servers_write, shared_dir

_LOG = logging.getLogger(__name__)

GOODBYES_S = 10.0
"""How long servers are waited for, all together, when they are told that a run is over."""


def listing_of(servers: ServersConfig) -> ServerListing:
    return ServerListing(servers.urls, servers.file)


def connect(servers: ServersConfig, url: str) -> CaptureServer:
    return connect_server(servers.dialect, url, read_token(servers.token_file), servers.max_in_flight)


def sink_of(config: RunConfig) -> Sink:
    """Where the servers of a run put features. ``config`` is resolved: it names sizes and addresses."""
    if not servers_write(config):
        return InlineSink()
    store, mooncake = config.data_plane.store, config.data_plane.mooncake
    if isinstance(store, SharedMemoryStore):
        return SharedMemorySink(run_id(config), store.capacity_bytes, 2 * max_resident_samples(config) + 64)
    if store.kind == "shared_dir":
        fsync = isinstance(store, SharedDirStore) and store.fsync
        return SharedDirSink(str(config.data_plane.namespace), str(shared_dir(config)), fsync)
    assert mooncake.master is not None
    assert mooncake.admin is not None
    assert mooncake.buffer_bytes is not None
    return MooncakeSink(
        run_id=str(config.data_plane.namespace),
        master=mooncake.master,
        admin=mooncake.admin,
        protocol=mooncake.protocol,
        device=mooncake.device,
        metadata_server=mooncake.metadata_server,
        buffer_bytes=mooncake.buffer_bytes,
        reconnect_s=mooncake.reconnect_s,
    )


def close_sinks(config: RunConfig) -> None:
    """Let every server that can be reached know that nobody wants what it holds of the run; all at once."""
    servers = config.target.servers
    if servers is None or not servers_write(config):
        return
    sink = sink_of(config)

    def say_goodbye(url: str) -> None:
        try:
            with contextlib.closing(connect(servers, url)) as server:
                server.close_sink(sink)
        except (EngineError, ConfigError) as error:
            _LOG.warning("the features that %s holds of the run are left to it: %s", url, error)

    urls = listing_of(servers).current()
    threads = [threading.Thread(target=say_goodbye, args=(url,), name="good-bye", daemon=True) for url in urls]
    deadline = time.monotonic() + GOODBYES_S
    for thread in threads:
        thread.start()
    for url, thread in zip(urls, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _LOG.warning("%s did not say within %g s that it lets go of the run's features", url, GOODBYES_S)
