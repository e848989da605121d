"""The processes that train one draft together. A single one is the same, with nobody to talk to.

Ranks train different micro-batches of the same optimizer step; ranks of one *sequence group* train the same
micro-batches, each a part of the rows. Messages between ranks (sums of metrics, what the leader decides) are small and
go over gloo on the CPU; gradients and weights go over the backend of the device.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # exported, but not in its own stubs

from specforge.errors import ConfigError

LEADER = 0
"""The rank that owns the ledger, writes logs and decides."""
FILE = "file://"
"""Begins the name of a file at which ranks meet."""
LONG_WAIT = dt.timedelta(days=30)
"""For a wait that has no natural limit, such as that for captured samples. A peer that dies ends it at once over gloo;
over NCCL whoever started the ranks does."""


class Channel:
    """Small messages between all ranks, over a group of its own: each thread that talks has a channel.

    Every call is a collective: all ranks make the same calls in the same order.
    """

    def __init__(self, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.size = size
        self._group = group

    @property
    def group(self) -> dist.ProcessGroup | None:
        """``None`` with a single rank."""
        return self._group

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Everybody's ``values`` (as many on every rank), fp64, in rank order, the same on all ranks."""
        if self._group is None:
            return [list(map(float, values))]
        own = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self._group)
        return [row.tolist() for row in found]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, added in rank order: the same bits on all of them."""
        return [sum(column) for column in zip(*self.gather(values), strict=True)]

    def broadcast(self, payload: bytes) -> bytes:
        """The leader's ``payload``; that of the others is not looked at."""
        if self._group is None:
            return payload
        size = torch.tensor([len(payload)])
        dist.broadcast(size, group_src=LEADER, group=self._group)
        if payload and dist.get_rank() == LEADER:
            content = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        else:
            content = torch.empty(int(size), dtype=torch.uint8)
        if int(size):
            dist.broadcast(content, group_src=LEADER, group=self._group)
        return content.numpy().tobytes()

    def collect(self, payload: bytes) -> list[bytes]:
        """Everybody's ``payload`` in rank order, the same on all ranks."""
        if self._group is None:
            return [payload]
        sizes = [int(row[0]) for row in self.gather([float(len(payload))])]
        own = torch.zeros(max([1, *sizes]), dtype=torch.uint8)
        own[: len(payload)] = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: len(payload)]
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self._group)
        return [row[:size].numpy().tobytes() for row, size in zip(found, sizes, strict=True)]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather([0.0])


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of a run meet. ``init_method``: ``env://``, or ``file://`` and a path as it is, not encoded."""

    init_method: str
    rank: int
    size: int

    def open_file(self) -> FileStore | None:
        """The file where they meet, if it is one."""
        # By itself torch takes the path for a URL: it decodes nothing, and stops at a "#".
        if not self.init_method.startswith(FILE):
            return None
        store = FileStore(self.init_method.removeprefix(FILE), self.size)
        store.set_timeout(LONG_WAIT)
        return store


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank's view. ``main`` is for the training loop, ``stream`` for whoever fetches batches, ``background`` for
    the thread that writes checkpoints.

    ``sequence_size`` ranks with consecutive numbers are a sequence group; ``sequence_group`` is this rank's, over the
    device's backend, ``None`` for groups of one.
    """

    rank: int = 0
    size: int = 1
    sequence_size: int = 1
    main: Channel = field(default_factory=Channel)
    stream: Channel = field(default_factory=Channel)
    background: Channel = field(default_factory=Channel)
    sequence_group: dist.ProcessGroup | None = None

    @property
    def is_leader(self) -> bool:
        return self.rank == LEADER

    @property
    def data_rank(self) -> int:
        """Which share of a global batch this rank trains, of ``data_size``."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        return self.size // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_size

    @classmethod
    def join(cls, where: Rendezvous, device_type: str = "cpu", sequence_size: int = 1) -> Ranks:
        """Meet the others; returns when all are there. :meth:`leave` ends it. Once a process."""
        if where.size % sequence_size:
            raise ConfigError(
                f"training.sequence_parallel is {sequence_size}, which does not divide the {where.size} train ranks; "
                "choose a divisor, or another number of ranks"
            )
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        file = where.open_file()
        dist.init_process_group(
            backend,
            init_method=None if file is not None else where.init_method,
            store=file,
            rank=where.rank,
            world_size=where.size,
            timeout=LONG_WAIT,
        )
        main, stream, background = (
            Channel(where.size, dist.new_group(backend="gloo", timeout=LONG_WAIT)) for _ in range(3)
        )
        own = _own_group(where, sequence_size) if sequence_size > 1 else None
        return cls(where.rank, where.size, sequence_size, main, stream, background, own)

    def leave(self) -> None:
        """Close the groups. The others may go on talking only to find out."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _own_group(where: Rendezvous, sequence_size: int) -> dist.ProcessGroup:
    """The group of ``sequence_size`` neighbours that this rank is in; every rank makes all of them."""
    groups: list[dist.ProcessGroup] = [
        dist.new_group(list(range(first, first + sequence_size))) for first in range(0, where.size, sequence_size)
    ]
    return groups[where.rank // sequence_size]
