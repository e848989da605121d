"""RunConfig: everything one run needs, composed of the options that live beside the code they configure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from specforge.algorithms.catalog import options_types
from specforge.algorithms.eagle3.config import Eagle3Options
from specforge.config.launch import LaunchConfig
from specforge.control_plane.config import ControlPlaneConfig
from specforge.data_plane.config import DataPlaneConfig
from specforge.evaluation.config import EvaluationConfig
from specforge.evaluation.held_out import HeldOutConfig
from specforge.inference.config import TargetConfig
from specforge.monitor.config import MonitorConfig
from specforge.prompts.config import DataConfig
from specforge.training.config import TrainingConfig

if TYPE_CHECKING:
    AlgorithmOptions = Eagle3Options
else:
    # one variant an algorithm, of this package and of those that add some
    AlgorithmOptions = Annotated[Union[tuple(options_types().values())], Field(discriminator="name")]  # noqa: UP007


class RunConfig(BaseModel):
    """A training run. Paths are absolute once :func:`specforge.config.load.load_run_config` has read it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_dir: Path = Field(description="Directory of the run: resolved configuration, ledger, logs, checkpoints.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of initialisation, order and everything drawn.")
    topology: Literal["colocated", "disaggregated"] = Field(
        "colocated",
        description="colocated: whoever trains captures too, in the same process; disaggregated: capture has processes "
        "of its own.",
    )
    target: TargetConfig = Field(description="The frozen target.")
    data: DataConfig = Field(description="The samples to train on.")
    algorithm: AlgorithmOptions = Field(Eagle3Options(), description="The draft algorithm and its options.")
    training: TrainingConfig = Field(TrainingConfig(), description="The training loop.")
    control_plane: ControlPlaneConfig = Field(ControlPlaneConfig(), description="Leases, order and the ledger.")
    data_plane: DataPlaneConfig = Field(DataPlaneConfig(), description="The feature store and prefetching.")
    launch: LaunchConfig = Field(LaunchConfig(), description="The processes of a run and their restarts.")
    monitor: MonitorConfig = Field(
        MonitorConfig(),
        description="A list of trackers of the run's scalars, besides metrics.jsonl and the terminal; by default none.",
    )
    held_out: HeldOutConfig = Field(
        HeldOutConfig(), description="Evaluation during training, on samples that are not trained."
    )
    evaluation: EvaluationConfig = Field(
        EvaluationConfig(),
        description="Evaluation by decoding at the end of the demo; specforge eval has options.",
    )

    @model_validator(mode="after")
    def _somebody_captures(self) -> Self:
        if self.target.servers is None:
            return self
        if self.data.features is not None:
            raise ValueError(
                "data.features are captured already, but target.servers names servers that would capture; give one of "
                "the two"
            )
        if self.launch.num_capture_workers > 1:
            raise ValueError(
                f"launch.num_capture_workers is {self.launch.num_capture_workers}, but one process drives all of "
                "target.servers; set it to 1, and name more servers or raise target.servers.max_in_flight"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_the_topology(self) -> Self:
        refused = self._refused_apart() if self.topology == "disaggregated" else self._refused_together()
        if refused is not None:
            raise ValueError(f"topology is {self.topology} but {refused}")
        return self

    @model_validator(mode="after")
    def _responses_are_kept(self) -> Self:
        ledger = self.control_plane.ledger.kind
        if self.data.generate is not None and ledger in {"none", "memory"}:
            raise ValueError(
                f"data.generate lets the target answer, and answers must outlive the process, but "
                f"control_plane.ledger.kind is {ledger}; use sqlite, postgres or auto"
            )
        return self

    def _refused_apart(self) -> str | None:
        ledger = self.control_plane.ledger.kind
        if self.data_plane.store.kind == "local":
            return "data_plane.store.kind is local, which only one process can see; use shared_memory or auto"
        if ledger in {"none", "memory"}:
            return (
                f"control_plane.ledger.kind is {ledger}, which does not outlive the process that trains; "
                "use sqlite, postgres or auto"
            )
        return None

    def _refused_together(self) -> str | None:
        if self.control_plane.order == "arrival":
            return "control_plane.order is arrival: the processes that train capture, and in order; use strict"
        if self.launch.num_capture_workers > 1:
            return (
                f"launch.num_capture_workers is {self.launch.num_capture_workers}: the processes that train capture; "
                "use topology=disaggregated, or 1"
            )
        return None
