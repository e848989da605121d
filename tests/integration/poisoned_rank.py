"""``specforge train`` in which one prompt kills whoever captures it: ``poisoned_rank.py RUN_YAML``.

Started by the supervisor with the arguments of a role it is that role.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from specforge.config.load import load_run_config
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.tasks import PromptTask
from specforge.inference.engine import CapturedSample
from specforge.inference.huggingface import HFTargetEngine
from specforge.launch import roles
from specforge.launch.compose import build_online_ranks_runtime
from specforge.launch.lock import run_lock

POISON = 13
"""Index of the prompt."""


def act(arguments: list[str]) -> int:
    capture = HFTargetEngine.capture

    def capture_or_die(
        self: HFTargetEngine, tasks: Sequence[PromptTask], spec: CaptureSpec
    ) -> Iterator[CapturedSample]:
        for task in tasks:
            if task.index == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
            yield from capture(self, [task], spec)

    HFTargetEngine.capture = capture_or_die  # type: ignore[method-assign]
    return roles.main(arguments)


def start(run_yaml: Path) -> None:
    config = load_run_config(run_yaml, [])
    with run_lock(config.run_dir) as lock:
        build_online_ranks_runtime(config, keep_open=(lock,), command=[sys.executable, __file__]).run()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(act(sys.argv[1:]))
    start(Path(sys.argv[1]))
