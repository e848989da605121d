"""``specforge`` that dies with the N-th feature file on the disk and not in the index: ``N SIGNAL ...``."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from specforge.cli.main import main
from specforge.data_plane import offline_writer


def dying(num_files: int, number: signal.Signals) -> Any:
    """``write_file`` that sends ``number`` to this process after ``num_files`` calls."""
    write_file, num_written = offline_writer.write_file, 0

    def write(path: Path, *arguments: Any, **options: Any) -> int:
        nonlocal num_written
        crc = write_file(path, *arguments, **options)
        num_written += 1
        if num_written == num_files:
            os.kill(os.getpid(), number)
        return crc

    return write


if __name__ == "__main__":
    # a shell that starts its jobs in the background lets them, and their children, ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    offline_writer.write_file = dying(int(sys.argv[1]), signal.Signals[sys.argv[2]])
    main(sys.argv[3:])
