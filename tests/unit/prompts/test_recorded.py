import pytest

from specforge.errors import ConfigError, DataError
from specforge.prompts.config import DataConfig
from specforge.prompts.recorded import read_recorded, recorded_lines
from specforge.prompts.tasks import make_task

TASKS = [
    make_task(0, (5, 6, 7), ((1, 3),), {"topic": "é"}),
    make_task(1, tuple(range(3000)), ((0, 2), (5, 9))),
    make_task(2, (1,), ()),
]


def test_recorded_tasks_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(recorded_lines(TASKS))
    assert read_recorded(path) == TASKS
    assert read_recorded(path, limit=2) == TASKS[:2]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(recorded_lines(TASKS) + b'{"input_ids": [1]}\n')
    with pytest.raises(DataError, match=r'prompts\.jsonl line 4: "loss_spans" should be'):
        read_recorded(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"prompts\.jsonl: the file is empty"):
        read_recorded(path)


def test_a_run_has_one_source_of_samples(tmp_path):
    with pytest.raises(ConfigError, match=r"exactly one of data\.path .* and data\.features .*, got neither"):
        DataConfig()
    with pytest.raises(ConfigError, match=r"got both, .*a\.jsonl and .*set"):
        DataConfig(path=tmp_path / "a.jsonl", features=tmp_path / "set")
    assert DataConfig(features=tmp_path / "set", max_length=7, limit=3).verify == "full"


@pytest.mark.parametrize("option", [{"format": "text"}, {"last_turn_only": True}, {"max_invalid": 1}])
def test_options_of_reading_prompts_are_refused_with_features(tmp_path, option):
    (name,) = option
    with pytest.raises(ConfigError, match=rf"data\.{name} says how data\.path is read"):
        DataConfig(features=tmp_path / "set", **option)
