"""Features of evaluation samples: captured once, found again, never trusted blindly."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from children import child_process
from held_out_sets import held_out_samples, tasks_of, write_set

from specforge.contracts.capture import CaptureSpec
from specforge.data_plane.offline import FeatureSet
from specforge.errors import ContractError, DataError
from specforge.evaluation import cache as cache_module
from specforge.evaluation.cache import EvalCache, EvalKey, chat_template_sha256, data_sha256, default_directory
from specforge.testing.algorithm_world import make_world, small_algorithm

DEADLINE_S = 60.0
PRELOAD = ["specforge.testing.algorithm_world", "specforge.evaluation.cache"]


class Capture:
    """Writes real feature sets and counts how often."""

    def __init__(self, lengths=(12, 9, 7, 8)):
        self.world = make_world(small_algorithm("eagle3"))
        self.samples = held_out_samples(self.world, lengths)
        self.calls = 0

    def key(self, **changes):
        key = EvalKey(
            data_sha256=data_sha256(tasks_of(self.samples)),
            num_samples=len(self.samples),
            target_revision=self.world.target.revision,
            target_dtype="float32",
            device_type="cpu",
            tokenizer_sha256="t",
            chat_template_sha256="",
            spec=self.world.spec,
            max_length=64,
        )
        return replace(key, **changes)

    def __call__(self, directory):
        self.calls += 1
        write_set(directory, self.world, self.samples)


@pytest.fixture
def capture():
    return Capture()


def refused(directory):
    raise AssertionError(f"{directory}: captured again")


def content(features: FeatureSet):
    return {name: {k: v.clone() for k, v in features.read(name).items()} for name in features.entries}


def assert_complete(features, capture):
    assert list(features.entries) == [sample.name for sample in capture.samples]
    for sample in capture.samples:
        assert torch.equal(features.read(sample.name)["last"], sample.features["last"])


def wait_until(condition):
    give_up_at = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_features_are_captured_once_and_found_by_later_runs(tmp_path, capture):
    first = EvalCache(tmp_path / "new" / "cache").features(capture.key(), capture)
    assert_complete(first, capture)
    again = EvalCache(tmp_path / "new" / "cache").features(capture.key(), refused)
    assert again.entries == first.entries
    assert_complete(again, capture)
    assert capture.calls == 1


OTHER = {
    "data_sha256": "other",
    "num_samples": 3,
    "target_revision": "1",
    "target_dtype": "bfloat16",
    "device_type": "cuda",
    "tokenizer_sha256": "other",
    "chat_template_sha256": "other",
    "spec": CaptureSpec((1, 2), True),
    "max_length": 32,
    "format_version": 2,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EvalKey)])
def test_a_change_of_any_field_misses_and_the_log_says_which(tmp_path, capture, field, caplog):
    cache = EvalCache(tmp_path)
    cache.features(capture.key(), capture)
    other = capture.key(**{field: OTHER[field]})
    assert other.name != capture.key().name
    produced = []

    def stop(directory):
        produced.append(directory)
        raise KeyboardInterrupt

    with caplog.at_level("INFO"), pytest.raises(KeyboardInterrupt):
        cache.features(other, stop)
    assert produced
    assert f"{capture.key().name}, differ in {field}" in caplog.text
    cache.features(capture.key(), refused)


@pytest.mark.parametrize("spec", [CaptureSpec((1, 3, 5), True), CaptureSpec((1, 3, 4), False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_every_field_of_the_capture_spec_is_part_of_the_key(capture, spec, dtype):
    other = capture.key(spec=replace(spec, dtype=dtype))
    assert other.spec != capture.key().spec
    assert other.name != capture.key().name


def test_an_entry_says_in_clear_what_it_depends_on(tmp_path, capture):
    EvalCache(tmp_path).features(capture.key(), capture)
    said = json.loads((tmp_path / capture.key().name / "key.json").read_text())
    assert said == json.loads(json.dumps(dataclasses.asdict(capture.key())))


def test_the_data_of_the_key_is_tokens_and_loss_spans_in_order(capture):
    tasks = tasks_of(capture.samples)
    changed_ids = [replace(tasks[0], input_ids=(*tasks[0].input_ids[:-1], 39 - tasks[0].input_ids[-1])), *tasks[1:]]
    changed_spans = [replace(tasks[0], loss_spans=((3, 12),)), *tasks[1:]]
    hashes = [data_sha256(it) for it in (tasks, changed_ids, changed_spans, tasks[::-1], tasks[:-1])]
    assert len(set(hashes)) == len(hashes)
    assert data_sha256(tasks) == data_sha256(tasks_of(capture.samples))


def test_the_chat_template_is_that_of_the_run_or_that_beside_the_target(tmp_path, capture):
    target = replace(capture.world.target, path=str(tmp_path))
    assert chat_template_sha256(target, None) == ""
    (tmp_path / "chat_template.jinja").write_text("one")
    (tmp_path / "mine.jinja").write_text("two")
    beside, mine = chat_template_sha256(target, None), chat_template_sha256(target, tmp_path / "mine.jinja")
    assert len({"", beside, mine}) == 3
    (tmp_path / "chat_template.jinja").write_text("three")
    assert chat_template_sha256(target, None) != beside
    with pytest.raises(DataError, match=r"gone\.jinja: the chat template cannot be read \(No such file"):
        chat_template_sha256(target, tmp_path / "gone.jinja")


def flipped(path: Path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of a feature": ("sample-1.safetensors", flipped),
    "a short file": ("sample-2.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-8])),
    "a missing file": ("sample-0.safetensors", Path.unlink),
    "a changed key": ("key.json", lambda path: path.write_text(path.read_text().replace("64", "65"))),
    "no key": ("key.json", Path.unlink),
    "changed prompts": ("prompts.jsonl", flipped),
    "a torn manifest": ("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:40])),
    "no manifest": ("manifest.json", Path.unlink),
    "a cut index": ("index.jsonl", lambda path: path.write_bytes(path.read_bytes()[:200])),
    "an entry of another target": (
        "manifest.json",
        lambda path: path.write_text(path.read_text().replace('"target_revision":"0"', '"target_revision":"1"')),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_captured_again_with_a_warning_that_names_the_file(tmp_path, capture, damage, caplog):
    cache, (name, harm) = EvalCache(tmp_path), DAMAGE[damage]
    expected = content(cache.features(capture.key(), capture))
    (path,) = (tmp_path / capture.key().name).rglob(name)
    before = path.read_bytes()
    harm(path)
    found = cache.features(capture.key(), capture)
    assert capture.calls == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings
    assert all("damaged and captured again" in text for text in warnings)
    assert name in warnings[0] or "/set: expected the target revision 0, got 1" in warnings[0]
    assert path.read_bytes() == before
    for sample, tensors in content(found).items():
        assert all(torch.equal(tensors[feature], it) for feature, it in expected[sample].items())
    cache.features(capture.key(), refused)
    assert sorted(it.name for it in tmp_path.iterdir()) == [capture.key().name, f"{capture.key().name}.lock"]


def test_a_capture_that_fails_leaves_nothing_and_the_next_one_starts_anew(tmp_path, capture):
    def failing(directory):
        write_set(directory, capture.world, capture.samples)
        raise RuntimeError("odd prompt")

    with pytest.raises(RuntimeError, match="odd prompt"):
        EvalCache(tmp_path).features(capture.key(), failing)
    assert [it.name for it in tmp_path.iterdir()] == [f"{capture.key().name}.lock"]
    assert_complete(EvalCache(tmp_path).features(capture.key(), capture), capture)


@pytest.mark.parametrize("changes", [{"target_revision": "other"}, {"target_dtype": "bfloat16"}, {"num_samples": 5}])
def test_features_of_something_else_are_never_published(tmp_path, capture, changes):
    key = capture.key(**changes)
    with pytest.raises(ContractError, match=r"not what was asked for: .*expected the"):
        EvalCache(tmp_path).features(key, capture)
    assert not (tmp_path / key.name).exists()


def test_an_incomplete_capture_is_never_published(tmp_path, capture):
    def incomplete(directory):
        capture(directory)
        manifest = directory / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"complete":true', '"complete":false'))

    with pytest.raises(ContractError, match="did not finish"):
        EvalCache(tmp_path).features(capture.key(), incomplete)
    assert not (tmp_path / capture.key().name).exists()


def test_a_full_disk_says_what_to_do(tmp_path, capture):
    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"No space left on device, in the middle of the features of 4 .*make room"):
        EvalCache(tmp_path).features(capture.key(), full)


def test_a_cache_that_is_no_directory_says_what_to_do(tmp_path, capture):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose a directory that can be written"):
        EvalCache(tmp_path / "file" / "cache").features(capture.key(), refused)


def test_the_default_directory_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "specforge" / "eval"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / ".cache" / "specforge" / "eval"


# Several processes


def slow_user(pipe, directory):
    """Asks for the features; says when it captures, and captures once it is told to."""
    capture = Capture()

    def produce(into):
        (into.parent / "half").write_text("torn")
        pipe.send("capturing")
        pipe.recv()
        (into.parent / "half").unlink()
        capture(into)

    found = EvalCache(directory).features(capture.key(), produce)
    pipe.send(("found", capture.calls, {name: float(it["last"].sum()) for name, it in content(found).items()}))


def test_of_many_processes_one_captures_and_the_others_wait_for_it(tmp_path, capture):
    with (
        child_process(slow_user, tmp_path, preload=PRELOAD) as (_, first),
        child_process(slow_user, tmp_path, preload=PRELOAD) as (_, second),
        child_process(slow_user, tmp_path, preload=PRELOAD) as (_, third),
    ):
        pipes = [first, second, third]
        wait_until(lambda: any(pipe.poll() for pipe in pipes))
        (producer,) = [pipe for pipe in pipes if pipe.poll()]
        assert producer.recv() == "capturing"
        # the others are kept out as long as the capture lasts, and nothing of it is to be seen
        assert not any(pipe.poll(0.3) for pipe in pipes if pipe is not producer)
        assert not (tmp_path / capture.key().name).exists()
        producer.send("go on")
        answers = []
        for pipe in pipes:
            assert pipe.poll(DEADLINE_S)
            answers.append(pipe.recv())
    assert sorted(calls for _, calls, _ in answers) == [0, 0, 1]
    assert all(sums == answers[0][2] for _, _, sums in answers)


def test_the_next_process_takes_over_from_one_that_was_killed(tmp_path, capture):
    with child_process(slow_user, tmp_path, preload=PRELOAD) as (process, first):
        assert first.poll(DEADLINE_S)
        assert first.recv() == "capturing"
        with child_process(slow_user, tmp_path, preload=PRELOAD) as (_, second):
            assert not second.poll(0.5)
            os.kill(process.pid, signal.SIGKILL)
            assert second.poll(DEADLINE_S)
            assert second.recv() == "capturing"
            second.send("go on")
            assert second.poll(DEADLINE_S)
            assert second.recv()[:2] == ("found", 1)
    assert sorted(it.name for it in tmp_path.iterdir()) == [capture.key().name, f"{capture.key().name}.lock"]
    assert_complete(EvalCache(tmp_path).features(capture.key(), refused), capture)


def test_what_a_killed_process_left_is_never_read_and_removed_by_the_next_capture(tmp_path, capture):
    with child_process(slow_user, tmp_path, preload=PRELOAD) as (process, pipe):
        assert pipe.poll(DEADLINE_S)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    partial = tmp_path / f"{capture.key().name}.partial"
    assert (partial / "half").exists()
    assert not (tmp_path / capture.key().name).exists()
    other = Capture((9, 11))
    EvalCache(tmp_path).features(other.key(), other)
    assert not partial.exists()
    assert_complete(EvalCache(tmp_path).features(capture.key(), capture), capture)


def test_a_capture_that_runs_is_not_taken_for_a_leftover(tmp_path, capture):
    with child_process(slow_user, tmp_path, preload=PRELOAD) as (_, pipe):
        assert pipe.poll(DEADLINE_S)
        assert pipe.recv() == "capturing"
        other = Capture((9, 11))
        EvalCache(tmp_path).features(other.key(), other)
        pipe.send("go on")
        assert pipe.poll(DEADLINE_S)
        assert pipe.recv()[:2] == ("found", 1)
    EvalCache(tmp_path).features(capture.key(), refused)


def test_a_cache_that_is_cleared_while_a_process_waits_gives_it_a_lock_of_its_own(tmp_path, capture, monkeypatch):
    """The lock that it waited for is no file any more: others would take another one of the same name."""
    cache = EvalCache(tmp_path)
    cache.features(capture.key(), capture)
    lock = tmp_path / f"{capture.key().name}.lock"
    flock, numbers = cache_module._flock, count()

    def cleared(descriptor, kind):
        taken = flock(descriptor, kind)
        if next(numbers) == 0:
            lock.unlink()
        return taken

    monkeypatch.setattr(cache_module, "_flock", cleared)
    cache.features(capture.key(), refused)
    assert next(numbers) == 2
    assert lock.exists()


def test_threads_of_one_process_share_a_capture_too(tmp_path):
    captures = [Capture() for _ in range(4)]
    found = []

    def use(capture):
        found.append(EvalCache(tmp_path).features(capture.key(), capture))

    threads = [threading.Thread(target=use, args=(capture,)) for capture in captures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sum(capture.calls for capture in captures) == 1
    assert len(found) == 4


def test_a_process_that_found_nothing_looks_again_once_it_may_capture(tmp_path, capture, monkeypatch):
    late, locked = EvalCache(tmp_path), EvalCache._locked

    def others_first(self, name, kind):
        if self is late and kind == fcntl.LOCK_EX:
            EvalCache(tmp_path).features(capture.key(), capture)
        return locked(self, name, kind)

    monkeypatch.setattr(EvalCache, "_locked", others_first)
    assert_complete(late.features(capture.key(), refused), capture)
    assert capture.calls == 1
