"""Which control plane a deployment gets, decided in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

from specforge.contracts.tasks import PromptTask
from specforge.control_plane.channel.base import RefWriter
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.base import MetadataStore
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.noop import NoOpMetadataStore
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.control_plane.prompts import SampleOrder
from specforge.errors import ConfigError


class DeploymentMode(StrEnum):
    """``local_colocated``: the checkpoint alone is kept. ``dataflow_colocated``: a ledger in memory.
    ``disaggregated``: a durable ledger, a SQLite file.
    """

    LOCAL_COLOCATED = "local_colocated"
    DATAFLOW_COLOCATED = "dataflow_colocated"
    DISAGGREGATED = "disaggregated"


def open_metadata_store(mode: DeploymentMode, ledger_path: str | Path | None = None) -> MetadataStore:
    """The ledger of ``mode``; ``ledger_path`` is used, and needed, by ``disaggregated`` only."""
    if mode is DeploymentMode.LOCAL_COLOCATED:
        return NoOpMetadataStore()
    if mode is DeploymentMode.DATAFLOW_COLOCATED:
        return InMemoryMetadataStore()
    if ledger_path is None:
        raise ConfigError("a disaggregated run keeps its ledger in a file, got no path; give the path of the file")
    return SqlMetadataStore(ledger_path)


def resolve_control_plane(
    mode: DeploymentMode,
    order: SampleOrder,
    tasks: Sequence[PromptTask],
    writer: RefWriter,
    settings: ControllerSettings,
    on_release: Callable[[Sequence[tuple[str, int]]], None],
    ledger_path: str | Path | None = None,
) -> tuple[DataFlowController, bool]:
    """The controller of ``mode``, and whether its acks are durable. ``controller.close()`` closes the ledger."""
    store = open_metadata_store(mode, ledger_path)
    try:
        return DataFlowController(store, order, tasks, writer, settings, on_release), store.durable
    except BaseException:
        store.close()
        raise
