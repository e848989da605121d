"""What runs inside engines, without one: orders are carried out or refused, and nothing escapes."""

import base64
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import (
    CapturedItem,
    CaptureItem,
    CaptureRequest,
    CloseSink,
    InlineSink,
    MooncakeSink,
    SharedDirSink,
    SharedMemorySink,
    Sink,
)
from specforge.contracts.capture_wire import Refusal
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore
from specforge.data_plane.tensors import views
from specforge.errors import ConfigError, ContractError, FeatureStoreError
from specforge.inference.plugins import recorder as recorder_module
from specforge.inference.plugins.orders import Order, read_order, write_order
from specforge.inference.plugins.recorder import MAX_RECONNECT_S, Outcome, Recorder, RecorderLimits, read_limits
from specforge.inference.plugins.target_files import FinalNorm

NORM = FinalNorm(torch.linspace(0.5, 1.5, 8), 1e-6, "weight")
IDS = (3, 1, 4, 1, 5)
SPEC = CaptureSpec((2, 0), True)
RUN = f"recorder-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(RecorderLimits(feature_dirs=(str(tmp_path),), max_sinks=2, max_feature_bytes=8 << 20), NORM)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_arena_stays() -> Iterator[None]:
    """A recorder leaves what readers may want, and here nobody does."""
    yield
    for path in SHARED_MEMORY.glob(f"*{RUN}*"):
        path.unlink()


def request_of(sink: Sink, spec: CaptureSpec = SPEC, sample_id: str = "a", generation: int = 1) -> CaptureRequest:
    return CaptureRequest((CaptureItem(sample_id, generation, ()),), spec, sink)


def hidden(seed: int = 0, num_tokens: int = len(IDS)) -> torch.Tensor:
    return torch.randn(3, num_tokens, 8, generator=torch.Generator().manual_seed(seed))


def recorded(recorder: Recorder, request: CaptureRequest, states: torch.Tensor | None = None) -> Outcome:
    recorder.submit_capture("ticket", request, IDS, hidden() if states is None else states)
    return outcome_of(recorder)


def outcome_of(recorder: Recorder) -> Outcome:
    recorder.start_step()
    return recorder.collect()["ticket"]


def item_of(outcome: Outcome) -> CapturedItem:
    assert outcome.refusal is None
    assert outcome.item is not None
    return outcome.item


def read(store: FeatureStore, item: CapturedItem) -> dict[str, torch.Tensor]:
    stored = (item.store, item.key, item.num_bytes, item.features)
    ((tensors, handle),) = store.get(
        [SampleRef(item.sample_id, item.generation, item.num_tokens, (), *stored, "", "", "")]
    )
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    store.release([handle])
    return copies


def shared_memory(capacity_bytes: int = 4 << 20) -> SharedMemorySink:
    return SharedMemorySink(f"{RUN}-{uuid.uuid4().hex[:8]}", capacity_bytes, 64)


def assert_right(tensors: dict[str, torch.Tensor], states: torch.Tensor) -> None:
    assert tensors["input_ids"].tolist() == list(IDS)
    assert torch.equal(tensors["aux"], torch.cat([states[0], states[1]], dim=1))
    assert torch.equal(tensors["last"], NORM(states[2]))


def test_features_are_put_and_the_last_one_is_normed(recorder: Recorder, tmp_path: Path):
    memory, directory = shared_memory(), SharedDirSink("run", str(tmp_path / "below"))
    Path(directory.path).mkdir()
    reader = SharedMemoryFeatureStore.attach(memory.run_id)
    assert_right(read(reader, item_of(recorded(recorder, request_of(memory)))), hidden())
    reader.close()
    files = SharedDirFeatureStore(Path(directory.path), "run")
    assert_right(read(files, item_of(recorded(recorder, request_of(directory)))), hidden())


def test_inline_features_come_with_the_outcome(recorder: Recorder):
    outcome = recorded(recorder, request_of(InlineSink(), CaptureSpec((2, 0), True, "bfloat16")))
    data = torch.frombuffer(bytearray(base64.b64decode(outcome.data)), dtype=torch.uint8).clone()
    tensors = views(data, item_of(outcome).features)
    assert torch.equal(tensors["last"], NORM(hidden()[2]).bfloat16())


def test_sample_too_large_for_an_inline_answer_is_its_own_failure():
    """One long prompt must not end what the server does for all others."""
    recorder = Recorder(RecorderLimits(max_inline_bytes=100), NORM, named="OPTION_{}".format)
    failure = item_of(recorded(recorder, request_of(InlineSink()))).failure
    recorder.close()
    assert failure is not None
    assert failure.whose == "prompt"
    assert "OPTION_max_inline_bytes" in failure.reason


def test_what_a_step_submits_is_collected_by_the_next_one(recorder: Recorder):
    recorder.start_step()
    recorder.submit_capture("ticket", request_of(InlineSink()), IDS, hidden())
    assert recorder.collect() == {}
    recorder.start_step()
    assert recorder.collect().keys() == {"ticket"}
    recorder.start_step()
    assert recorder.collect() == {}


def test_waiting_hidden_states_are_bounded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    """The second submission waits for the first, which waits for us."""
    monkeypatch.setattr(recorder_module, "MAX_SNAPSHOT_BYTES", hidden().numel() * 4)
    released, opened = threading.Event(), recorder_module.open_sink

    def slowly(sink: Sink, host: str) -> FeatureStore:
        assert released.wait(60)
        return opened(sink, host)

    monkeypatch.setattr(recorder_module, "open_sink", slowly)
    memory = shared_memory()
    recorder.submit_capture("first", request_of(memory), IDS, hidden())
    second = threading.Thread(target=recorder.submit_capture, args=("second", request_of(memory), IDS, hidden()))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    released.set()
    second.join(60)
    recorder.start_step()
    assert recorder.collect().keys() == {"first", "second"}
    recorder.submit_close("ticket", memory)


def test_repeats_are_answered_with_what_lives(recorder: Recorder):
    memory = shared_memory()
    reader = SharedMemoryFeatureStore.attach(memory.run_id)
    first = item_of(recorded(recorder, request_of(memory)))
    assert item_of(recorded(recorder, request_of(memory), hidden(seed=9))) == first
    assert_right(read(reader, first), hidden())
    others = [
        ((3, 1, 4, 1, 6), SPEC),
        (IDS, CaptureSpec((2, 0), True, "bfloat16")),
        (IDS, CaptureSpec((0, 2), True)),
    ]
    for token_ids, spec in others:
        recorder.submit_capture("ticket", request_of(memory, spec), token_ids, hidden())
        failure = item_of(outcome_of(recorder)).failure
        assert failure is not None
        assert (failure.whose, "new generation" in failure.reason) == ("store", True)
    assert item_of(recorded(recorder, request_of(memory, generation=2))).key != first.key
    reader.close()
    recorder.submit_close("ticket", memory)
    outcome_of(recorder)


def test_generation_that_was_freed_is_not_put_again(recorder: Recorder, tmp_path: Path):
    directory = SharedDirSink("run", str(tmp_path))
    item = item_of(recorded(recorder, request_of(directory)))
    SharedDirFeatureStore(tmp_path, "run").abort([(item.sample_id, item.generation)])
    failure = item_of(recorded(recorder, request_of(directory))).failure
    assert failure is not None
    assert failure.whose == "store"
    assert "new generation" in failure.reason
    later = item_of(recorded(recorder, request_of(directory, generation=2)))
    assert_right(read(SharedDirFeatureStore(tmp_path, "run"), later), hidden())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_the_prompts_fault(recorder: Recorder, value: float):
    states = hidden()
    states[1, 3, 3] = value
    failure = item_of(recorded(recorder, request_of(InlineSink()), states)).failure
    assert failure is not None
    assert failure.whose == "prompt"
    assert "'aux'" in failure.reason


def test_full_store_is_the_stores_fault_and_too_large_a_sample_the_prompts(recorder: Recorder):
    memory = shared_memory(1 << 20)
    states = hidden(num_tokens=160)
    whose = set()
    for number in range(200):
        request = request_of(memory, sample_id=str(number))
        recorder.submit_capture("ticket", request, range(160), states)
        failure = item_of(outcome_of(recorder)).failure
        if failure is not None:
            whose.add(failure.whose)
    assert whose == {"store"}
    recorder.submit_capture("ticket", request_of(memory, sample_id="large"), range(20_000), hidden(0, 20_000))
    failure = item_of(outcome_of(recorder)).failure
    assert failure is not None
    assert failure.whose == "prompt"
    recorder.submit_close("ticket", memory)
    outcome_of(recorder)


def test_directories_that_were_not_named_are_refused(recorder: Recorder, tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path.parent)
    for path in (tmp_path.parent / "elsewhere", tmp_path / ".." / "elsewhere", tmp_path / "link" / "elsewhere"):
        refusal = recorded(recorder, request_of(SharedDirSink("run", str(path)))).refusal
        assert refusal is not None
        assert refusal.what == "request"
        assert "feature_dirs" in refusal.reason
        assert not path.exists()


def test_sinks_are_bounded_in_number_and_in_bytes(recorder: Recorder, tmp_path: Path):
    refusal = recorded(recorder, request_of(shared_memory(9 << 20))).refusal
    assert refusal is not None
    assert "max_feature_bytes" in refusal.reason
    sinks = [SharedDirSink(f"run-{number}", str(tmp_path)) for number in range(3)]
    outcomes = [recorded(recorder, request_of(sink)) for sink in sinks]
    assert [outcome.refusal is None for outcome in outcomes] == [True, True, False]
    assert outcomes[2].refusal is not None
    assert outcomes[2].refusal.what == "busy"
    recorder.submit_close("ticket", sinks[0])
    assert outcome_of(recorder) == Outcome()
    assert recorded(recorder, request_of(sinks[2])).refusal is None


def test_idle_sink_makes_room(tmp_path: Path):
    now = [0.0]
    limits = RecorderLimits(feature_dirs=(str(tmp_path),), max_sinks=1, sink_idle_s=100.0)
    recorder = Recorder(limits, NORM, clock=lambda: now[0])
    first, second = (SharedDirSink(f"run-{number}", str(tmp_path)) for number in range(2))
    assert recorded(recorder, request_of(first)).refusal is None
    now[0] = 99.0
    assert recorded(recorder, request_of(second)).refusal is not None
    now[0] = 101.0
    assert recorded(recorder, request_of(second)).refusal is None
    recorder.close()


def test_closing_a_sink_frees_and_ending_leaves(tmp_path: Path):
    recorder = Recorder(RecorderLimits(), NORM)
    closed, left = shared_memory(), shared_memory()
    items = [item_of(recorded(recorder, request_of(sink))) for sink in (closed, left)]
    readers = [SharedMemoryFeatureStore.attach(sink.run_id) for sink in (closed, left)]
    recorder.submit_close("ticket", closed)
    outcome_of(recorder)
    recorder.close()
    assert readers[0].stored() == []
    assert_right(read(readers[1], items[1]), hidden())
    readers[1].abort([("a", 1)])
    for reader in readers:
        reader.close()


def test_unforeseen_errors_are_answers(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    def broken(sink: Sink, host: str) -> FeatureStore:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(recorder_module, "open_sink", broken)
    refusal = recorded(recorder, request_of(shared_memory())).refusal
    assert refusal == Refusal("engine", "ZeroDivisionError: a bug")


def test_sink_that_fails_is_waited_for_once_a_step(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    opened: list[float] = []

    def away(sink: Sink, host: str) -> FeatureStore:
        assert isinstance(sink, MooncakeSink)
        opened.append(sink.reconnect_s)
        raise FeatureStoreError("the master is away")

    monkeypatch.setattr(recorder_module, "open_sink", away)
    sink = MooncakeSink(RUN, "127.0.0.1:9", "127.0.0.1:9", "tcp", "", "P2PHANDSHAKE", 1 << 20, 3600.0)
    recorder.start_step()
    for step in (1, 2):
        for number in range(5):
            recorder.submit_capture(str(number), request_of(sink, sample_id=str(number)), IDS, hidden())
        recorder.start_step()
        assert set(recorder.collect().values()) == {Outcome(refusal=Refusal("engine", "the master is away"))}
        assert opened == [MAX_RECONNECT_S] * step


def test_orders_come_back_as_they_were_written():
    for order in (
        Order(),
        Order(close=CloseSink(shared_memory())),
        Order(capture=request_of(InlineSink(), CaptureSpec((1,), False, "bfloat16"))),
    ):
        assert read_order(write_order(order)) == order


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        5,
        {"capture": None},
        {"capture": {}, "close": {}},
        {"other": {}},
        {"close": {"sink": {"kind": "unknown"}}},
        write_order(Order(CaptureRequest((CaptureItem("a", 1, (5,)),), SPEC, InlineSink()))),
        write_order(Order(CaptureRequest((CaptureItem("a", 1, ()), CaptureItem("b", 1, ())), SPEC, InlineSink()))),
        write_order(Order(CaptureRequest((CaptureItem("a", 0, ()),), SPEC, InlineSink()))),
    ],
)
def test_orders_that_may_not_be_acted_upon_are_refused(value: object):
    with pytest.raises(ContractError):
        read_order(value)


def test_options_of_a_user_are_read_strictly():
    assert read_limits({}) == RecorderLimits()
    read = read_limits({"feature_dirs": ["/a"], "advertise_host": "h", "max_sinks": 3, "sink_idle_s": 1.5})
    assert read == RecorderLimits(host="h", feature_dirs=("/a",), max_sinks=3, sink_idle_s=1.5)
    for wrong in ({"feature_dir": []}, {"feature_dirs": "/a"}, {"max_sinks": "3"}, {"host": "h"}, {"max_sinks": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            read_limits(wrong)
