"""One run a directory: a lock that the processes of a run hold together, and that goes with the last of them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from specforge.data_plane.processes import ProcessIdentity
from specforge.errors import ConfigError

_LOG = logging.getLogger(__name__)

LOCK_FILE = "lock"
ORPHANS_LEAVE_S = 60.0
"""How long the children of a killed run are waited for. They finish one optimizer step and write a checkpoint."""
_RETRY_S = 0.1


@contextlib.contextmanager
def run_lock(directory: Path, orphans_leave_s: float = ORPHANS_LEAVE_S) -> Iterator[int]:
    """Hold ``directory``, which is made where it is not there; children that inherit the descriptor hold it too.

    A :class:`ConfigError` while another process holds it; the children of one that was killed are waited for, up to
    ``orphans_leave_s``.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be the directory of a run ({error.strerror}); choose one that can be written"
        ) from None
    try:
        _take(descriptor, directory, orphans_leave_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(ProcessIdentity.current()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(directory: Path) -> bool:
    """Whether a process works in ``directory`` now."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _take(descriptor: int, directory: Path, orphans_leave_s: float) -> None:
    give_up_at: float | None = None
    while not _flock(descriptor, fcntl.LOCK_EX):
        owner = ProcessIdentity.parse(os.pread(descriptor, 100, 0).decode("ascii", "replace"))
        if give_up_at is None:
            give_up_at = time.monotonic() + orphans_leave_s
            _LOG.info("%s is held; its owner: %s", directory, owner)
        if (owner is not None and not owner.is_dead()) or time.monotonic() >= give_up_at:
            raise ConfigError(f"{directory} is in use by another process; wait for it, stop it, or choose another one")
        time.sleep(_RETRY_S)


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
