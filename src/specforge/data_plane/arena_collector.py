"""What becomes of an arena whose writer is dead: its readable samples stay, everything else goes back to the system."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from specforge.data_plane.arena import (
    FREE,
    FREED,
    LIVE,
    NUM_BYTES,
    OFFSET,
    OLD_OFFSET,
    STATE,
    Arena,
    ArenaName,
    list_arenas,
)


def collect(arena: Arena) -> int:
    """Do the work of the dead writer of ``arena``; the number of samples freed. Any process may, at any time.

    Frees what was aborted, forgets what readers that died held and what a put left half done, and gives back the pages
    that no readable sample and no handle needs. Does nothing while another process is at it.
    """
    assert arena.name.writer.is_dead()
    with arena.upkeep() as ours:
        if not ours:
            return 0
        arena.clear_lanes_in_upkeep()
        states = arena.entries[:, STATE]
        torn = (states == LIVE) & ~arena.live_entries()
        states[torn] = FREE
        states[(states == LIVE) & ~arena.readable()] = FREED
        # FREED must be visible before the holds are looked at (see the module docstring of arena).
        arena.fence()
        held: np.ndarray = np.any(arena.holds, axis=1, keepdims=True)[:, 0]
        done = (states == FREED) & ~held
        states[done] = FREE
        arena.give_back(_wanted(arena, held))
        return int(done.sum())


def _wanted(arena: Arena, held: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of data that are readable or held: a hold may be older than the last move of its buffer."""
    for entry in np.flatnonzero((arena.entries[:, STATE] == LIVE) | held):
        words = arena.entries[entry].tolist()
        for offset in {words[OFFSET], words[OLD_OFFSET]} if held[entry] else {words[OFFSET]}:
            yield offset, offset + words[NUM_BYTES]


def dead_arenas(directory: Path, run_id: str | None) -> set[ArenaName]:
    """Arenas, or what is left of them, of writers that are certainly dead."""
    return {name for name, _ in list_arenas(directory, run_id) if name.writer.is_dead()}


def unlink(directory: Path, name: ArenaName) -> bool:
    """Remove the arena and its lane links; True if the arena was there. Another user's is left alone."""
    path = directory / str(name)
    existed = path.exists()
    with contextlib.suppress(PermissionError):
        # The arena before its links: a reader that claims a lane later finds it unlinked and takes its link along.
        path.unlink(missing_ok=True)
        for other, file_name in list_arenas(directory, name.run_id):
            if other == name:
                (directory / file_name).unlink(missing_ok=True)
    return existed
