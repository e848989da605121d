"""What travels between a capture server and whoever asks it: requests, replies, and where features go.

A *capture server* runs the frozen target and writes its features where the request says. Every record is read strictly
(an unknown field is refused) by the forms in ``contracts.capture_wire``; ``docs/reference/capture-protocol.md`` has the
HTTP side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.features import FeatureSpec

PROTOCOL = 1
"""Version of the protocol, in its paths and replies."""

MAX_ITEMS = 256
"""Samples of one request."""


@dataclass(frozen=True, slots=True)
class InlineSink:
    """The features come back in the body of the answer."""

    kind: Literal["inline"] = "inline"


@dataclass(frozen=True, slots=True)
class SharedMemorySink:
    """An arena of the server's process on this host, of the run ``run_id``."""

    run_id: str
    capacity_bytes: int
    max_samples: int
    kind: Literal["shared_memory"] = "shared_memory"


@dataclass(frozen=True, slots=True)
class SharedDirSink:
    """Files below ``path``, on a mount that the server sees under the same name."""

    run_id: str
    path: str
    fsync: bool = False
    kind: Literal["shared_dir"] = "shared_dir"


@dataclass(frozen=True, slots=True)
class MooncakeSink:
    """A Mooncake Store. The server reaches the master at ``master`` and ``admin``, both ``host:port``."""

    run_id: str
    master: str
    admin: str
    protocol: str
    device: str
    metadata_server: str
    buffer_bytes: int
    reconnect_s: float
    kind: Literal["mooncake"] = "mooncake"


Sink = InlineSink | SharedMemorySink | SharedDirSink | MooncakeSink


@dataclass(frozen=True, slots=True)
class Generate:
    """A response to be generated behind the prompt, before the capture.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave all tokens in. The response is a function of prompt,
    these values and the server's numerics. It ends with a stop token of the target (included) or at ``max_new_tokens``.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class CaptureItem:
    """One sample to capture. ``generation`` numbers the attempts at it."""

    sample_id: str
    generation: int
    input_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """``target_revision``: the revision that the asker means; a server of another one refuses. ``None``: any."""

    items: tuple[CaptureItem, ...]
    spec: CaptureSpec
    sink: Sink
    target_revision: str | None = None


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """Why one sample has no features: its ``prompt`` cannot be captured by any server, or the ``store`` has no room."""

    whose: Literal["prompt", "store"]
    reason: str


@dataclass(frozen=True, slots=True)
class CapturedItem:
    """Features of one sample, readable under (``sample_id``, ``generation``) since before this was sent.

    ``store`` and ``key`` as in a ``SampleRef``. Inline: ``store`` is ``inline``, ``key`` the byte at which its buffer
    starts behind the head of the answer. Of a sample that failed all but the names is empty.
    """

    sample_id: str
    generation: int
    num_tokens: int
    store: str = ""
    key: str = ""
    num_bytes: int = 0
    features: tuple[FeatureSpec, ...] = ()
    failure: ItemFailure | None = None


@dataclass(frozen=True, slots=True)
class CaptureReply:
    """One item a requested sample, in the order of the request."""

    target_revision: str
    items: tuple[CapturedItem, ...]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Responses to ``prompts``, without features. A server may batch them, among themselves and with others."""

    prompts: tuple[tuple[int, ...], ...]
    generate: Generate
    target_revision: str | None = None


@dataclass(frozen=True, slots=True)
class GeneratedItem:
    """``token_ids``: the response alone. ``stopped``: a stop token ended it, which is its last one."""

    token_ids: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True, slots=True)
class GenerateReply:
    target_revision: str
    items: tuple[GeneratedItem, ...]


@dataclass(frozen=True, slots=True)
class CloseSink:
    """The run is over: the server lets go of the sink, and of the features that only it holds."""

    sink: Sink


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is. ``layers``: the only ones that it can give (``None``: any); ``last_hidden``: whether it gives
    that; ``sinks``: kinds that it can write to; ``strict``: features of a sample depend on it alone, to the bit.
    """

    protocol: int
    engine: str
    engine_version: str
    target_revision: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    layers: tuple[int, ...] | None
    last_hidden: bool
    sinks: tuple[str, ...]
    strict: bool
    max_tokens: int
    max_in_flight: int
