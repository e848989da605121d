"""``specforge train`` with a capture process that kills itself: ``killed_recorder.py POINT MARK RUN_YAML``.

It dies the second time that it passes ``POINT``; ``MARK`` remembers that. Prints the outcome of the run.
"""

import json
import os
import signal
import sys
from pathlib import Path

from specforge.config.load import load_run_config
from specforge.faults import arm
from specforge.launch import roles
from specforge.launch.compose import build_disagg_online_runtime
from specforge.launch.lock import run_lock


class Trigger:
    def __init__(self, mark: Path) -> None:
        self._mark = mark
        self._passed = 0

    def __call__(self) -> None:
        self._passed += 1
        if self._passed == 2 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(point: str, mark: str, *rest: str) -> int:
    if len(rest) > 1:
        if rest[0] == "capture":
            arm(point, Trigger(Path(mark)))
        return roles.main(list(rest))
    config = load_run_config(Path(rest[0]), [])
    command = [sys.executable, __file__, point, mark]
    with run_lock(config.run_dir) as lock:
        outcome = build_disagg_online_runtime(config, keep_open=(lock,), command=command).run()
    print(json.dumps(outcome.to_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
