"""Options of the control plane (``control_plane`` section of a run)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

from specforge.errors import ConfigError

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class AutoLedger(BaseModel):
    """SQLite when disaggregated, or where the target answers the prompts (``data.generate``); else no ledger."""

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


class PostgresLedger(BaseModel):
    """Keeps the state of samples and slots in a PostgreSQL server, each run in a schema of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["postgres"] = Field("postgres", description="A ledger in a PostgreSQL server.")
    url: str = Field(
        "",
        validate_default=True,
        description="postgresql://USER@HOST:PORT/DATABASE; the password comes from PGPASSWORD or a pgpass file.",
    )
    name: str | None = Field(
        None,
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="The schema that holds the tables; null: specforge_ and the id of the run.",
    )

    @field_validator("url")
    @classmethod
    def _has_no_secret(cls, url: str) -> str:
        # A ConfigError, not a ValueError: pydantic's message would show the password that it complains about.
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme != "postgresql" or not parts.path.strip("/"):
            raise ConfigError(
                "control_plane.ledger.url should look like postgresql://USER@HOST:PORT/DATABASE; give the address of "
                "the database"
            )
        if parts.password is not None or "password" in parse_qs(parts.query, keep_blank_values=True):
            raise ConfigError(
                "control_plane.ledger.url holds a password, which would be written to files; take it out and give it "
                "in the environment variable PGPASSWORD or in a pgpass file"
            )
        return url


Ledger = Annotated[AutoLedger | NoLedger | MemoryLedger | SqliteLedger | PostgresLedger, Field(discriminator="kind")]


class ControlPlaneConfig(BaseModel):
    """Who may do what with which sample, and where that is recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ledger: Ledger = Field(AutoLedger(), description="Where the state of samples and slots is kept.")
    order: Literal["strict", "arrival"] = Field(
        "strict",
        description="strict: the order of training is a function of the seed; arrival: samples are trained as they "
        "are captured, so that no step waits for a slow worker.",
    )
    release: Literal["at_step", "at_checkpoint"] = Field(
        "at_step",
        description="When features are freed: after the optimizer step that used them, or once a checkpoint covers "
        "it, which takes more memory and repeats no capture when the trainer died.",
    )
    lease_s: float = Field(60.0, gt=0.0, description="Seconds that a worker may hold a sample without a heartbeat.")
    max_attempts: PositiveInt = Field(3, description="Failures of a prompt itself before it is quarantined.")
    max_crash_attempts: PositiveInt = Field(
        3, description="Deaths of workers that held a prompt alone before it is quarantined."
    )
    max_quarantined: NonNegativeInt | Fraction = Field(
        0, description="Quarantined prompts that a run tolerates: a number, or a share of all prompts such as 0.01."
    )
    low_watermark: float = Field(
        0.8, gt=0.0, le=1.0, description="Capture that paused at a limit goes on below this share of it."
    )
    reconnect_s: float = Field(
        120.0, ge=0.0, description="Seconds that a worker waits for a control plane that is away before it gives up."
    )
    idle_timeout_s: Annotated[float, Field(gt=0.0)] | None = Field(
        3600.0, description="The trainer gives up after this many seconds without a sample; null: never."
    )
    window_steps: PositiveInt = Field(
        4, description="How many optimizer steps of samples may be captured ahead of training."
    )
    shuffle: bool = Field(True, description="Shuffle the samples of every epoch (a function of the run's seed).")
    host: str = Field("127.0.0.1", min_length=1, description="Address that the control-plane server listens on.")
    port: int = Field(0, ge=0, le=65535, description="Port of the control-plane server; 0: any free one.")
