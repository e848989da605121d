import threading
import time
from dataclasses import replace

import pytest
import torch
from served_world import wait_until

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.data_plane.tensors import materialised
from specforge.errors import PromptRefused, ServerRefused, ServerUnavailable
from specforge.inference.rollout import is_engine_wide
from specforge.inference.servers import engine as server_engine
from specforge.inference.servers.engine import ServerTargetEngine
from specforge.inference.servers.specforge import SpecforgeServer
from specforge.inference.servers.terms import Terms
from specforge.testing.fake_server import FakeServer, made_features
from specforge.testing.metadata_store import make_task
from specforge.testing.samples import SMALL_TARGET

SPEC = CaptureSpec((1, 3), True)


@pytest.fixture
def fakes():
    with FakeServer(SMALL_TARGET) as one, FakeServer(SMALL_TARGET) as two:
        yield one, two


@pytest.fixture
def engine(fakes):
    engine = ServerTargetEngine([SpecforgeServer(fake.url) for fake in fakes], SMALL_TARGET, max_in_flight=3)
    yield engine
    engine.close()


def check(samples, tasks):
    assert [sample.sample_id for sample in samples] == [task.sample_id for task in tasks]
    for sample, task in zip(samples, tasks, strict=True):
        expected = made_features(task.input_ids, SPEC, SMALL_TARGET.hidden_size)
        for name, source in expected.items():
            assert torch.equal(sample.tensors[name], materialised(source))


def test_samples_come_in_order_from_several_servers_at_once(fakes, engine):
    tasks = [make_task(i) for i in range(20)]
    for fake in fakes:
        fake.always, fake.slow_s = "slow", 0.02
    check(list(engine.capture(tasks, SPEC)), tasks)
    assert all(1 < fake.most_in_flight <= 3 for fake in fakes)
    assert len(fakes[0].captured) + len(fakes[1].captured) == 20


@pytest.mark.parametrize(
    "fault", ["hang_up", "cut", "garbage", "broken", "busy", "no_room", "swapped_tokens", "swapped"]
)
def test_what_one_server_fails_at_is_asked_of_another_under_the_next_generation(fakes, engine, fault):
    fakes[0].always = fault
    tasks = [make_task(i) for i in range(6)]
    check(list(engine.capture(tasks, SPEC)), tasks)
    assert fakes[0].captured
    assert {generation for _, generation in fakes[1].captured} >= {2}


def test_a_prompt_that_is_refused_is_its_own_failure(fakes, engine):
    for fake in fakes:
        fake.always = "prompt"
    with pytest.raises(PromptRefused, match="'s3'") as caught:
        list(engine.capture([make_task(3)], SPEC))
    assert not is_engine_wide(caught.value)
    for fake in fakes:
        fake.always = None
    check(list(engine.capture([make_task(4)], SPEC)), [make_task(4)])


def test_a_server_that_failed_is_asked_after_those_that_did_not(fakes, engine, monkeypatch):
    monkeypatch.setattr(server_engine, "FIRST_BACKOFF_S", 0.0)
    fakes[0].faults.append("hang_up")
    for i in range(5):
        check(list(engine.capture([make_task(i)], SPEC)), [make_task(i)])
    assert (len(fakes[0].captured), len(fakes[1].captured)) == (1, 5)


def test_busy_servers_are_waited_for_however_often_they_say_so(fakes, engine, monkeypatch):
    monkeypatch.setattr(server_engine, "LONGEST_BACKOFF_S", 0.01)
    for fake in fakes:
        fake.faults.extend(["busy", "no_room"] * 4)
    check(list(engine.capture([make_task(0)], SPEC)), [make_task(0)])


def test_servers_that_stay_busy_are_not_waited_for_for_ever(fakes, monkeypatch):
    monkeypatch.setattr(server_engine, "LONGEST_BACKOFF_S", 0.01)
    for fake in fakes:
        fake.always = "busy"
    engine = ServerTargetEngine([SpecforgeServer(fake.url) for fake in fakes], SMALL_TARGET, patience_s=0.5)
    began_at = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"had room for 0\.5 s.*made up: busy"):
        list(engine.capture([make_task(0)], SPEC))
    assert time.monotonic() - began_at >= 0.5
    engine.close()


def test_servers_of_another_number_format_are_not_used(fakes):
    fakes[1].info = replace(fakes[1].info, dtype="bfloat16")
    servers = [SpecforgeServer(fake.url) for fake in fakes]
    engine = ServerTargetEngine(servers, SMALL_TARGET, 1, terms=Terms("bfloat16"))
    tasks = [make_task(i) for i in range(6)]
    check(list(engine.capture(tasks, SPEC)), tasks)
    assert not fakes[0].captured
    engine.close()


def test_servers_that_fail_all_the_time_are_the_engines_failure(fakes, engine):
    for fake in fakes:
        fake.always = "broken"
    with pytest.raises(ServerUnavailable, match="4 requests for the same failed") as caught:
        list(engine.capture([make_task(0)], SPEC))
    assert is_engine_wide(caught.value)
    assert all(fake.url in str(caught.value) for fake in fakes)


def test_a_server_that_refuses_is_asked_no_more_and_none_left_is_an_error(fakes, engine):
    fakes[0].always = "unauthorized"
    tasks = [make_task(i) for i in range(5)]
    check(list(engine.capture(tasks, SPEC)), tasks)
    num_asked = len(fakes[0].captured)  # several may have been in flight when the first was refused
    check(list(engine.capture(tasks, SPEC)), tasks)
    assert len(fakes[0].captured) == num_asked
    fakes[1].always = "other_revision"
    with pytest.raises(ServerRefused, match="no capture server can serve this run") as caught:
        list(engine.capture(tasks, SPEC))
    assert fakes[1].url in str(caught.value)


def test_nobody_there_is_an_error_with_all_reasons(fakes):
    for fake in fakes:
        fake.stop()
    engine = ServerTargetEngine([SpecforgeServer(fake.url) for fake in fakes], SMALL_TARGET, patience_s=0.3)
    with pytest.raises(ServerUnavailable, match=r"has answered for 0\.3 s") as caught:
        list(engine.capture([make_task(0), make_task(1)], SPEC))
    assert all(fake.url in str(caught.value) for fake in fakes)
    engine.close()


def test_a_server_that_comes_back_is_waited_for(fakes, engine):
    for fake in fakes:
        fake.stop()
    found = []
    thread = threading.Thread(target=lambda: found.extend(engine.capture([make_task(0)], SPEC)), daemon=True)
    thread.start()
    fakes[1].start()
    thread.join(60.0)
    check(found, [make_task(0)])


def test_responses_come_in_the_order_of_their_prompts(engine):
    prompts = [tuple(range(i, i + 5)) for i in range(30)]
    found = engine.generate(prompts, Generate(3))
    assert [generation.token_ids for generation in found] == [prompt[::-1][:3] for prompt in prompts]
    assert engine.generate([], Generate(3)) == []


def test_responses_need_no_inline_sink(fakes, engine):
    for fake in fakes:
        fake.info = type(fake.info)(
            **{**{n: getattr(fake.info, n) for n in fake.info.__slots__}, "sinks": ("mooncake",)}
        )
    assert engine.generate([(1, 2)], Generate(1))[0].token_ids == (2,)
    with pytest.raises(ServerRefused, match="cannot write to inline"):
        list(engine.capture([make_task(0)], SPEC))


def test_close_ends_a_capture_in_flight(fakes, engine):
    for fake in fakes:
        fake.always = "never"
    raised = []

    def capture():
        try:
            list(engine.capture([make_task(i) for i in range(4)], SPEC))
        except ServerUnavailable as error:
            raised.append(error)

    thread = threading.Thread(target=capture, daemon=True)
    thread.start()
    wait_until(lambda: fakes[0].captured or fakes[1].captured, "a request is in flight")
    engine.close()
    thread.join(60.0)
    assert not thread.is_alive()
    assert raised
