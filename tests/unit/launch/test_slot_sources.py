"""Two ends of the leader's stream of windows, in threads of one process; between processes: tests/integration."""

import queue
from concurrent.futures import ThreadPoolExecutor

import pytest

from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.control_plane.base import Lease, LeaseReply
from specforge.errors import ProducerFailed
from specforge.launch.sources import CaptureWhileLeased, FollowerSource, LeaderSource
from specforge.testing.metadata_store import make_task
from specforge.training.ranks import Channel

DEADLINE_S = 30.0


class Ends:
    """What a broadcast is between two threads. One object an end."""

    def __init__(self, line: "queue.SimpleQueue[bytes | Exception]", *, leads: bool) -> None:
        self._line, self._leads = line, leads

    def broadcast(self, payload: bytes) -> bytes:
        if self._leads:
            self._line.put(payload)
            return payload
        content = self._line.get()
        if isinstance(content, Exception):
            raise content
        return content


def pair() -> tuple[Channel, Channel, "queue.SimpleQueue[bytes | Exception]"]:
    line: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    return Ends(line, leads=True), Ends(line, leads=False), line  # type: ignore[return-value]


def slot_ref(position: int) -> SlotRef:
    ref = SampleRef(
        sample_id=f"s{position}",
        generation=1,
        num_tokens=3,
        loss_spans=((1, 3),),
        store="local",
        key="k",
        num_bytes=12,
        features=(),
        target_revision="t",
        capture_fingerprint="c",
        worker_id="w",
    )
    return SlotRef(Slot(0, position), ref)


class Listed:
    """A source of so many slots; at its end, an error where there is one."""

    def __init__(self, num: int, error: Exception | None = None) -> None:
        self._refs = [slot_ref(position) for position in range(num)]
        self._error = error

    def get(self, max_slots: int) -> list[SlotRef]:
        if not self._refs and self._error is not None:
            raise self._error
        taken, self._refs = self._refs[:max_slots], self._refs[max_slots:]
        return taken


def windows(source, num_slots: int) -> list[list[SlotRef]]:
    found = []
    while window := source.get(num_slots):
        found.append(window)
    return found


@pytest.mark.parametrize("num", [0, 4, 6])
def test_a_follower_gets_the_windows_of_its_leader_and_the_same_end(num):
    ours, theirs, _ = pair()
    leader, follower = LeaderSource(Listed(num), ours, asks=False), FollowerSource(theirs)
    expected = windows(leader, 4)
    assert windows(follower, 4) == expected
    leader.close()
    follower.close()
    assert follower.get(4) == []


def test_a_failure_of_the_capture_side_reaches_all_ranks_at_the_same_window():
    ours, theirs, _ = pair()
    leader = LeaderSource(Listed(4, ProducerFailed("too many prompts failed")), ours, asks=False)
    follower = FollowerSource(theirs)
    for source in (leader, follower):
        assert len(source.get(4)) == 4
        with pytest.raises(ProducerFailed, match=r"^too many prompts failed$"):
            source.get(4)
        assert source.get(4) == []
        source.close()


def test_a_leader_that_ends_early_ends_the_wait_of_its_followers():
    ours, theirs, _ = pair()
    leader, follower = LeaderSource(Listed(8), ours, asks=False), FollowerSource(theirs)
    assert leader.get(4) == follower.get(4)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(follower.get, 4)
        leader.close()
        assert waiting.result(DEADLINE_S) == []
    follower.close()


def test_a_wait_for_the_leader_can_be_ended():
    _, theirs, line = pair()
    follower = FollowerSource(theirs)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(follower.get, 4)
        follower.cancel()
        assert waiting.result(DEADLINE_S) == []
    line.put(b'{"event": "slots", "refs": [], "last": true}')
    follower.close()


def test_the_loss_of_the_leader_is_raised_where_its_windows_are_awaited():
    _, theirs, line = pair()
    follower = FollowerSource(theirs)
    line.put(ConnectionError("connection closed by peer"))
    with pytest.raises(ConnectionError, match="closed by peer"):
        follower.get(4)
    follower.close()


def test_followers_capture_before_each_window_that_is_shared():
    ours, theirs, _ = pair()
    num_captures: list[int] = []
    leader = LeaderSource(Listed(8), ours, asks=True)
    follower = FollowerSource(theirs, lambda: num_captures.append(1))
    for number in (1, 2):
        assert leader.get(4) == follower.get(4)
        assert len(num_captures) == number
    leader.close()
    follower.close()


class Offered:
    """A control plane that has so many tasks to lease, and then none for the moment."""

    def __init__(self, num: int) -> None:
        self.num = num

    def lease(self, worker_id: str, max_tasks: int, timeout_s: float) -> LeaseReply:
        assert timeout_s == 0.0
        taken = min(max_tasks, self.num)
        self.num -= taken
        return LeaseReply(tuple(Lease(make_task(index), 1, 60.0) for index in range(taken)), finished=False)


class Leasing:
    """A worker that does no more than lease, one at a time."""

    def __init__(self, control, after_each) -> None:
        self._control, self._after_each = control, after_each
        self.is_stopped = False

    def run_once(self, timeout_s: float) -> bool:
        reply = self._control.lease("train-1", 1, timeout_s)
        self._after_each()
        return not reply.finished

    def stop(self) -> None:
        self.is_stopped = True


def test_a_follower_captures_what_it_is_leased_and_again_when_it_is_asked_again():
    control = Offered(3)
    capture = CaptureWhileLeased(lambda inner: Leasing(inner, lambda: None), control)
    capture()
    assert control.num == 0
    control.num = 2
    capture()
    assert control.num == 0


def test_a_follower_that_is_stopped_captures_no_more():
    control = Offered(10)
    workers: list[Leasing] = []

    def make(inner) -> Leasing:
        workers.append(Leasing(inner, lambda: capture.stop() if control.num == 7 else None))
        return workers[0]

    capture = CaptureWhileLeased(make, control)
    for _ in range(2):
        capture()
        assert control.num == 7
    assert workers[0].is_stopped
