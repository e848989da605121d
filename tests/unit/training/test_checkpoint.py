import json

import pytest
import torch

from specforge.errors import DraftError
from specforge.training.checkpoint import (
    Checkpointer,
    Provenance,
    TrainPosition,
    list_checkpoints,
    load_checkpoint,
    read_state,
    weights_sha256,
)

PROVENANCE = Provenance({"seed": 1}, {"h": 2}, {"path": "target"})
LEDGER = {"quarantines": [{"index": 3, "from_slot": 7, "to_slot": None, "reason": "too long"}]}


def write(directory, step: int, keep_last: int = 2, ledger=LEDGER):
    tensors = ({"w": torch.full((3,), float(step))}, {"master.w": torch.zeros(3), "step.w": torch.tensor(float(step))})
    return Checkpointer(directory, keep_last).save(TrainPosition(step, step * 4, 0), tensors, PROVENANCE, ledger)


def test_what_was_saved_is_loaded(tmp_path):
    checkpoint = load_checkpoint(write(tmp_path, 7))
    assert checkpoint.position == TrainPosition(7, 28, 0)
    assert checkpoint.provenance == PROVENANCE
    assert checkpoint.ledger == read_state(checkpoint.path).ledger == LEDGER
    assert torch.equal(checkpoint.draft["w"], torch.full((3,), 7.0))
    assert checkpoint.optimizer["step.w"].shape == ()


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("file", ["draft.safetensors", "optimizer.safetensors", "state.json"])
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
        checkpoint = Checkpointer(tmp_path).latest()
    assert checkpoint is not None
    assert checkpoint.position.step == 1


def test_a_damaged_checkpoint_is_written_again(tmp_path):
    path = write(tmp_path, 2)
    (path / "draft.safetensors").write_bytes(b"torn")
    assert load_checkpoint(write(tmp_path, 2)).position.step == 2


@pytest.mark.parametrize("ledger", [None, [], "quarantines"])
def test_a_checkpoint_whose_ledger_state_is_missing_or_no_object_is_damaged(tmp_path, ledger):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / "state.json"
    state = json.loads(file.read_text())
    state["ledger"] = ledger
    file.write_text(json.dumps(state if ledger is not None else {key: state[key] for key in state if key != "ledger"}))
    with pytest.warns(UserWarning, match=r"step-00000002.*ledger"):
        assert Checkpointer(tmp_path).latest().position.step == 1


def test_a_step_that_is_reached_again_keeps_the_files_unless_the_ledger_says_more(tmp_path):
    inode = write(tmp_path, 2).stat().st_ino
    assert write(tmp_path, 2).stat().st_ino == inode
    more = {"quarantines": []}
    assert load_checkpoint(write(tmp_path, 2, ledger=more)).ledger == more


def test_a_damaged_checkpoint_never_displaces_the_one_just_written(tmp_path):
    damaged = write(tmp_path, 10)
    (damaged / "draft.safetensors").write_bytes(b"")
    written = write(tmp_path, 9, keep_last=1)
    assert load_checkpoint(written).position.step == 9


def test_the_newest_readable_state_is_found_without_its_tensors(tmp_path):
    assert Checkpointer(tmp_path).newest_state() is None
    whole, damaged = write(tmp_path, 1), write(tmp_path, 2)
    (whole / "draft.safetensors").unlink()
    (damaged / "state.json").write_text('{"format": 2, "position": {"paces": 3}}')
    state = Checkpointer(tmp_path).newest_state()
    assert state is not None
    assert (state.path, state.position.step) == (whole, 1)


def test_leftovers_of_a_killed_save_are_never_chosen_and_are_removed(tmp_path):
    write(tmp_path, 1)
    leftover = tmp_path / ".step-00000002.4242.partial"
    leftover.mkdir()
    (leftover / "state.json").write_text(json.dumps({"format": 2}))
    latest = Checkpointer(tmp_path).latest()
    assert latest is not None
    assert latest.position.step == 1
    write(tmp_path, 3)
    assert not leftover.exists()


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert Checkpointer(tmp_path / "absent").latest() is None


def test_another_format_is_refused_by_name(tmp_path):
    state = write(tmp_path, 1) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 99}))
    with pytest.raises(DraftError, match="format 2"):
        load_checkpoint(state.parent)


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
