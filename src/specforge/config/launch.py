"""Options of the processes of a run (``launch`` section of a run)."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator


class RestartOptions(BaseModel):
    """When a process that died is started again."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_restarts: NonNegativeInt = Field(
        10, description="How often in a row a process that died is started again; the next death ends the run."
    )
    first_backoff_s: float = Field(
        0.5, ge=0.0, description="Seconds before the first restart; doubles with each death."
    )
    longest_backoff_s: float = Field(30.0, ge=0.0, description="The longest wait before a restart, in seconds.")
    healthy_after_s: float = Field(
        120.0, gt=0.0, description="A process that lived this many seconds begins a new row of deaths when it dies."
    )

    @model_validator(mode="after")
    def _backoff_grows(self) -> Self:
        if self.first_backoff_s > self.longest_backoff_s:
            raise ValueError(
                f"a section whose first_backoff_s ({self.first_backoff_s:g}) is at most its longest_backoff_s "
                f"({self.longest_backoff_s:g})"
            )
        return self


class LaunchConfig(BaseModel):
    """The processes of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_train_ranks: PositiveInt = Field(
        1,
        description="Processes that train together on this host; under torchrun its world size is used instead. In a "
        "colocated run each of them captures too.",
    )
    num_capture_workers: PositiveInt = Field(
        1, description="Capture processes of a disaggregated run; each loads the target and has an arena of its own."
    )
    restarts: RestartOptions = Field(RestartOptions(), description="When a process that died is started again.")
