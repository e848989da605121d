"""Options of the frozen target (``target`` section of a run). Imports no tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$")]


class TargetConfig(BaseModel):
    """Which target to run, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="Directory of a causal language model that transformers loads.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Number format that the target computes in; auto: float32 on a CPU, bfloat16 on CUDA."
    )
    device: Device = Field(
        "auto", description="Where the target runs: auto (CUDA when there is one), cpu, cuda or cuda:N."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the target's directory.")
