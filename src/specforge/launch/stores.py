"""The feature stores of a run: with ``compose`` the only file that names them.

local           LocalFeatureStore           one process
shared_memory   SharedMemoryFeatureStore    processes on one host: an arena a writer
shared_dir      SharedDirFeatureStore       processes that share a mount
mooncake        MooncakeFeatureStore        many hosts; the service is started here where it is managed
retained        RetainingFeatureStore       what waits for a later epoch, in memory and then in files
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specforge.config.load import load_run_config
from specforge.config.run import RunConfig
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.config import SharedDirStore, SharedMemoryStore
from specforge.data_plane.local import LocalFeatureStore
from specforge.data_plane.mooncake import MooncakeFeatureStore, MooncakeSettings
from specforge.data_plane.retention import RetainingFeatureStore, Tier
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore, collect_orphans
from specforge.errors import ConfigError, FeatureStoreError, UserError
from specforge.launch.aside import AsideReader
from specforge.launch.inputs import RESOLVED_FILE
from specforge.launch.mooncake import MooncakeService
from specforge.launch.plan import (
    Plan,
    max_resident_samples,
    retain_dir,
    retain_memory_bytes,
    run_id,
    shared_dir,
    writer_names,
)

_LOG = logging.getLogger(__name__)

NAMESPACE_FILE = "namespace"
DURABLE_LEDGERS = frozenset({"sqlite", "postgres"})
ARENA_OVERHEAD = 1.1
"""The file of an arena is larger than its capacity, by less than this."""


def open_writer(config: RunConfig) -> FeatureStore:
    """The store of a process that captures. ``config`` is resolved: it names sizes and addresses."""
    store = config.data_plane.store
    if isinstance(store, SharedMemoryStore):
        # What dead writers of the same run left stays: it may still be trained.
        return SharedMemoryFeatureStore.create(
            run_id(config), store.capacity_bytes, max_samples=2 * max_resident_samples(config) + 64
        )
    return open_reader(config)


def open_reader(config: RunConfig) -> FeatureStore:
    """The store of a process that trains beside others that capture."""
    kind = config.data_plane.store.kind
    openers: dict[str, Callable[[RunConfig], FeatureStore]] = {
        "local": lambda _: LocalFeatureStore(),
        "shared_memory": lambda config: SharedMemoryFeatureStore.attach(run_id(config)),
        "shared_dir": _shared_dir,
        "mooncake": _mooncake,
    }
    if kind not in openers:
        raise ConfigError(f"data_plane.store.kind is {kind}, which is resolved before a store is opened")
    return openers[kind](config)


def with_retention(config: RunConfig, store: FeatureStore, resources: contextlib.ExitStack) -> RetainingFeatureStore:
    """``store`` with the room for later epochs beside it. Closing it closes both."""
    options = config.data_plane
    in_memory = min(options.retain_bytes, retain_memory_bytes(config))
    tiers: list[Tier] = [LocalFeatureStore(in_memory)] if in_memory else []
    spilled = None
    if _keeps_files(config):
        spilled = _retained(config, options.retain_bytes - in_memory)
        spilled.adopt()
        tiers.append(spilled)
    retaining = RetainingFeatureStore(store, tiers, by_reference=isinstance(store, LocalFeatureStore))
    resources.callback(retaining.close)
    if spilled is not None:
        resources.callback(_quietly, _remove_if_empty, spilled, retain_dir(config), config)
    return retaining


def with_retained(config: RunConfig, store: FeatureStore, resources: contextlib.ExitStack) -> FeatureStore:
    """``store`` with what another rank put aside beside it, for reading. Closing it closes both."""
    seen = AsideReader(store, _retained(config)) if _keeps_files(config) else store
    resources.callback(seen.close)
    return seen


def start_service(
    config: RunConfig, plan: Plan, resources: contextlib.ExitStack, on_given_up: Callable[[str], None]
) -> RunConfig:
    """``config`` with the addresses of the run's Mooncake Store, started until ``resources`` close if it is managed."""
    options = config.data_plane.mooncake
    if config.data_plane.store.kind != "mooncake" or not options.managed:
        return config
    service = MooncakeService(options, plan.store_capacity_bytes or 0, config.run_dir, on_given_up)
    resources.callback(service.stop)
    addresses = service.start()
    found = options.model_copy(update={"master": addresses.master, "admin": addresses.admin})
    return config.model_copy(update={"data_plane": config.data_plane.model_copy(update={"mooncake": found})})


def with_namespace(config: RunConfig) -> RunConfig:
    """``config`` with the name that the run has in stores that others use too: random, and kept in its directory."""
    name = config.data_plane.namespace
    if name is None:
        config.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = config.run_dir / NAMESPACE_FILE
        if not file.exists():
            drawn = file.with_suffix(f".{os.getpid()}")
            drawn.write_text(secrets.token_hex(8))
            drawn.replace(file)
        name = file.read_text()
    return config.model_copy(update={"data_plane": config.data_plane.model_copy(update={"namespace": name})})


def make_room(config: RunConfig, plan: Plan, resume: bool) -> None:
    """Free what an earlier start of the run left, as far as it is not wanted any more.

    A resumed run takes up features that can still be read if its ledger knows of them, unless the new arenas would find
    no room beside them.
    """
    if _keeps_files(config):
        _check_writable(retain_dir(config))
    if resume:
        _quietly(_clear_former_places, config)
    knows = resume and plan.ledger in DURABLE_LEDGERS
    if not knows or not _keeps_files(config):
        _remove(_retained(config), retain_dir(config), config)
    if not knows:
        clear(config)
    elif config.data_plane.store.kind == "shared_memory":
        with contextlib.closing(SharedMemoryFeatureStore.attach(run_id(config))) as store:
            store.gc()
        needed = len(writer_names(config)) * (plan.store_capacity_bytes or 0)
        if shutil.disk_usage(SHARED_MEMORY).free <= needed * ARENA_OVERHEAD:
            clear(config)


def clear(config: RunConfig) -> None:
    """Free every feature of the run in a store that outlives its processes. None of them may be at work."""
    kind = config.data_plane.store.kind
    if kind == "shared_memory":
        collect_orphans(run_id(config))
    elif kind == "shared_dir":
        _remove(_shared_dir(config), shared_dir(config), config)
    elif kind == "mooncake" and not config.data_plane.mooncake.managed:
        with contextlib.closing(_mooncake(config)) as store:
            store.remove_all()


def clear_at_the_end(config: RunConfig) -> None:
    """``clear``; a store that refuses is logged, because how the run ended matters more."""
    _quietly(clear, config)


def _clear_former_places(config: RunConfig) -> None:
    """Where the run had its features at its last start, should a resume have moved them."""
    try:
        former = load_run_config(config.run_dir / RESOLVED_FILE)
    except UserError:
        return
    named = former.data_plane.model_copy(update={"namespace": config.data_plane.namespace})
    former = former.model_copy(update={"data_plane": named})
    if former.data_plane.store.kind != config.data_plane.store.kind or shared_dir(former) != shared_dir(config):
        clear(former)
    if retain_dir(former) != retain_dir(config):
        _remove(_retained(former), retain_dir(former), former)


def _quietly(work: Callable[..., None], *arguments: Any) -> None:
    try:
        work(*arguments)
    except (OSError, FeatureStoreError) as error:
        _LOG.warning("features of the run are left behind: %s", error)


def _keeps_files(config: RunConfig) -> bool:
    return config.data_plane.retain_bytes > retain_memory_bytes(config)


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"data_plane.retain_dir, {directory}, cannot be written ({error.strerror}): make it writable for this "
            "user, choose another one, or lower data_plane.retain_bytes to retain_memory_bytes"
        ) from None


def _retained(config: RunConfig, capacity_bytes: int | None = None) -> SharedDirFeatureStore:
    """What is kept in files; apart from the run's store, should both be in one directory."""
    return SharedDirFeatureStore(retain_dir(config), f"{config.data_plane.namespace}-retained", capacity_bytes)


def _shared_dir(config: RunConfig) -> SharedDirFeatureStore:
    store = config.data_plane.store
    fsync = isinstance(store, SharedDirStore) and store.fsync
    return SharedDirFeatureStore(shared_dir(config), str(config.data_plane.namespace), fsync=fsync)


def _mooncake(config: RunConfig) -> MooncakeFeatureStore:
    options = config.data_plane.mooncake
    if options.master is None or options.admin is None or options.buffer_bytes is None:
        raise ConfigError("data_plane.mooncake needs master, admin and buffer_bytes before a store is opened")
    return MooncakeFeatureStore(
        MooncakeSettings(
            run_id=str(config.data_plane.namespace),
            master=options.master,
            admin=options.admin,
            host=options.host,
            protocol=options.protocol,
            device=options.device,
            metadata_server=options.metadata_server,
            buffer_bytes=options.buffer_bytes,
            capacity_bytes=None,
            reconnect_s=options.reconnect_s,
        )
    )


def _remove_if_empty(store: SharedDirFeatureStore, directory: Path, config: RunConfig) -> None:
    if not store.stored():
        _remove(store, directory, config)


def _remove(store: SharedDirFeatureStore, directory: Path, config: RunConfig) -> None:
    """Everything of the run in ``store``; its ``directory`` too where the run made it."""
    store.remove_all()
    if directory.parent == config.run_dir:
        with contextlib.suppress(OSError):
            directory.rmdir()
