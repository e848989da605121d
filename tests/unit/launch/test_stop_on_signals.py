"""A signal asks for a stop wherever the main thread is."""

import datetime as dt
import os
import signal
import threading

import pytest
import torch.distributed as dist

from specforge.launch.runtime import stop_on_signals

LIMIT = dt.timedelta(seconds=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_the_main_thread_waits_outside_of_python(number):
    store = dist.HashStore()  # waits in C++, as the collectives do, where no Python signal handler runs
    with stop_on_signals(lambda: store.set("stopped", "yes")):
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        store.wait(["stopped"], LIMIT)
    assert store.get("stopped") == b"yes"


def test_handlers_are_as_before_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signals(lambda: None):
        assert [signal.getsignal(number) for number in numbers] != before
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # the second one interrupts
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_in_another_thread_nothing_is_changed():
    found = []

    def enter() -> None:
        with stop_on_signals(lambda: None):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
