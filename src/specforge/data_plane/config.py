"""Options of the data plane (``data_plane`` section of a run). Imports no tensor library."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(value: Any) -> Any:
    """``"512MB"`` (10**6) and ``"1GiB"`` (2**30) as a number of bytes; anything but a string is left alone."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("a number of bytes, or a size such as 512MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


Bytes = Annotated[PositiveInt, BeforeValidator(parse_bytes)]


class AutoStore(BaseModel):
    """A local store when colocated, shared memory when disaggregated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["auto"] = Field("auto", description="Chosen by the topology.")


class LocalStore(BaseModel):
    """Tensors by reference within one process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local"] = Field("local", description="Tensors by reference within one process.")


class SharedMemoryStore(BaseModel):
    """An arena in shared memory, for processes on one host."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["shared_memory"] = Field("shared_memory", description="An arena in POSIX shared memory.")
    capacity_bytes: Bytes = Field(
        256 * 2**20, description="Size of the arena: a number of bytes, or a size such as 512MB or 1GiB."
    )


Store = Annotated[AutoStore | LocalStore | SharedMemoryStore, Field(discriminator="kind")]


class DataPlaneConfig(BaseModel):
    """Where features rest between capture and training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Store = Field(AutoStore(), description="The feature store.")
    prefetch_steps: NonNegativeInt = Field(1, description="Optimizer steps of batches that are prepared ahead.")
    capture_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Number format of captured features; auto: the one that the target computes in."
    )
