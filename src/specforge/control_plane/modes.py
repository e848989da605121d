"""Which control plane a deployment gets, decided in one place."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from specforge.control_plane.base import Features
from specforge.control_plane.channel.base import RefWriter
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.base import MetadataStore
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.noop import NoOpMetadataStore
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.control_plane.prompts import SampleOrder, TaskSource
from specforge.errors import ConfigError


class DeploymentMode(StrEnum):
    """``local_colocated``: the checkpoint alone is kept. ``dataflow_colocated``: a ledger in memory.
    ``disaggregated``: a durable ledger, in a SQLite file or a PostgreSQL database.
    """

    LOCAL_COLOCATED = "local_colocated"
    DATAFLOW_COLOCATED = "dataflow_colocated"
    DISAGGREGATED = "disaggregated"


def open_metadata_store(
    mode: DeploymentMode, ledger: str | Path | None = None, ledger_name: str | None = None
) -> MetadataStore:
    """The ledger of ``mode``. ``ledger``, the path of a SQLite file or a ``postgresql://`` URL, is used and needed by
    ``disaggregated`` only; ``ledger_name`` is the schema in a PostgreSQL database.
    """
    if mode is DeploymentMode.LOCAL_COLOCATED:
        return NoOpMetadataStore()
    if mode is DeploymentMode.DATAFLOW_COLOCATED:
        return InMemoryMetadataStore()
    if ledger is None:
        raise ConfigError(
            "a disaggregated run keeps its ledger in a database, got none; give the path of a file or the URL of a "
            "PostgreSQL database"
        )
    return SqlMetadataStore(ledger) if ledger_name is None else SqlMetadataStore(ledger, name=ledger_name)


def resolve_control_plane(
    mode: DeploymentMode,
    order: SampleOrder,
    tasks: TaskSource,
    writer: RefWriter,
    settings: ControllerSettings,
    features: Features,
    ledger: str | Path | None = None,
    ledger_name: str | None = None,
) -> tuple[DataFlowController, bool]:
    """The controller of ``mode``, and whether its acks are durable. ``controller.close()`` closes the ledger."""
    store = open_metadata_store(mode, ledger, ledger_name)
    try:
        return DataFlowController(store, order, tasks, writer, settings, features), store.durable
    except BaseException:
        store.close()
        raise
