from dataclasses import replace

import pytest

from specforge.algorithms.catalog import get_algorithm
from specforge.algorithms.eagle3.config import Eagle3Options
from specforge.algorithms.parts.tables import load_target_tables
from specforge.errors import DraftError
from specforge.export.sglang import export_sglang
from specforge.inference.target import read_target_info
from specforge.launch.drafts import load_draft


def test_exported_draft_is_loaded_for_its_own_target_only(tmp_path, tiny_target_dir):
    target = read_target_info(tiny_target_dir)
    tables = load_target_tables(target.path)
    algorithm = get_algorithm(Eagle3Options())
    config = algorithm.draft_config(target)
    export_sglang(algorithm.build_draft(config, tables, seed=0).served_state(), config, target, tmp_path / "draft")
    assert load_draft(tmp_path / "draft", target, tables).revision == target.revision
    with pytest.raises(DraftError, match=r"was trained on target revision .* give the target directory"):
        load_draft(tmp_path / "draft", replace(target, revision="f" * 64), tables)
