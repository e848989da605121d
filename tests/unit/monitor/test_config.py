"""The ``monitor`` section: a list of trackers, checked like every other section of a run file."""

import pytest

from specforge.config.load import dump_run_config, load_run_config
from specforge.errors import ConfigError
from specforge.monitor.config import TensorBoardTracker, WandbTracker

MINIMAL = "run_dir: runs/a\ntarget: {path: target}\ndata: {path: data.jsonl}\n"


@pytest.fixture
def load(tmp_path):
    def loaded(text="", *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(MINIMAL + text)
        return load_run_config(path, list(overrides))

    return loaded


@pytest.fixture
def problem(load):
    """The sentence that a run file is refused with."""

    def sentence(text="", *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return sentence


def test_a_run_has_no_tracker_unless_it_asks_for_one(load):
    assert load().monitor.trackers == ()


def test_trackers_are_read_in_order_with_their_defaults(load):
    config = load("monitor: {trackers: [{kind: tensorboard}, {kind: wandb, mode: offline, tags: [a]}]}\n")
    assert config.monitor.trackers == (
        TensorBoardTracker(kind="tensorboard"),
        WandbTracker(kind="wandb", mode="offline", project="specforge", tags=("a",)),
    )


def test_trackers_can_be_given_on_the_command_line(load):
    assert load("", "monitor.trackers=[{kind: tensorboard}]").monitor.trackers[0].kind == "tensorboard"


def test_what_is_written_is_read_again(load, tmp_path):
    config = load("monitor: {trackers: [{kind: wandb, project: drafts, tags: [a, b]}]}\n")
    dump_run_config(config, tmp_path / "resolved.yaml")
    assert load_run_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("[{kind: tensorbord}]", "monitor.trackers[0].kind should be one of tensorboard, wandb, got 'tensorbord'"),
        ("[{mode: offline}]", "monitor.trackers[0].kind should be one of tensorboard, wandb, got nothing"),
        ("[{kind: tensorboard}, {kind: wandb, projct: x}]", "did you mean monitor.trackers[].project?"),
        ("[{kind: tensorboard, project: x}]", "monitor.trackers[0].project belongs to monitor.trackers[0].kind: wandb"),
        ("[{kind: wandb, mode: onlin}]", "monitor.trackers[0].mode should be 'online' or 'offline', got 'onlin'"),
        ("[{kind: wandb, tags: ['']}]", "monitor.trackers[0].tags[0] should have at least 1 character, got ''"),
        ("[wandb]", "monitor.trackers[0] should be a section of keys, got 'wandb'; write for example"),
        ("[null]", "monitor.trackers[0] should be a section of keys, got nothing"),
        ("wandb", "monitor.trackers should be a valid tuple, got 'wandb'"),
        ("[{kind: wandb}, {kind: wandb}]", "trackers lists wandb 2 times; list it once"),
        ("[{kind: wandb, api_key: x}]", "monitor.trackers[0].api_key is unknown"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_key(problem, section, sentence):
    assert sentence in problem(f"monitor: {{trackers: {section}}}\n")
