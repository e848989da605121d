import contextlib
import os
import signal

import pytest

from specforge.launch.local import interrupted_when_terminated


def test_a_process_that_is_terminated_closes_what_it_opened():
    before = signal.getsignal(signal.SIGTERM)
    closed = []

    def close() -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the closing
        closed.append("arena")

    def work() -> None:
        with interrupted_when_terminated(), contextlib.ExitStack() as resources:
            resources.callback(close)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert closed == ["arena"]
    assert signal.getsignal(signal.SIGTERM) is before
