"""The queue of a capture server: order, batches, destinations without room."""

import threading

from served_target import item

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.inference.serving.jobs import CaptureJob, Finished, GenerateJob, JobQueue, Refused, when_all

SPEC, OTHER = CaptureSpec((0,), True), CaptureSpec((1,), True)


class Destination:
    has_room = True

    def end(self, job, outcome):
        if isinstance(outcome, Finished):
            job.done.set_result(outcome)
        else:
            job.done.set_exception(outcome)


def capture(name, length=10, spec=SPEC, owner=None):
    return CaptureJob(item(name, length), spec, owner or Destination())


def take(queue):
    return queue.take(0.01, lambda: None)


def test_jobs_are_taken_one_by_one_in_the_order_in_which_they_came():
    queue, jobs = JobQueue(0), [capture(name) for name in "abc"]
    assert queue.put(jobs)
    assert [take(queue) for _ in jobs] == [[job] for job in jobs]


def test_a_batch_has_what_fits_with_its_padding_and_is_alike():
    queue = JobQueue(40)
    a, other, b, long, c = (
        capture("a", 10),
        capture("o", 10, OTHER),
        capture("b", 12),
        capture("l", 30),
        capture("c", 4),
    )
    queue.put([a, other, b, long, c])
    assert take(queue) == [a, b, c]
    assert take(queue) == [other]
    assert take(queue) == [long]


def test_a_sample_larger_than_a_batch_goes_alone():
    queue, jobs = JobQueue(16), [capture("a", 50), capture("b", 4)]
    queue.put(jobs)
    assert take(queue) == jobs[:1]


def test_greedy_prompts_share_a_batch_and_drawn_ones_do_not():
    queue = JobQueue(1000)
    greedy = [GenerateJob((1, 2), Generate(4)), GenerateJob((3,), Generate(4))]
    drawn = [GenerateJob((1,), Generate(4, temperature=1.0)), GenerateJob((2,), Generate(4, temperature=1.0))]
    queue.put([*drawn, *greedy, capture("a")])
    assert [len(take(queue)) for _ in range(4)] == [1, 1, 2, 1]


def test_what_has_nowhere_to_go_waits_and_others_overtake_it():
    full, empty = Destination(), Destination()
    full.has_room = False
    queue = JobQueue(0)
    waits, goes = capture("a", owner=full), capture("b", owner=empty)
    queue.put([waits, goes])
    assert take(queue) == [goes]
    full.has_room = True
    queue.wake()
    assert take(queue) == [waits]


def test_an_idle_queue_says_so_and_a_closed_one_ends():
    queue, idle = JobQueue(0), threading.Event()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take(0.01, idle.set)))
    thread.start()
    assert idle.wait(60)
    assert queue.close() == []
    thread.join(60)
    assert taken == [None]
    assert not queue.put([capture("a")])


def test_closing_gives_back_what_waited():
    queue, job = JobQueue(0), capture("a")
    queue.put([job])
    assert queue.close() == [job]
    assert not queue.remove(job)


def test_all_are_done_when_the_last_one_is_however_it_ended():
    a, b = capture("a"), capture("b")
    both = when_all([a, b])
    a.refuse(Refused("busy", "later"))
    assert not both.done()
    b.owner.end(b, b.failed("store", "no room"))
    assert both.done()
    assert both.result() is None
