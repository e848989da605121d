"""A request to stop, at every instant that matters, unwinds once and leaves the resources closed."""

import contextlib

import pytest

from specforge.launch.runtime import StopCapture, StopOnce


@pytest.mark.parametrize("moment", ["before", "inside", "while closing"])
def test_resources_are_closed_whenever_the_request_comes(moment):
    stop, closed, reached = StopOnce(), [], []

    def close() -> None:
        if moment == "while closing":
            stop.request()
        closed.append(True)

    if moment == "before":
        stop.request()
    with contextlib.suppress(StopCapture), contextlib.ExitStack() as resources, stop:
        resources.callback(close)
        if moment == "inside":
            stop.request()
        reached.append(True)
    assert reached == ([True] if moment == "while closing" else [])
    assert closed == ([] if moment == "before" else [True])


def test_a_second_request_does_not_interrupt_the_unwinding():
    stop, unwound = StopOnce(), []

    def work() -> None:
        with stop:
            try:
                stop.request()
            finally:
                stop.request()
                unwound.append(True)

    with pytest.raises(StopCapture):
        work()
    assert unwound == [True]
