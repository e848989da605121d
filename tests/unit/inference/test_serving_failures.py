"""CaptureService where something breaks: who is told, who is to blame, and what goes on."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from served_target import (
    WAIT_S,
    HeldEngine,
    captured,
    done,
    item,
    list_of,
    request,
)

from specforge.contracts.capture_server import CloseSink, Generate, GenerateRequest
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.errors import EngineError, FeatureStoreError
from specforge.inference.serving import writers
from specforge.inference.serving.jobs import Refused, when_all
from specforge.inference.serving.service import CaptureService
from specforge.inference.serving.settings import ServingSettings


def test_a_store_that_breaks_is_opened_anew(serve, sink, monkeypatch):
    service = serve()
    captured(service, request(item("a"), sink=sink))

    def broken(store, requests):
        raise FeatureStoreError("the disk is on fire")

    with monkeypatch.context() as patched:
        patched.setattr(SharedMemoryFeatureStore, "put", broken)
        with pytest.raises(Refused, match="on fire") as refused:
            captured(service, request(item("b"), sink=sink))
    assert refused.value.what == "engine"
    assert captured(service, request(item("b"), sink=sink))[0].items[0].failure is None
    # what was put before can still be read, until the run is over
    assert sorted(list_of(sink)) == [("a", 1), ("b", 1)]
    service.close_sink(CloseSink(sink))


def test_an_engine_that_breaks_is_said_to_have_and_works_on(serve, held, monkeypatch):
    service = serve()

    def broken(tasks, spec):
        raise EngineError("out of order")

    with monkeypatch.context() as patched:
        patched.setattr(held, "capture_together", broken)
        with pytest.raises(Refused, match="out of order") as refused:
            captured(service, request(item("a")))
    assert refused.value.what == "engine"
    assert captured(service, request(item("a")))[0].items[0].failure is None


def test_a_device_that_is_lost_ends_the_service(held):
    lost = threading.Event()
    service = CaptureService(held, ServingSettings(), lost.set)
    service.start()

    def broken(tasks, spec):
        raise torch.AcceleratorError("device lost")

    held.capture_together = broken
    with pytest.raises(Refused, match="device lost"):
        captured(service, request(item("a")))
    assert lost.wait(WAIT_S)
    assert isinstance(service.failed, torch.AcceleratorError)
    with pytest.raises(Refused, match="lost"):
        captured(service, request(item("b")))
    assert service.stop()


@pytest.mark.parametrize("where", ["answer", "store"])
def test_what_goes_wrong_in_a_writer_is_one_jobs_failure(serve, sink, monkeypatch, where):
    service = serve()
    place = sink if where == "store" else None
    captured(service, request(item("a"), sink=place))

    def exhausted(tensors):
        raise torch.OutOfMemoryError("no room to look for NaN")

    with monkeypatch.context() as patched:
        patched.setattr(writers, "not_finite", exhausted)
        with pytest.raises(Refused, match="no room") as refused:
            captured(service, request(item("b"), sink=place))
    assert refused.value.what == "engine"
    # the store is the same as before: what it had is known
    reply = captured(service, request(item("a"), item("b"), sink=place))[0]
    assert [one.failure for one in reply.items] == [None, None]
    assert service.failed is None
    if place is not None:
        assert len({one.key.split(":")[0] for one in reply.items}) == 1
    service.close_sink(CloseSink(sink))


@pytest.mark.parametrize("where", ["answer", "store"])
def test_a_job_that_has_ended_already_harms_nobody(serve, held, sink, where):
    service = serve()
    place = sink if where == "store" else None
    with held.held():
        ticket = service.capture(request(item("a"), sink=place))
        assert held.begun.wait(WAIT_S)
        (job,) = ticket.jobs
        job.done.set_result(job.failed("store", "by other means"))
    done(service, ticket)
    assert captured(service, request(item("b"), sink=place))[0].items[0].failure is None
    assert service.failed is None
    service.close_sink(CloseSink(sink))


@pytest.mark.parametrize("broken", ["take", "has_changed"])
def test_a_thread_that_ends_ends_the_service_and_nobody_waits_on(held, monkeypatch, broken):
    lost = threading.Event()
    service = CaptureService(held, ServingSettings(), lost.set)
    service.start()

    def fails(*_, **__):
        raise AssertionError("never to be expected")

    with held.held():
        first, second = (service.capture(request(item(name))) for name in "ab")
        assert held.begun.wait(WAIT_S)
        if broken == "take":
            monkeypatch.setattr(service._queue, "take", fails)
        else:
            service._inline._has_changed = fails
    for ticket in (first, second):
        when_all(ticket.jobs).result(WAIT_S)
    assert lost.wait(WAIT_S)
    assert isinstance(service.failed, AssertionError)
    with pytest.raises(Refused, match="lost"):
        captured(service, request(item("c")))
    assert service.stop()


@pytest.mark.parametrize(("times", "whose"), [(1, None), (2, "prompt")])
def test_a_sample_that_finds_no_memory_is_tried_once_more_alone(serve, held, monkeypatch, times, whose):
    service = serve(order="arrival")
    captures, left = held.capture_together, [times]

    def short_of_memory(tasks, spec):
        if tasks[0].sample_id == "a" and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return captures(tasks, spec)

    monkeypatch.setattr(held, "capture_together", short_of_memory)
    (one,) = captured(service, request(item("a")))[0].items
    assert (one.failure.whose if one.failure else None) == whose
    assert captured(service, request(item("b")))[0].items[0].failure is None


def test_no_memory_is_the_engines_where_others_have_it(serve, held, monkeypatch):
    service = serve()

    def short_of_memory(tasks, spec):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(held, "capture_together", short_of_memory)
    monkeypatch.setattr(service, "_others_use_the_device", lambda: True)
    with pytest.raises(Refused, match="others use") as refused:
        captured(service, request(item("a")))
    assert refused.value.what == "engine"


def test_stored_samples_are_looked_for_seldom_where_they_are_many(serve, sink, monkeypatch):
    looked = []
    live = SharedMemoryFeatureStore.live

    def counting(store, refs):
        looked.append(len(refs))
        return live(store, refs)

    monkeypatch.setattr(writers, "MAX_REMEMBERED", 4)
    monkeypatch.setattr(SharedMemoryFeatureStore, "live", counting)
    service = serve()
    for number in range(40):
        captured(service, request(item(f"s{number}", 3), sink=sink))
    assert sum(looked) < 2 * 40
    assert max(looked) > 4
    service.close_sink(CloseSink(sink))


@pytest.mark.parametrize("how", ["abandoned", "stopped"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_that_nobody_gets_is_not_finished(target_dir, how, temperature):
    engine = HeldEngine(target_dir("qwen3"))
    engine.info = replace(engine.info, eos_token_ids=())
    service = CaptureService(engine, ServingSettings(grace_s=WAIT_S))
    service.start()
    forwards = []
    go, begun = threading.Event(), threading.Event()
    check = service._check_wanted

    def counted(prompts):
        forwards.append(len(prompts))
        if len(forwards) == 3:
            begun.set()
            assert go.wait(WAIT_S)
        check(prompts)

    service._check_wanted = counted
    ticket = service.generate(GenerateRequest(((3, 4),), Generate(100, temperature=temperature)))
    assert begun.wait(WAIT_S)
    stopping = threading.Thread(target=service.stop)
    if how == "abandoned":
        service.abandon(ticket)
        service.release(ticket)
    else:
        stopping.start()
        assert service._stopping.wait(WAIT_S)
    go.set()
    with pytest.raises(Refused) as refused:
        ticket.jobs[0].done.result(WAIT_S)
    assert refused.value.what == "busy"
    assert len(forwards) == 3
    if how == "abandoned":
        stopping.start()
    stopping.join(WAIT_S)


def test_a_request_from_before_the_end_of_its_run_does_not_open_the_sink_again(serve, sink):
    service = serve()
    before = time.monotonic()
    captured(service, request(item("a"), sink=sink))
    service.close_sink(CloseSink(sink))
    with pytest.raises(Refused, match="closed") as refused:
        service.admit(request(item("a"), sink=sink), before)
    assert refused.value.what == "busy"
    # the run that starts anew is served
    assert captured(service, request(item("a"), sink=sink))[0].items[0].failure is None
    service.close_sink(CloseSink(replace(sink, capacity_bytes=2 * sink.capacity_bytes)))
