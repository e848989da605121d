"""A child process of a run that kills itself at a fault point: ``armed_role.py DIRECTORY <arguments of a role>``.

Each point fires once in the life of a run, the second time that a process passes it; ``DIRECTORY`` remembers which did.
"""

import os
import signal
import sys
from pathlib import Path

from specforge.faults import FAULT_POINTS, arm
from specforge.launch import roles


def points_of(role: str) -> list[str]:
    """In the order in which they are armed: first those that a sample passes once in the life of a run."""
    names = [name for name in FAULT_POINTS if name.startswith("worker.") == (role == "capture")]
    return sorted(names, key=lambda name: not name.endswith(".recorded"))


def arm_next(directory: Path, role: str) -> None:
    """Arm the first point of ``role`` that has not fired."""
    for name in points_of(role):
        if not (directory / name).exists():
            arm(name, Trigger(directory / name))
            return


class Trigger:
    def __init__(self, mark: Path) -> None:
        self._mark = mark
        self._passed = 0

    def __call__(self) -> None:
        self._passed += 1
        if self._passed < 2:
            return
        try:
            os.close(os.open(self._mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return  # another worker died of it first
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    arm_next(Path(sys.argv[1]), sys.argv[2])
    sys.exit(roles.main(sys.argv[2:]))
