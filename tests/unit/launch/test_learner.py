import shutil
from pathlib import Path

import pytest

from specforge.config.run import RunConfig
from specforge.errors import ConfigError, DraftError
from specforge.launch.inputs import RunInputs, read_run_inputs
from specforge.launch.learner import at_rank, make_provenance
from specforge.training.trainer import check_same_run


def config(**sections) -> RunConfig:
    return RunConfig.model_validate({"run_dir": "run", "target": {"path": "t"}, "data": {"path": "d"}} | sections)


def devices(found: RunConfig) -> tuple[str, str]:
    return found.training.device, found.target.device


@pytest.mark.parametrize(
    ("wanted", "num_devices", "expected"),
    [
        (("auto", "auto"), 2, ("cuda:1", "cuda:1")),
        (("cuda", "cpu"), 2, ("cuda:1", "cpu")),
        (("cpu", "cpu"), 1, ("cpu", "cpu")),
        (("auto", "auto"), 0, ("auto", "auto")),
        (("cpu", "cpu"), 2, ("cpu", "cpu")),
    ],
)
def test_every_rank_has_a_device_of_its_own(wanted, num_devices, expected):
    run = config(training={"device": wanted[0]}, target={"path": "t", "device": wanted[1]})
    assert devices(at_rank(run, 1, 2, num_devices)) == expected
    assert devices(at_rank(run, 0, 1, num_devices)) == wanted


@pytest.mark.parametrize(
    ("device", "num_devices", "message"),
    [("cuda:0", 2, "is cuda:0, one device for 2 train ranks"), ("auto", 1, "2 train ranks need a CUDA device each")],
)
def test_ranks_that_would_share_a_device_are_refused(device, num_devices, message):
    with pytest.raises(ConfigError, match=message):
        at_rank(config(training={"device": device}), 0, 2, num_devices)
    shared_target = {"path": "t", "device": device}
    with pytest.raises(ConfigError, match=message):
        at_rank(config(training={"device": "cpu"}, target=shared_target), 0, 2, num_devices)


def test_train_ranks_that_do_not_capture_leave_the_target_where_it_is():
    run = config(topology="disaggregated", target={"path": "t", "device": "cuda:0"})
    assert devices(at_rank(run, 1, 2, 2)) == ("cuda:1", "cuda:0")


def inputs(directory: Path, target: Path, **options) -> RunInputs:
    data = directory / "texts.jsonl"
    data.write_text('{"text": "one two three four five six seven eight"}\n' * 3)
    algorithm = {"name": "eagle3", **options}
    run = {"run_dir": directory / "run", "target": {"path": target}, "data": {"path": data}, "algorithm": algorithm}
    return read_run_inputs(config(**run))


def test_a_checkpoint_of_another_tokenizer_is_refused_by_name(tmp_path, tiny_target_dir):
    other = tmp_path / "other"
    shutil.copytree(tiny_target_dir, other)
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    theirs, ours = (make_provenance(inputs(tmp_path, target)) for target in (other, tiny_target_dir))
    check_same_run(tmp_path, ours, ours)
    with pytest.raises(DraftError, match="was written with tokenizer_sha256 = "):
        check_same_run(tmp_path, theirs, ours)


def test_the_vocabulary_of_a_pruned_draft_is_part_of_what_it_is(tmp_path, tiny_target_dir):
    whole, pruned = (
        make_provenance(inputs(tmp_path, tiny_target_dir, **options)).identity["vocabulary_sha256"]
        for options in ({}, {"draft_vocab_size": 64})
    )
    assert whole == ""
    assert len(pruned) == 64
