"""``specforge train`` whose target takes its time: ``slow_ranks.py SECONDS DIRECTORY RUN_YAML``.

Every rank notes each sample that it captured as one byte of ``DIRECTORY/RANK_NAME`` and then sleeps ``SECONDS``.
Started by the supervisor with the arguments of a role it is that role.
"""

import sys
import time
from pathlib import Path

from specforge.config.load import load_run_config
from specforge.faults import arm
from specforge.launch import roles
from specforge.launch.compose import build_online_ranks_runtime
from specforge.launch.lock import run_lock


def act(seconds: float, notes: Path, arguments: list[str]) -> int:
    own = notes / arguments[arguments.index("--name") + 1]

    def note_and_sleep() -> None:
        with own.open("ab") as file:
            file.write(b".")
        time.sleep(seconds)

    arm("worker.captured", note_and_sleep)
    return roles.main(arguments)


def start(seconds: str, notes: str, run_yaml: Path) -> None:
    config = load_run_config(run_yaml, [])
    with run_lock(config.run_dir) as lock:
        command = [sys.executable, __file__, seconds, notes]
        build_online_ranks_runtime(config, keep_open=(lock,), command=command).run()


if __name__ == "__main__":
    if len(sys.argv) > 4:
        sys.exit(act(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
    try:
        start(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except KeyboardInterrupt:
        sys.exit(130)
