"""Options of the monitor (``monitor`` section of a run)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Tag = Annotated[str, Field(min_length=1, max_length=64)]


class TensorBoardTracker(BaseModel):
    """Event files that TensorBoard shows, in ``tensorboard`` of the run's directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["tensorboard"] = Field(description="Event files for TensorBoard, in tensorboard of run_dir.")


class WandbTracker(BaseModel):
    """A run on Weights & Biases. The key comes from the environment or from ``wandb login``, never from here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["wandb"] = Field(description="A run on Weights & Biases; its key comes from WANDB_API_KEY.")
    mode: Literal["online", "offline"] = Field(
        "online", description="online: sent as the run goes; offline: written to run_dir, to be sent by wandb sync."
    )
    project: str = Field("specforge", min_length=1, max_length=128, description="Project that the run belongs to.")
    entity: str | None = Field(None, min_length=1, description="User or team that owns the project; null: the key's.")
    name: str | None = Field(
        None, min_length=1, max_length=128, description="Name that the run is shown by; null: that of run_dir."
    )
    group: str | None = Field(None, min_length=1, max_length=128, description="Runs of one group are shown together.")
    tags: tuple[Tag, ...] = Field((), description="Words to find the run by.")


Tracker = Annotated[TensorBoardTracker | WandbTracker, Field(discriminator="kind")]


class MonitorConfig(BaseModel):
    """Where the scalars of a run go, besides ``metrics.jsonl`` and the terminal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trackers: tuple[Tracker, ...] = Field((), description="Trackers that hear of every logged step; each kind once.")

    @model_validator(mode="after")
    def _each_kind_once(self) -> Self:
        kinds = [tracker.kind for tracker in self.trackers]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"trackers lists {kind} {kinds.count(kind)} times; list it once")
        return self
