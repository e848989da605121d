"""CaptureService: the same bits as in process, each sample captured once, bounds, and whose fault a failure is."""

import contextlib
import threading
from dataclasses import replace

import pytest
import torch
from served_target import (
    SPEC,
    WAIT_S,
    HeldEngine,
    arena,
    captured,
    done,
    in_process,
    item,
    list_of,
    request,
    same_bits,
)

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CloseSink, Generate, GenerateRequest, SharedDirSink
from specforge.contracts.refs import SampleRef
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.inference.serving.jobs import Refused, when_all


def read(sink, reply):
    """The features of all items, as another process of the host reads them."""
    with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as store:
        return read_from(store, reply)


def read_from(store, reply):
    refs = [
        SampleRef(
            sample_id=one.sample_id,
            generation=one.generation,
            num_tokens=one.num_tokens,
            loss_spans=(),
            store=one.store,
            key=one.key,
            num_bytes=one.num_bytes,
            features=one.features,
            target_revision=reply.target_revision,
            capture_fingerprint="",
            worker_id="w",
        )
        for one in reply.items
    ]
    found = store.get(refs)
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors, _ in found]
    store.release([handle for _, handle in found])
    return copies


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("captured_as", ["float32", "bfloat16", "float8_e4m3fn"])
def test_strict_order_gives_the_bits_of_one_process(target_dir, serve, sink, dtype, captured_as):
    engine = HeldEngine(target_dir("qwen3"), dtype)
    service = serve(engine)
    spec = replace(SPEC, dtype=captured_as)
    items = [item("a", 1), item("b", 17), item("c", 60)]
    expected = [in_process(engine, one, spec) for one in items]
    reply, inline = captured(service, request(*items, spec=spec))
    assert all(map(same_bits, inline, expected))
    reply, tensors = captured(service, request(*items, spec=spec, sink=sink))
    assert tensors == [None, None, None]
    assert all(map(same_bits, read(sink, reply), expected))
    assert all(len(batch) == 1 for batch in engine.batches)
    service.close_sink(CloseSink(sink))


def test_arrival_order_batches_what_waits_and_is_close(serve, held):
    service = serve(order="arrival", max_batch_tokens=256)
    items = [item(name, length) for name, length in [("a", 40), ("b", 5), ("c", 1), ("d", 33)]]
    with held.held():
        first = service.capture(request(item("first")))
        assert held.begun.wait(WAIT_S)
        ticket = service.capture(request(*items))
    done(service, first)
    _, tensors = done(service, ticket)
    assert ["a", "b", "c", "d"] in held.batches
    for one, got in zip(items, tensors, strict=True):
        expected = in_process(held, one)
        assert torch.equal(got["input_ids"], expected["input_ids"])
        for name in ("aux", "last"):
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)


def test_a_repeat_is_answered_with_the_features_that_there_are(serve, held, sink):
    service = serve()
    asked = request(item("a"), item("b"), sink=sink)
    first, _ = captured(service, asked)
    assert captured(service, asked)[0] == first
    assert held.batches == [["a"], ["b"]]
    service.close_sink(CloseSink(sink))


def test_requests_for_the_same_sample_share_one_capture(serve, held, sink):
    service = serve()
    with held.held():
        tickets = [service.capture(request(item("a"), sink=sink)) for _ in range(5)]
    replies = [done(service, ticket)[0] for ticket in tickets]
    assert replies == replies[:1] * 5
    assert held.batches == [["a"]]
    service.close_sink(CloseSink(sink))


def test_what_was_freed_is_captured_again_under_a_new_generation_only(serve, held, sink):
    service = serve()
    captured(service, request(item("a"), sink=sink))
    with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as reader:
        reader.abort([("a", 1)])
    (again,) = captured(service, request(item("a"), sink=sink))[0].items
    assert again.failure.whose == "store"
    assert "new generation" in again.failure.reason
    (new,) = captured(service, request(item("a", generation=2), sink=sink))[0].items
    assert new.failure is None
    assert held.batches == [["a"], ["a"]]
    service.close_sink(CloseSink(sink))


def test_a_generation_belongs_to_its_tokens(serve, sink):
    service = serve()
    captured(service, request(item("a", 10), sink=sink))
    with pytest.raises(Refused, match="other tokens"):
        service.capture(request(item("a", 11), sink=sink))
    service.close_sink(CloseSink(sink))


def test_nobody_waiting_any_more_means_no_forward_and_no_features(serve, held, sink):
    service = serve()
    with held.held():
        running = service.capture(request(item("a"), sink=sink))
        assert held.begun.wait(WAIT_S)
        queued = service.capture(request(item("b"), sink=sink))
        wanted = service.capture(request(item("c"), sink=sink))
        shared = service.capture(request(item("c"), sink=sink))
        for ticket in (running, queued, shared):
            service.abandon(ticket)
            service.release(ticket)
    assert done(service, wanted)[0].items[0].failure is None
    assert held.batches == [["a"], ["c"]]
    assert list_of(sink) == [("c", 1)]
    (again,) = captured(service, request(item("a"), sink=sink))[0].items
    assert again.failure is None
    service.close_sink(CloseSink(sink))


def test_not_a_number_is_the_prompts_failure_and_the_others_are_served(target_dir, serve, sink):
    engine = HeldEngine(target_dir("qwen3"))
    engine.tables.embed_tokens[5] = float("nan")
    service = serve(engine)
    bad = replace(item("bad"), input_ids=(3, 4, 5))
    good = replace(item("good"), input_ids=(3, 4, 6))
    for where in (None, sink):
        first, second = captured(service, request(bad, good, sink=where))[0].items
        assert first.failure.whose == "prompt"
        assert "NaN" in first.failure.reason
        assert second.failure is None
    service.close_sink(CloseSink(sink))


@pytest.mark.parametrize(
    ("ids", "said"), [((), "no tokens"), ((3, 64), "vocabulary"), ((3,) * 129, "longer than the target reads")]
)
@pytest.mark.parametrize("order", ["strict", "arrival"])
def test_a_prompt_that_the_target_cannot_read_fails_alone(serve, ids, said, order):
    service = serve(order=order)
    bad, good = captured(service, request(replace(item("bad"), input_ids=ids), item("good")))[0].items
    assert bad.failure.whose == "prompt"
    assert said in bad.failure.reason
    assert good.failure is None


def test_a_store_without_room_is_nobodys_fault_and_a_sample_too_large_is_the_prompts(serve):
    small = arena("serving-small", 64 * 64 * 200)
    service = serve(store_wait_s=0.1)
    huge = captured(service, request(item("huge", 60), sink=small))[0].items[0]
    assert huge.failure.whose == "prompt"
    outcomes = [captured(service, request(item(str(n), 30), sink=small))[0].items[0] for n in range(80)]
    refused = [one.failure.whose for one in outcomes if one.failure is not None]
    assert refused
    assert set(refused) == {"store"}
    with contextlib.closing(SharedMemoryFeatureStore.attach(small.run_id)) as reader:
        reader.abort(reader.stored())
    assert captured(service, request(item("later", 30), sink=small))[0].items[0].failure is None
    service.close_sink(CloseSink(small))


def test_stopping_refuses_what_waits_and_answers_what_runs(serve, held, sink):
    service = serve()
    with held.held():
        running = service.capture(request(item("a"), sink=sink))
        assert held.begun.wait(WAIT_S)
        waiting = service.capture(request(item("b"), sink=sink))
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        with pytest.raises(Refused, match="stopping") as refused:
            done(service, waiting)
        assert refused.value.what == "busy"
    assert done(service, running)[0].items[0].failure is None
    stopping.join(WAIT_S)
    # others may read on
    assert list_of(sink) == [("a", 1)]
    with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as reader:
        reader.abort([("a", 1)])
    unlink_all(sink)


def unlink_all(sink):
    """The arenas of this process, which is alive: nobody else would take them for left behind."""
    from specforge.data_plane.arena import list_arenas
    from specforge.data_plane.shared_memory import SHARED_MEMORY

    for _, name in list_arenas(SHARED_MEMORY, sink.run_id):
        (SHARED_MEMORY / name).unlink()


def test_too_many_requests_are_told_to_come_later(serve, held):
    service = serve(max_queued=2)
    with held.held():
        tickets = [service.capture(request(item(name))) for name in "ab"]
        with pytest.raises(Refused, match="--max-queued") as refused:
            service.capture(request(item("c")))
        assert refused.value.what == "busy"
    for ticket in tickets:
        done(service, ticket)
    captured(service, request(item("c")))


def test_answers_with_features_are_bounded(serve, held):
    service = serve(max_inline_bytes=12_000)
    with pytest.raises(Refused, match="--max-inline-bytes") as refused:
        service.capture(request(item("a", 100)))
    assert refused.value.what == "request"
    with held.held():
        ticket = service.capture(request(item("a", 20)))
        with pytest.raises(Refused, match="--max-inline-bytes") as refused:
            service.capture(request(item("b", 20)))
        assert refused.value.what == "busy"
    done(service, ticket)
    captured(service, request(item("b", 20)))


def test_another_revision_and_layers_that_are_not_there_are_refused(serve, held):
    service = serve()
    for asked in (request(item("a"), revision="another"), request(item("a"), spec=CaptureSpec((0, 4), True))):
        with pytest.raises(Refused) as refused:
            service.capture(asked)
        assert refused.value.what == "model"
    captured(service, request(item("a"), revision=held.info.revision))


def test_responses_are_the_engines_whatever_else_is_asked(serve, held):
    service = serve(order="arrival")
    prompts = ((5, 6, 7), (9,), (10, 11))
    for options in (Generate(6), Generate(6, temperature=1.0, top_p=0.9, top_k=20, seed=7)):
        ticket = service.generate(GenerateRequest(prompts, options))
        when_all(ticket.jobs).result(WAIT_S)
        reply = service.generated(ticket)
        service.release(ticket)
        alone = [held.generate([prompt], options)[0] for prompt in prompts]
        assert [(one.token_ids, one.stopped) for one in reply.items] == [(one.token_ids, one.stopped) for one in alone]


@pytest.mark.parametrize("prompt", [(), (64,), (3,) * 125])
def test_a_prompt_that_cannot_be_answered_is_refused(serve, prompt):
    with pytest.raises(Refused) as refused:
        serve().generate(GenerateRequest((prompt,), Generate(6)))
    assert refused.value.what == "request"


def test_files_of_an_earlier_server_are_nobodys_features_here(serve, held, tmp_path):
    sink = SharedDirSink("run", str(tmp_path))
    first, _ = captured(serve(feature_dirs=(tmp_path,)), request(item("a"), sink=sink))
    later = serve(feature_dirs=(tmp_path,))
    other = replace(item("a"), input_ids=item("b").input_ids)
    for asked in (other, item("a")):
        (one,) = captured(later, request(asked, sink=sink))[0].items
        assert one.failure.whose == "store"
        assert "new generation" in one.failure.reason
    # the store is well, and what is in it stays
    (new,) = captured(later, request(replace(other, generation=2), sink=sink))[0].items
    assert new.failure is None
    with contextlib.closing(SharedDirFeatureStore(tmp_path, "run")) as store:
        assert same_bits(read_from(store, first)[0], in_process(held, item("a")))
