import json

import pytest

from specforge.config.load import run_config_from
from specforge.errors import DataError
from specforge.launch.inputs import read_run_inputs


def test_recorded_tokens_of_another_target_are_refused(tmp_path, tiny_target_dir):
    data = tmp_path / "tokens.jsonl"
    rows = [{"input_ids": [1, 2, token, 3], "loss_spans": [[2, 4]]} for token in (5, 100_000)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "run_dir": str(tmp_path / "run"),
        "target": {"path": str(tiny_target_dir), "device": "cpu"},
        "data": {"path": str(data)},
    }
    with pytest.raises(DataError, match=r"sample 1 has token id 100000, but the vocabulary of .* has 384 tokens"):
        read_run_inputs(run_config_from(content, tmp_path))
