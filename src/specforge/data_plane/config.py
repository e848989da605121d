"""Options of the data plane (``data_plane`` section of a run). Imports no tensor library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from specforge.contracts.capture import CaptureDtype

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


BytesOrNone = Annotated[NonNegativeInt, BeforeValidator(parse_bytes)]
"""``Bytes``, or 0."""


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


class SharedDirStore(BaseModel):
    """Files on a mount that every process of the run sees."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["shared_dir"] = Field("shared_dir", description="safetensors files in a directory.")
    path: Path | None = Field(
        None, description="The directory, on a mount that every process sees; null: features in run_dir."
    )
    fsync: bool = Field(
        False, description="Sync every file to the disk; off: after a power failure lost features are captured again."
    )


class MooncakeStore(BaseModel):
    """Mooncake Store, between hosts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["mooncake"] = Field("mooncake", description="Mooncake Store, as data_plane.mooncake describes it.")


Store = Annotated[
    AutoStore | LocalStore | SharedMemoryStore | SharedDirStore | MooncakeStore, Field(discriminator="kind")
]


def _check_port(address: str) -> str:
    if not 0 < int(address.rpartition(":")[2]) < 2**16:
        raise ValueError(f"expected a port from 1 to {2**16 - 1} in {address}")
    return address


Address = Annotated[str, Field(pattern=r"^[^\s:/]+:\d{1,5}$"), AfterValidator(_check_port)]
"""``host:port``."""


class MooncakeConfig(BaseModel):
    """The Mooncake Store that ``data_plane.store.kind = mooncake`` uses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    managed: bool = Field(
        True, description="Start a master and an owner of the memory with the run; false: use the master given."
    )
    master: Address | None = Field(None, description="host:port of the master's RPC; null: chosen where managed.")
    admin: Address | None = Field(
        None, description="host:port of the master's HTTP (its metrics port); null: chosen where managed."
    )
    host: str = Field("127.0.0.1", description="Address of this host by which the other processes reach it.")
    protocol: Literal["tcp", "rdma"] = Field("tcp", description="Transport of the features.")
    device: str = Field("", description="RDMA devices, separated by commas; empty: all, or none with tcp.")
    metadata_server: str = Field("P2PHANDSHAKE", description="Mooncake's metadata server; P2PHANDSHAKE needs none.")
    capacity_bytes: Bytes | None = Field(
        None, description="Memory for features where managed; null: what the plan says is needed."
    )
    buffer_bytes: Bytes | None = Field(
        None, description="Registered transfer buffer of each process; null: what the plan says is needed."
    )
    reconnect_s: PositiveFloat = Field(30.0, description="How long a call waits for a master that is away.")

    @model_validator(mode="after")
    def _external_has_addresses(self) -> Self:
        if not self.managed and (self.master is None or self.admin is None):
            raise ValueError(
                "managed is false: give master and admin, the host:port of the RPC and of the HTTP of the master"
            )
        return self


class DataPlaneConfig(BaseModel):
    """Where features rest between capture and training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Store = Field(AutoStore(), description="The feature store.")
    namespace: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_-]{1,40}$",
        description="Name of the run in stores that other runs use too; null: drawn when the run starts, and kept.",
    )
    mooncake: MooncakeConfig = Field(MooncakeConfig(), description="The Mooncake Store, where it is the store.")
    retain_bytes: BytesOrNone = Field(
        2**30,
        description="Captured features that are kept for later epochs, up to this size: the target does not run again "
        "for them. 0: none.",
    )
    retain_memory_bytes: BytesOrNone = Field(
        2**30, description="How much of retain_bytes is kept in memory of the process that trains; the rest in files."
    )
    retain_dir: Path | None = Field(
        None, description="Local directory of what is kept in files; null: retained in run_dir."
    )
    prefetch_steps: NonNegativeInt = Field(1, description="Optimizer steps of batches that are prepared ahead.")
    prefetch_bytes: Bytes = Field(
        2**30, description="No further step is prepared while the prepared ones take this much; one always is."
    )
    capture_dtype: CaptureDtype = Field(
        "bfloat16",
        description="Number format of captured hidden states; float8_e4m3fn: with a scale a token and layer.",
    )
