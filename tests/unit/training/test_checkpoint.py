import errno
import json
import shutil

import pytest
import torch

from specforge.errors import DraftError
from specforge.training.checkpoint import (
    DRAFT_WEIGHTS,
    Provenance,
    TrainPosition,
    best_state,
    checkpoint_path,
    list_checkpoints,
    newest_state,
    newest_whole,
    read_draft_tensors,
    read_state,
    verified,
    weights_sha256,
)
from specforge.training.checkpointer import Checkpointer, Snapshot

PROVENANCE = Provenance({"seed": 1}, {"h": 2}, {"path": "target"})
LEDGER = {"quarantines": [{"index": 3, "from_slot": 7, "to_slot": None, "reason": "too long"}]}
SHARD = "shards/shard-00001-model-00001-of-00001.safetensors"


def training_state(step: float):
    return {"master.w": torch.full((3, 2), step), "step.w": torch.tensor(step)}


def write(directory, step: int, *, best: bool = False, **rotation):
    """The checkpoint of ``step``, complete."""
    checkpointer = Checkpointer(directory, **rotation)
    draft = {"w": torch.full((3,), float(step))}
    position = TrainPosition(step, step * 4, 0)
    checkpointer.save(Snapshot(position, PROVENANCE, draft, training_state(float(step)), LEDGER, {"a": 1.5}, best))
    checkpointer.wait()
    return checkpoint_path(directory, step)


def names(directory):
    return [path.name for path in list_checkpoints(directory)]


def test_what_was_saved_is_loaded(tmp_path):
    state = verified(read_state(write(tmp_path, 7)))
    assert state.position == TrainPosition(7, 28, 0)
    assert (state.provenance, state.ledger, state.evaluation) == (PROVENANCE, LEDGER, {"a": 1.5})
    assert torch.equal(read_draft_tensors(state)["w"], torch.full((3,), 7.0))
    found = training_state(0.0)
    Checkpointer(tmp_path).load(state, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in training_state(7.0).items())


def test_the_draft_beside_the_shards_is_a_plain_safetensors_directory(tmp_path):
    path = write(tmp_path, 1)
    assert sorted(file.name for file in (path / "draft").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((path / "draft/config.json").read_text()) == PROVENANCE.draft_config


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda state: {"master.w": state["master.w"]}, "the checkpoint has the training state 'step.w', this run"),
        (lambda state: {**state, "exp_avg.z": torch.zeros(1)}, "this run has the training state 'exp_avg.z'"),
        (lambda state: {**state, "master.w": torch.zeros(2, 3)}, r"has shape \[3, 2\], this run's has \[2, 3\]"),
    ],
)
def test_a_training_state_of_another_draft_is_refused(tmp_path, tensors, message):
    state = read_state(write(tmp_path, 1))
    with pytest.raises(DraftError, match=message):
        Checkpointer(tmp_path).load(state, tensors(training_state(0.0)))


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert (tmp_path / "latest").resolve().name == "step-00000004"


def test_the_best_and_every_nth_are_kept_besides(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step, best=step in {2, 3}, keep_last=1, keep_every=5)
    assert names(tmp_path) == ["step-00000003", "step-00000005", "step-00000007"]
    assert best_state(tmp_path).position.step == 3


@pytest.mark.parametrize("file", [DRAFT_WEIGHTS, "draft/config.json", SHARD, "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, file, damage):
    write(tmp_path, 1)
    victim = write(tmp_path, 2) / file
    content = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"\x00" + content[1:])
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        state = Checkpointer(tmp_path).latest()
    assert state is not None
    assert state.position.step == 1


def test_a_damaged_checkpoint_is_written_again(tmp_path):
    path = write(tmp_path, 2)
    (path / DRAFT_WEIGHTS).write_bytes(b"torn")
    assert verified(read_state(write(tmp_path, 2))).position.step == 2


@pytest.mark.parametrize("key", ["ledger", "evaluation", "files"])
@pytest.mark.parametrize("value", [None, [], "quarantines"])
def test_a_checkpoint_whose_state_is_missing_something_or_no_object_is_damaged(tmp_path, key, value):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / "state.json"
    state = json.loads(file.read_text())
    state[key] = value
    file.write_text(json.dumps(state if value is not None else {name: state[name] for name in state if name != key}))
    with pytest.warns(UserWarning, match=rf"step-00000002.*{key}"):
        assert newest_whole(tmp_path).position.step == 1


def test_a_damaged_checkpoint_never_displaces_the_one_just_written(tmp_path):
    damaged = write(tmp_path, 10)
    (damaged / DRAFT_WEIGHTS).write_bytes(b"")
    written = write(tmp_path, 9, keep_last=1)
    assert verified(read_state(written)).position.step == 9


def test_the_newest_readable_state_is_found_without_its_tensors(tmp_path):
    assert newest_state(tmp_path) is None
    whole, damaged = write(tmp_path, 1), write(tmp_path, 2)
    (whole / DRAFT_WEIGHTS).unlink()
    (damaged / "state.json").write_text('{"format": 3, "position": {"paces": 3}}')
    state = newest_state(tmp_path)
    assert state is not None
    assert (state.path, state.position.step) == (whole, 1)


def test_leftovers_of_a_killed_save_are_never_chosen_and_are_removed(tmp_path):
    write(tmp_path, 1)
    leftover = tmp_path / ".step-00000002.partial"
    leftover.mkdir()
    (leftover / "state.json").write_text(json.dumps({"format": 3}))
    assert newest_whole(tmp_path).position.step == 1
    write(tmp_path, 3)
    assert not leftover.exists()


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert Checkpointer(tmp_path / "absent").latest() is None
    assert best_state(tmp_path) is None


def test_another_format_is_refused_and_never_replaced(tmp_path):
    write(tmp_path, 1)
    state = write(tmp_path, 2) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 99}))
    with pytest.raises(DraftError, match="has checkpoint format 99, this build reads 3; resume with the version"):
        newest_whole(tmp_path)


def test_checkpoints_of_which_none_is_whole_are_not_begun_anew(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / DRAFT_WEIGHTS).unlink()
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(DraftError, match="none of the 2 checkpoints"):
        newest_whole(tmp_path)


def test_a_damaged_best_is_no_reason_not_to_resume(tmp_path):
    (write(tmp_path, 1, best=True) / "state.json").write_text("torn")
    write(tmp_path, 2)
    assert newest_whole(tmp_path).position.step == 2
    with pytest.warns(UserWarning, match="the best checkpoint is damaged"):
        assert best_state(tmp_path) is None


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(tmp_path, monkeypatch, caplog):
    write(tmp_path, 1, keep_last=1)
    rmtree = shutil.rmtree

    def busy(path, **options):
        if path.name == "step-00000001":
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmtree(path, **options)

    monkeypatch.setattr("specforge.training.checkpointer.shutil.rmtree", busy)
    write(tmp_path, 2, keep_last=1)
    assert newest_whole(tmp_path).position.step == 2
    assert "step-00000001 is not removed" in caplog.text


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    files = [path for path in write(tmp_path, 1).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_the_weights_hash_sees_names_dtypes_shapes_and_bytes():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    assert weights_sha256(base) == weights_sha256(dict(reversed(base.items())))
    others = [
        {"x": base["a"], "b": base["b"]},
        {"a": base["a"].bfloat16(), "b": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"] + 1e-7, "b": base["b"]},
    ]
    assert len({weights_sha256(state) for state in [base, *others]}) == 5
