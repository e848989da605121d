"""How a capture server works, and what it refuses. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Order = Literal["strict", "arrival"]


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """``order`` strict: one sequence a forward, whose features depend on it alone, to the bit. arrival: what waits is
    batched, up to ``max_batch_tokens`` (padding included), and differs from that by rounding.

    ``max_queued`` requests are worked on or wait at one time. ``max_feature_bytes`` bounds arenas and transfer buffers
    of all sinks (``None``: half of the host's shared memory), ``max_inline_bytes`` the features of all answers that
    have them in their body. ``feature_dirs``: directories below which features may be written to files.
    ``advertise_host``: the address under which other hosts reach this one. A put waits ``store_wait_s`` for room.
    ``grace_s``: how long the running forward may take when the server is stopped.
    """

    order: Order = "strict"
    max_batch_tokens: int = 8192
    max_queued: int = 64
    max_sinks: int = 8
    max_feature_bytes: int | None = None
    max_inline_bytes: int = 4 << 30
    feature_dirs: tuple[Path, ...] = ()
    advertise_host: str = "127.0.0.1"
    sink_idle_s: float = 3600.0
    store_wait_s: float = 5.0
    body_timeout_s: float = 60.0
    answer_timeout_s: float = 300.0
    grace_s: float = 5.0
