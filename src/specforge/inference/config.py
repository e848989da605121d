"""Options of the frozen target (``target`` section of a run). Imports no tensor library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$")]

_SERVER_URL = r"^https?://([^\s/@:?#\[\]]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?/?$"


def server_url(text: str) -> str:
    """``text``, if it is the address of a server; else a ``ValueError``."""
    found = re.match(_SERVER_URL, text)
    if found is None or text.endswith("\n") or not 1 <= int((found[2] or ":1")[1:]) <= 65535:
        raise ValueError(f"expected an address such as http://10.0.0.7:8100, got {text!r:.80}")
    return text


ServerUrl = Annotated[str, Field(pattern=_SERVER_URL), AfterValidator(server_url)]


class ServersConfig(BaseModel):
    """Live servers that run the target and capture."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dialect: Literal["specforge", "vllm", "sglang"] = Field(
        "specforge", description="What the servers are: specforge serve-target, vLLM with our connector, or SGLang."
    )
    urls: tuple[ServerUrl, ...] = Field((), description="Their addresses, such as http://10.0.0.7:8100.")
    file: Path | None = Field(
        None, description="A file with one address a line, read again when it changes: servers come and go with it."
    )
    token_file: Path | None = Field(
        None,
        description="A file with the token that the servers want, readable by its owner alone; null: the environment "
        "variable SPECFORGE_CAPTURE_TOKEN, or none.",
    )
    transport: Literal["store", "inline"] = Field(
        "store",
        description="store: the servers write features into the run's feature store themselves; inline: they answer "
        "with them, and the capture process writes.",
    )
    max_in_flight: PositiveInt = Field(8, description="Requests that one server works on at a time, at most.")
    timeout_s: PositiveFloat = Field(
        300.0, description="A server that has not answered a request after this many seconds has failed."
    )
    longest_backoff_s: PositiveFloat = Field(
        30.0, description="The longest wait before a server that failed is asked again, in seconds."
    )
    unserved_s: PositiveFloat = Field(
        600.0, description="A run of which no server has answered for this many seconds fails."
    )
    self_test: bool = Field(True, description="Test what the servers capture before the first step.")

    @model_validator(mode="after")
    def _names_some(self) -> Self:
        if not self.urls and self.file is None:
            raise ValueError("servers that are named: give urls, a file, or both")
        return self


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
    servers: ServersConfig | None = Field(
        None, description="Live servers that run the target; null: the processes that capture load it themselves."
    )
