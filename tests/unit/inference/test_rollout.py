import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.base import CommitReply, Lease, LeaseReply, Recorded
from specforge.data_plane.base import PutRequest, StoredFeatures
from specforge.data_plane.local import LocalFeatureStore
from specforge.data_plane.tensors import Columns, materialised
from specforge.errors import ControlPlaneError, EngineError, FeatureStoreError, FeatureStoreFull, StaleGeneration
from specforge.faults import FAULT_POINTS, arm, disarm
from specforge.inference.engine import CapturedSample, Generation
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.rollout import RolloutSettings, RolloutWorker
from specforge.prompts.config import GenerateOptions
from specforge.prompts.responses import ResponseOptions

SPEC = CaptureSpec((0, 2), True)


class RecordingControl:
    """Leases a fixed list of tasks once, accepts commits of the samples that are not in ``stale``."""

    def __init__(self, tasks: Sequence[PromptTask], duration_s: float = 60.0, stale: Sequence[str] = ()) -> None:
        self.tasks = list(tasks)
        self.waiting = list(tasks)
        self.recorded: dict[str, tuple[int, ...]] = {}
        self.offered: dict[str, tuple[int, ...]] = {}
        self.over: set[str] = set()
        self.duration_s = duration_s
        self.stale = set(stale)
        self.committed: list[SampleRef] = []
        self.failed: dict[str, str] = {}
        self.left: list[str | None] = []
        self.num_heartbeats = 0

    def lease(self, worker_id: str, max_tasks: int, timeout_s: float) -> LeaseReply:
        taken, self.waiting = self.waiting[:max_tasks], self.waiting[max_tasks:]
        return LeaseReply(tuple(Lease(task, 1, self.duration_s) for task in taken), not taken)

    def commit(self, refs: Sequence[SampleRef]) -> CommitReply:
        self.committed += [ref for ref in refs if ref.sample_id not in self.stale]
        return CommitReply(tuple(ref.sample_id not in self.stale for ref in refs))

    def record(self, worker_id: str, sample_id: str, generation: int, response_ids: Sequence[int]) -> Recorded:
        if sample_id in self.over:
            raise StaleGeneration("over")
        self.offered[sample_id] = tuple(response_ids)
        task = next(task for task in self.tasks if task.sample_id == sample_id)
        answered = task.answered(self.recorded.setdefault(sample_id, tuple(response_ids)))
        return Recorded(answered.input_ids, answered.loss_spans)

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        self.failed[sample_id] = reason

    def heartbeat(self, worker_id: str) -> None:
        self.num_heartbeats += 1

    def leave(self, worker_id: str, reason: str | None) -> None:
        self.left.append(reason)


class FailingEngine:
    """The real engine, except that it raises, or damages features, at one sample."""

    def __init__(self, engine: HFTargetEngine, sample_id: str, error: BaseException | None) -> None:
        self.info = engine.info
        self._engine, self._sample_id, self._error = engine, sample_id, error

    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterator[CapturedSample]:
        for sample in self._engine.capture(tasks, spec):
            if sample.sample_id == self._sample_id:
                if self._error is not None:
                    raise self._error
                last = sample.tensors["last"]
                layer = last.parts[0] if isinstance(last, Columns) else last
                layer[1, 3] = torch.nan
            yield sample


def tasks(count: int) -> list[PromptTask]:
    return [PromptTask(f"s{i}", i, tuple(range(3, 8 + i)), ((2, 5 + i),)) for i in range(count)]


def stored_bytes(engine: HFTargetEngine, task: PromptTask) -> int:
    (sample,) = engine.capture([task], SPEC)
    return LocalFeatureStore().put([PutRequest("x", 1, sample.tensors)])[0].num_bytes


def settings(**changes: object) -> RolloutSettings:
    values = {"worker_id": "w0", "spec": SPEC, "max_tasks": 2, "poll_s": 0.1, "target_revision": "rev"}
    return RolloutSettings(**{**values, **changes})


def test_every_task_is_captured_put_and_committed(engine: HFTargetEngine):
    control, store = RecordingControl(tasks(5)), LocalFeatureStore()
    RolloutWorker(control, engine, store, settings()).run()
    assert [ref.sample_id for ref in control.committed] == ["s0", "s1", "s2", "s3", "s4"]
    for task, ref in zip(tasks(5), control.committed, strict=True):
        assert (ref.num_tokens, ref.loss_spans, ref.generation) == (task.num_tokens, task.loss_spans, 1)
        assert (ref.worker_id, ref.target_revision, ref.capture_fingerprint) == ("w0", "rev", SPEC.fingerprint)
        ((stored, handle),) = store.get([ref])
        (expected,) = engine.capture([task], SPEC)
        assert all(torch.equal(stored[name], materialised(source)) for name, source in expected.tensors.items())
        store.release([handle])
    assert not control.failed
    assert not control.left


def test_run_once_says_whether_more_may_come(engine: HFTargetEngine):
    worker = RolloutWorker(RecordingControl(tasks(2)), engine, LocalFeatureStore(), settings())
    assert worker.run_once(0.0)
    assert not worker.run_once(0.0)


def test_features_of_a_stale_commit_are_freed(engine: HFTargetEngine):
    control, store = RecordingControl(tasks(3), stale=["s1"]), LocalFeatureStore()
    RolloutWorker(control, engine, store, settings()).run()
    assert [ref.sample_id for ref in control.committed] == ["s0", "s2"]
    assert store.health().num_samples == 2


def test_failing_prompt_is_reported_and_the_worker_goes_on(engine: HFTargetEngine):
    control, store = RecordingControl(tasks(4)), LocalFeatureStore()
    RolloutWorker(control, FailingEngine(engine, "s1", RuntimeError("odd prompt")), store, settings()).run()
    assert [ref.sample_id for ref in control.committed] == ["s0", "s2", "s3"]
    assert list(control.failed) == ["s1"]
    assert "odd prompt" in control.failed["s1"]
    assert "Traceback" in control.failed["s1"]
    assert not control.left


def test_prompt_outside_the_vocabulary_fails_alone(engine: HFTargetEngine):
    bad = PromptTask("bad", 9, (3, 1000), ())
    control = RecordingControl([*tasks(1), bad])
    RolloutWorker(control, engine, LocalFeatureStore(), settings()).run()
    assert [ref.sample_id for ref in control.committed] == ["s0"]
    assert "token id 1000" in control.failed["bad"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_damaged_features_are_never_stored(engine: HFTargetEngine, dtype: str):
    control, store = RecordingControl(tasks(2)), LocalFeatureStore()
    spec = CaptureSpec((0, 2), True, dtype)
    RolloutWorker(control, FailingEngine(engine, "s0", None), store, settings(spec=spec)).run()
    assert list(control.failed) == ["s0"]
    assert "'last'" in control.failed["s0"]
    assert store.health().num_samples == 1


def test_a_worker_whose_engine_broke_leaves_with_the_reason_and_nothing_behind(engine: HFTargetEngine):
    control, store = RecordingControl(tasks(2)), LocalFeatureStore()
    worker = RolloutWorker(control, FailingEngine(engine, "s1", EngineError("gone")), store, settings())
    with pytest.raises(EngineError, match="gone"):
        worker.run()
    (reason,) = control.left
    assert reason is not None
    assert "gone" in reason
    assert not control.committed
    assert not control.failed
    assert store.health().num_samples == 0


def test_unreachable_control_plane_is_raised_as_it_is(engine: HFTargetEngine):
    class Unreachable(RecordingControl):
        def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
            raise ControlPlaneError("no answer")

    control = Unreachable(tasks(2))
    worker = RolloutWorker(control, FailingEngine(engine, "s0", RuntimeError("x")), LocalFeatureStore(), settings())
    with pytest.raises(ControlPlaneError, match="no answer"):
        worker.run()
    assert not control.left


def test_worker_waits_for_room_in_a_full_store(engine: HFTargetEngine):
    store = LocalFeatureStore(capacity_bytes=2 * stored_bytes(engine, tasks(1)[0]))
    freed = threading.Event()

    class WaitingStore:
        name = store.name
        abort = staticmethod(store.abort)

        def put(self, requests: Sequence[PutRequest]) -> list[StoredFeatures]:
            try:
                return store.put(requests)
            except FeatureStoreFull:
                freed.set()
                raise

    control = RecordingControl([PromptTask(f"s{i}", i, tuple(range(3, 8)), ()) for i in range(3)])
    worker = RolloutWorker(control, engine, WaitingStore(), settings(max_tasks=1))
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert freed.wait(20.0)
    store.abort([("s0", 1)])
    thread.join(20.0)
    assert not thread.is_alive()
    assert [ref.sample_id for ref in control.committed] == ["s0", "s1", "s2"]


def test_a_worker_whose_store_stays_full_leaves(engine: HFTargetEngine):
    store = LocalFeatureStore(capacity_bytes=stored_bytes(engine, tasks(1)[0]))
    control = RecordingControl([PromptTask(f"s{i}", i, tuple(range(3, 8)), ()) for i in range(2)])
    worker = RolloutWorker(control, engine, store, settings(max_tasks=1, store_wait_s=0.05))
    with pytest.raises(FeatureStoreError, match="stayed full"):
        worker.run()
    assert len(control.left) == 1


def test_sample_larger_than_the_store_fails_alone(engine: HFTargetEngine):
    store = LocalFeatureStore(capacity_bytes=stored_bytes(engine, tasks(1)[0]))
    control = RecordingControl([PromptTask("big", 0, tuple(range(3, 60)), ()), *tasks(1)])
    RolloutWorker(control, engine, store, settings()).run()
    assert list(control.failed) == ["big"]
    assert [ref.sample_id for ref in control.committed] == ["s0"]


def test_heartbeat_is_sent_between_captures_that_take_long(engine: HFTargetEngine):
    control = RecordingControl(tasks(3), duration_s=1e-6)
    RolloutWorker(control, engine, LocalFeatureStore(), settings(max_tasks=3)).run()
    assert control.num_heartbeats >= 2


@pytest.mark.parametrize("waits_for_servers", [True, False])
def test_leases_are_kept_during_captures_of_servers_alone(engine: HFTargetEngine, waits_for_servers: bool):
    control = RecordingControl(tasks(1), duration_s=0.03)
    heard = []

    class Slow(FailingEngine):
        def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterator[CapturedSample]:
            deadline = time.monotonic() + (60.0 if waits_for_servers else 0.2)
            while control.num_heartbeats < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            heard.append(control.num_heartbeats)
            return super().capture(tasks, spec)

    asks = settings(waits_for_servers=waits_for_servers, max_tasks=1)
    RolloutWorker(control, Slow(engine, "", None), LocalFeatureStore(), asks).run()
    assert [ref.sample_id for ref in control.committed] == ["s0"]
    assert (heard[0] >= 3) == waits_for_servers


def test_stopped_worker_leases_nothing_more(engine: HFTargetEngine):
    control = RecordingControl(tasks(4))
    worker = RolloutWorker(control, engine, LocalFeatureStore(), settings())
    worker.stop()
    worker.run()
    assert len(control.waiting) == 4


class ToldToStop(BaseException):
    """What a signal handler raises in the main thread."""


def test_a_worker_told_to_stop_gives_back_its_leases_and_frees_what_it_had_put(engine: HFTargetEngine):
    control, store = RecordingControl(tasks(2)), LocalFeatureStore()
    worker = RolloutWorker(control, FailingEngine(engine, "s1", ToldToStop()), store, settings())
    with pytest.raises(ToldToStop):
        worker.run()
    assert control.left == [None]
    assert not control.committed
    assert not control.failed
    assert store.health().num_samples == 0


def test_a_worker_stopped_between_two_captures_commits_the_first_and_gives_back_the_second(engine: HFTargetEngine):
    class StoppedBy(RecordingControl):
        def heartbeat(self, worker_id: str) -> None:
            worker.stop()

    control, store = StoppedBy(tasks(3), duration_s=1e-6), LocalFeatureStore()
    worker = RolloutWorker(control, engine, store, settings(max_tasks=3))
    worker.run()
    assert control.left == [None]
    assert len(control.committed) == store.health().num_samples < 3


def test_a_worker_that_leaves_does_not_wait_for_a_control_plane_that_is_away(engine: HFTargetEngine):
    answer = threading.Event()

    class Away(RecordingControl):
        def leave(self, worker_id: str, reason: str | None) -> None:
            answer.wait()

    worker = RolloutWorker(
        Away(tasks(1)), FailingEngine(engine, "s0", EngineError("gone")), LocalFeatureStore(), settings()
    )
    with pytest.raises(EngineError, match="gone"):  # never, if it waited
        worker.run()
    assert not answer.is_set()
    answer.set()


def prompts(count: int) -> list[PromptTask]:
    return [PromptTask(f"s{i}", i, tuple(range(3, 8 + i)), (), num_to_generate=6) for i in range(count)]


def answering(**changes: object) -> RolloutSettings:
    options = GenerateOptions(max_new_tokens=6, **changes)
    return settings(responses=ResponseOptions(options, seed=11))


def test_a_worker_passes_its_fault_points_in_the_order_of_the_life_of_a_sample(engine: HFTargetEngine):
    passed: list[str] = []
    names = [name for name in FAULT_POINTS if name.startswith("worker.")]
    try:
        for name in names:
            arm(name, lambda name=name: passed.append(name))
        RolloutWorker(RecordingControl(prompts(1)), engine, LocalFeatureStore(), answering()).run()
    finally:
        disarm()
    assert passed == names
    RolloutWorker(RecordingControl(prompts(1)), engine, LocalFeatureStore(), answering()).run()
    assert passed == names


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_prompt_is_answered_recorded_and_captured_with_its_response(engine: HFTargetEngine, temperature):
    control, store = RecordingControl(prompts(3)), LocalFeatureStore()
    options = answering(temperature=temperature)
    RolloutWorker(control, engine, store, options).run()
    assert [ref.sample_id for ref in control.committed] == ["s0", "s1", "s2"]
    for task, ref in zip(prompts(3), control.committed, strict=True):
        (alone,) = engine.generate([task.input_ids], options.responses.of(task))
        full = task.answered(alone.token_ids)
        assert control.recorded[task.sample_id] == alone.token_ids != ()
        assert (ref.num_tokens, ref.loss_spans) == (full.num_tokens, full.loss_spans)
        ((stored, handle),) = store.get([ref])
        (expected,) = engine.capture([full], SPEC)
        assert all(torch.equal(stored[name], materialised(source)) for name, source in expected.tensors.items())
        store.release([handle])
    assert not control.failed


def test_what_was_recorded_first_is_captured(engine: HFTargetEngine):
    control, store = RecordingControl(prompts(1)), LocalFeatureStore()
    control.recorded["s0"] = (9, 9, 9)
    RolloutWorker(control, engine, store, answering()).run()
    assert control.offered["s0"] != (9, 9, 9)
    (ref,) = control.committed
    ((stored, handle),) = store.get([ref])
    assert stored["input_ids"].tolist() == [3, 4, 5, 6, 7, 9, 9, 9]
    assert ref.loss_spans == ((5, 8),)
    store.release([handle])


def test_a_lease_that_ended_before_its_response_was_recorded_is_dropped(engine: HFTargetEngine):
    control, store = RecordingControl(prompts(3)), LocalFeatureStore()
    control.over = {"s1"}
    RolloutWorker(control, engine, store, answering()).run()
    assert [ref.sample_id for ref in control.committed] == ["s0", "s2"]
    assert store.health().num_samples == 2
    assert not control.failed
    assert not control.left


def test_a_prompt_that_cannot_be_answered_fails_alone(engine: HFTargetEngine):
    bad = PromptTask("bad", 9, (3, 1000), (), num_to_generate=4)
    control = RecordingControl([bad, *prompts(1)])
    RolloutWorker(control, engine, LocalFeatureStore(), answering()).run()
    assert [ref.sample_id for ref in control.committed] == ["s0"]
    assert "token id 1000" in control.failed["bad"]


class SlowlyAnswering:
    """The real engine, whose answers wait until the control plane has heard of the worker several times."""

    def __init__(self, engine: HFTargetEngine, control: RecordingControl) -> None:
        self.info, self.capture = engine.info, engine.capture
        self._engine, self._control = engine, control

    def generate(self, prompts, options):
        deadline = time.monotonic() + 60
        while self._control.num_heartbeats < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._engine.generate(prompts, options)


def test_a_worker_that_writes_a_long_response_gives_signs_of_life(engine: HFTargetEngine):
    control = RecordingControl(prompts(1), duration_s=0.03)
    RolloutWorker(control, SlowlyAnswering(engine, control), LocalFeatureStore(), answering()).run()
    assert control.num_heartbeats >= 3
    assert len(control.committed) == 1


class Silent:
    """The real engine, which has nothing to say."""

    def __init__(self, engine: HFTargetEngine) -> None:
        self.info, self.capture = engine.info, engine.capture

    def generate(self, prompts, options):
        return [Generation((), True) for _ in prompts]


def test_a_response_without_a_token_is_a_sample_without_supervised_tokens(engine: HFTargetEngine):
    control = RecordingControl(prompts(2))
    RolloutWorker(control, Silent(engine), LocalFeatureStore(), answering()).run()
    assert [(ref.num_tokens, ref.loss_spans) for ref in control.committed] == [(5, ()), (6, ())]
