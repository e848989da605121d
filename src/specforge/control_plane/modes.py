"""Which control plane a deployment gets, decided in one place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from specforge.control_plane.base import Features, Retention
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


@dataclass(frozen=True, slots=True)
class Deployment:
    """A mode and the place of its ledger: the path of a SQLite file or a ``postgresql://`` URL, which ``disaggregated``
    alone uses and needs, and the schema in a PostgreSQL database.
    """

    mode: DeploymentMode
    ledger: str | Path | None = None
    ledger_name: str | None = None


def open_metadata_store(deployment: Deployment) -> MetadataStore:
    """The ledger of ``deployment``."""
    mode, ledger = deployment.mode, deployment.ledger
    if mode is DeploymentMode.LOCAL_COLOCATED:
        return NoOpMetadataStore()
    if mode is DeploymentMode.DATAFLOW_COLOCATED:
        return InMemoryMetadataStore()
    if ledger is None:
        raise ConfigError(
            "a disaggregated run keeps its ledger in a database, got none; give the path of a file or the URL of a "
            "PostgreSQL database"
        )
    name = deployment.ledger_name
    return SqlMetadataStore(ledger) if name is None else SqlMetadataStore(ledger, name=name)


def resolve_control_plane(
    deployment: Deployment,
    order: SampleOrder,
    tasks: TaskSource,
    writer: RefWriter,
    settings: ControllerSettings,
    features: Features,
    retention: Retention | None = None,
) -> tuple[DataFlowController, bool]:
    """The controller of ``deployment``, and whether its acks are durable. ``controller.close()`` closes the ledger."""
    store = open_metadata_store(deployment)
    try:
        return DataFlowController(store, order, tasks, writer, settings, features, retention), store.durable
    except BaseException:
        store.close()
        raise
