import threading
import traceback
import weakref

import pytest

from specforge.data_plane.prefetch import PrefetchIterator


class Gate:
    """Counts what was asked of it and lets nothing through until it is opened."""

    def __init__(self, num_open=0):
        self.num_asked = 0
        self.num_open = num_open
        self.closed = False
        self.changed = threading.Condition()

    def __iter__(self):
        return self

    def __next__(self):
        with self.changed:
            self.num_asked += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.num_asked <= self.num_open or self.closed)
            if self.closed:
                raise ConnectionError("closed")
            return self.num_asked

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def wait_asked(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_asked >= count, timeout=30)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_and_the_thread_ends():
    with PrefetchIterator(range(50), depth=3) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    assert prefetch_threads() == []


def test_runs_ahead_by_the_depth_and_no_further():
    gate = Gate(num_open=1000)
    with PrefetchIterator(gate, depth=3) as items:
        gate.wait_asked(3)
        assert gate.num_asked == 3
        assert next(items) == 1
        gate.wait_asked(4)
        assert gate.num_asked == 4


def test_begins_no_item_while_those_that_wait_have_the_bytes():
    gate = Gate(num_open=1000)
    with PrefetchIterator(gate, depth=100, size=lambda _: 10, max_bytes=25) as items:
        gate.wait_asked(3)
        # 20 bytes wait: fewer than 25, so the third is made; with it 30 wait, and nothing more is asked for.
        wait_held(items, 3)
        assert gate.num_asked == 3
        assert next(items) == 1
        gate.wait_asked(4)
        wait_held(items, 3)
        assert gate.num_asked == 4


def wait_held(items, count):
    with items._condition:
        assert items._condition.wait_for(lambda: len(items._items) == count, timeout=30)


def test_an_item_larger_than_the_bound_is_made_one_at_a_time():
    gate = Gate(num_open=1000)
    with PrefetchIterator(gate, depth=5, size=lambda _: 1000, max_bytes=1) as items:
        for number in range(1, 20):
            wait_held(items, 1)
            assert gate.num_asked == number
            assert next(items) == number


def test_depth_bounds_items_without_bytes():
    gate = Gate(num_open=1000)
    with PrefetchIterator(gate, depth=2, size=lambda _: 0, max_bytes=1) as items:
        wait_held(items, 2)
        assert gate.num_asked == 2


def test_error_of_the_size_is_raised_in_the_consumer():
    with PrefetchIterator([1, None], depth=3, size=lambda item: item + 1, max_bytes=100) as items:
        assert next(items) == 1
        with pytest.raises(TypeError):
            next(items)


def test_what_was_handed_over_is_not_kept():
    class Item:
        pass

    made = (Item() for _ in range(2))
    with PrefetchIterator(made, depth=2) as items:
        first = weakref.ref(next(items))
        next(items)
        with pytest.raises(StopIteration):
            next(items)
        assert first() is None


def test_exception_arrives_after_the_items_before_it_with_its_traceback():
    def failing():
        yield 1
        raise_from_here()

    def raise_from_here():
        raise RuntimeError("broken sample")

    with PrefetchIterator(failing(), depth=4) as items:
        assert next(items) == 1
        with pytest.raises(RuntimeError, match="broken sample") as caught:
            next(items)
        assert "raise_from_here" in {frame.name for frame in traceback.extract_tb(caught.value.__traceback__)}
        with pytest.raises(StopIteration):
            next(items)


def test_close_ends_a_thread_that_waits_for_room():
    items = PrefetchIterator(range(1000), depth=1)
    items.close()
    items.close()
    assert prefetch_threads() == []
    with pytest.raises(StopIteration):
        next(items)


def test_close_unblocks_an_iterable_that_waits_and_drops_what_it_raises():
    gate = Gate()
    items = PrefetchIterator(gate, depth=1, unblock=gate.close)
    gate.wait_asked(1)
    items.close()
    assert prefetch_threads() == []
    assert list(items) == []


@pytest.mark.parametrize("bounds", [{"depth": 0}, {"depth": 1, "max_bytes": 0}])
def test_bounds_below_one_are_refused(bounds):
    with pytest.raises(ValueError, match="at least 1"):
        PrefetchIterator([], **bounds)
