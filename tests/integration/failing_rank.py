"""``specforge train`` in which one rank raises at its third sample: ``failing_rank.py RANK_NAME RUN_YAML``.

Started by the supervisor with the arguments of a role it is that role.
"""

import itertools
import sys
from pathlib import Path

from specforge.config.load import load_run_config
from specforge.faults import arm
from specforge.launch import roles
from specforge.launch.compose import build_online_ranks_runtime
from specforge.launch.lock import run_lock


class Raise:
    """At the third call, and at every one after it."""

    def __init__(self) -> None:
        self._calls = itertools.count(1)

    def __call__(self) -> None:
        if next(self._calls) >= 3:
            raise ValueError("odd hidden states")


def act(name: str, arguments: list[str]) -> int:
    if arguments[arguments.index("--name") + 1] == name:
        arm("worker.captured", Raise())
    return roles.main(arguments)


def start(name: str, run_yaml: Path) -> None:
    config = load_run_config(run_yaml, [])
    with run_lock(config.run_dir) as lock:
        build_online_ranks_runtime(config, keep_open=(lock,), command=[sys.executable, __file__, name]).run()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        sys.exit(act(sys.argv[1], sys.argv[2:]))
    start(sys.argv[1], Path(sys.argv[2]))
