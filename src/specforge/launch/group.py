"""How the train ranks of a run find each other, and how one that lost the others says so.

Started by this program, ranks meet at a file that is new at every start. Started by torchrun, they meet where its
environment says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch

from specforge.errors import ConfigError
from specforge.training.ranks import Ranks, Rendezvous

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment of each process."""
LOST_PEER_WORDS = ("connection closed", "connection reset", "broken pipe")
"""In the messages of the back ends when a peer is gone; they have no exception type of their own."""


def worker_name(rank: int) -> str:
    """Of a train rank that captures, as the ledger knows it."""
    return f"train-{rank}"


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of this process among the train ranks of a run, all on one host."""

    rank: int = 0
    size: int = 1
    init_method: str = ""

    def join(self, device: torch.device, sequence_size: int) -> Ranks:
        """Meet the others; returns when all are there. ``device`` is this rank's own."""
        if self.size == 1:
            return Ranks()
        # The address of the host's name may not be reachable, and nobody else is to listen in.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        where = Rendezvous(self.init_method, self.rank, self.size)
        return Ranks.join(where, device.type, sequence_size)


def torchrun_seat(environment: Mapping[str, str]) -> Seat | None:
    """The place that torchrun gave this process; ``None`` for a process by itself."""
    size = environment.get("WORLD_SIZE", "")
    if "RANK" not in environment or not size.isdecimal() or int(size) < 2:
        return None
    missing = [name for name in TORCHRUN if name not in environment]
    if missing:
        raise ConfigError(
            f"the environment has RANK and WORLD_SIZE={size} but no {missing[0]}: start the run with torchrun, or "
            "unset both to train with launch.num_train_ranks processes"
        )
    here = environment.get("LOCAL_WORLD_SIZE", size)
    if here != size:
        raise ConfigError(
            f"torchrun started {size} ranks, {here} of them on this host: all train ranks of a run are on one host; "
            "use --nnodes 1"
        )
    return Seat(int(environment["RANK"]), int(size), "env://")


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` says no more than that another rank went away: that rank, or its end, knows better why."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, torch.distributed.DistNetworkError):
            return True
        # The back ends raise it; a RunFailed only quotes others, and is judged by what caused it.
        if isinstance(found, RuntimeError) and any(word in str(found).lower() for word in LOST_PEER_WORDS):
            return True
        found = found.__cause__
    return False


def leave_at_once(code: int) -> NoReturn:
    """End a rank without the end of its interpreter, at which threads of the back ends may abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
