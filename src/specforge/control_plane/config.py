"""Options of the control plane (``control_plane`` section of a run)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt


class AutoLedger(BaseModel):
    """No ledger when colocated, SQLite when disaggregated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["auto"] = Field("auto", description="Chosen by the topology.")


class NoLedger(BaseModel):
    """Keeps nothing: the checkpoint alone says what was trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["none"] = Field("none", description="No ledger.")


class MemoryLedger(BaseModel):
    """Keeps the state of samples and slots in memory, for as long as the process lives."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["memory"] = Field("memory", description="A ledger in the memory of the controller's process.")


class SqliteLedger(BaseModel):
    """Keeps the state of samples and slots in a database file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["sqlite"] = Field("sqlite", description="A ledger in a SQLite file.")
    path: Path | None = Field(None, description="The database file; null: ledger.sqlite in the run's directory.")


Ledger = Annotated[AutoLedger | NoLedger | MemoryLedger | SqliteLedger, Field(discriminator="kind")]


class ControlPlaneConfig(BaseModel):
    """Who may do what with which sample, and where that is recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ledger: Ledger = Field(AutoLedger(), description="Where the state of samples and slots is kept.")
    lease_s: float = Field(60.0, gt=0.0, description="Seconds that a worker may hold a sample without a heartbeat.")
    max_attempts: PositiveInt = Field(3, description="Failures of a prompt itself before it is quarantined.")
    max_quarantined: NonNegativeInt = Field(0, description="Quarantined prompts that a run tolerates.")
    window_steps: PositiveInt = Field(
        4, description="How many optimizer steps of samples may be captured ahead of training."
    )
    shuffle: bool = Field(True, description="Shuffle the samples of every epoch (a function of the run's seed).")
    host: str = Field("127.0.0.1", min_length=1, description="Address that the control-plane server listens on.")
    port: int = Field(0, ge=0, le=65535, description="Port of the control-plane server; 0: any free one.")
