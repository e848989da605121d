import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.base import CommitReply, Lease, LeaseReply
from specforge.data_plane.base import PutRequest
from specforge.data_plane.local import LocalFeatureStore
from specforge.data_plane.offline import FeatureSet, Manifest, sample_path
from specforge.data_plane.offline_writer import FeatureSetWriter
from specforge.data_plane.tensors import materialised
from specforge.errors import CorruptFeature, DataError, EngineError
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.offline import OfflineManifestReader
from specforge.inference.rollout import RolloutSettings, RolloutWorker

TASKS = [PromptTask(f"s{i}", i, tuple(range(3, 8 + i)), ((2, 5 + i),)) for i in range(4)]
FAILED = "s2"


@pytest.fixture(params=["float32", "bfloat16", "float8_e4m3fn"])
def spec(request: pytest.FixtureRequest) -> CaptureSpec:
    return CaptureSpec((0, 2), True, request.param)


@pytest.fixture
def directory(tmp_path: Path, engine: HFTargetEngine, spec: CaptureSpec) -> Path:
    """A feature set of ``TASKS`` in which one sample failed."""
    manifest = Manifest("rev", "t", "float32", spec, spec.fingerprint, engine.info.hidden_size, "", 0)
    writer = FeatureSetWriter(tmp_path / "set", manifest, b"", [task.sample_id for task in TASKS])
    for task, sample in zip(TASKS, engine.capture(TASKS, spec), strict=True):
        if task.sample_id != FAILED:
            writer.add(task.sample_id, task.num_tokens, task.loss_spans, sample.tensors)
    writer.fail(FAILED, "odd prompt")
    writer.finish()
    writer.close()
    return tmp_path / "set"


@pytest.fixture
def reader(engine: HFTargetEngine, directory: Path) -> OfflineManifestReader:
    return OfflineManifestReader(engine.info, FeatureSet(directory))


def test_it_gives_what_the_target_gave(engine, reader, spec):
    wanted = [TASKS[3], TASKS[0]]
    for read, captured in zip(reader.capture(wanted, spec), engine.capture(wanted, spec), strict=True):
        assert read.sample_id == captured.sample_id
        assert list(read.tensors) == list(captured.tensors)
        for name, source in captured.tensors.items():
            expected = materialised(source)
            assert torch.equal(read.tensors[name].view(torch.uint8), expected.view(torch.uint8)), name
            assert read.tensors[name].dtype == expected.dtype


def test_a_local_store_keeps_the_mapping_and_copies_nothing(reader, spec):
    store = LocalFeatureStore()
    (sample,) = reader.capture(TASKS[:1], spec)
    (stored,) = store.put([PutRequest(sample.sample_id, 1, sample.tensors)])
    ref = SampleRef("s0", 1, 5, (), "local", stored.key, stored.num_bytes, stored.features, "rev", "", "w")
    ((tensors, handle),) = store.get([ref])
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == {
        name: tensor.data_ptr() for name, tensor in sample.tensors.items()
    }
    first, *others = sorted(tensor.data_ptr() for tensor in tensors.values())
    assert all(0 < other - first < stored.num_bytes for other in others)
    store.release([handle])


def test_a_sample_that_failed_is_raised_with_its_reason(reader, spec):
    with pytest.raises(DataError, match="odd prompt"):
        list(reader.capture([TASKS[2]], spec))


def test_another_spec_is_an_error_of_the_engine(reader, spec):
    other = CaptureSpec((0, 1), True, spec.dtype)
    with pytest.raises(EngineError, match="was captured as"):
        list(reader.capture(TASKS[:1], other))


def test_a_task_of_another_length_is_refused(reader, spec):
    with pytest.raises(DataError, match="has 2 tokens, its features have 5"):
        list(reader.capture([PromptTask("s0", 0, (3, 4), ())], spec))


def test_a_damaged_file_is_the_failure_of_its_sample_and_a_lost_mount_that_of_the_engine(reader, directory, spec):
    path = directory / sample_path("s0")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFeature, match=path.name):
        list(reader.capture(TASKS[:1], spec))
    shutil.rmtree(directory)
    with pytest.raises(EngineError, match=r"s1\.safetensors cannot be read .*still mounted"):
        list(reader.capture(TASKS[1:2], spec))


def test_it_cannot_generate(reader):
    with pytest.raises(EngineError, match=r"data\.features has no target"):
        reader.generate([[1]], Generate(2))


class Control:
    """Leases ``TASKS`` once."""

    def __init__(self) -> None:
        self.waiting = list(TASKS)
        self.committed: list[str] = []
        self.failed: dict[str, str] = {}

    def lease(self, worker_id: str, max_tasks: int, timeout_s: float) -> LeaseReply:
        taken, self.waiting = self.waiting[:max_tasks], self.waiting[max_tasks:]
        return LeaseReply(tuple(Lease(task, 1, 60.0) for task in taken), not taken)

    def commit(self, refs: Sequence[SampleRef]) -> CommitReply:
        self.committed += [ref.sample_id for ref in refs]
        return CommitReply((True,) * len(refs))

    def fail(self, worker_id: str, sample_id: str, generation: int, reason: str) -> None:
        self.failed[sample_id] = reason

    def heartbeat(self, worker_id: str) -> None: ...

    def leave(self, worker_id: str, reason: str | None) -> None: ...


def test_a_rollout_worker_drives_it_like_any_engine(reader, spec):
    control = Control()
    settings = RolloutSettings("w0", spec, max_tasks=2, poll_s=0.1, target_revision="rev")
    RolloutWorker(control, reader, LocalFeatureStore(), settings).run()
    assert control.committed == ["s0", "s1", "s3"]
    assert list(control.failed) == [FAILED]
    assert "odd prompt" in control.failed[FAILED]
