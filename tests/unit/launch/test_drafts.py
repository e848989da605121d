from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge.algorithms.base import TargetTables
from specforge.algorithms.catalog import ALGORITHMS, options_of
from specforge.algorithms.parts.tables import load_target_tables
from specforge.contracts.capture import TargetInfo
from specforge.contracts.codec import to_json
from specforge.errors import DraftError
from specforge.export.draft import FORMATS, TrainedDraft, write_export
from specforge.inference.target import read_target_info
from specforge.launch.drafts import load_draft
from specforge.launch.export import export_draft, served_format
from specforge.training.checkpoint import Provenance, TrainPosition
from specforge.training.checkpointer import Checkpointer, Snapshot

SMALL = {"block_size": 4, "num_layers": 2}
OPTIONS = {"peagle": {"num_layers": 1}, "dflash": SMALL, "domino": SMALL, "dspark": SMALL}


def fresh(name: str, target: TargetInfo, tables: TargetTables) -> TrainedDraft:
    options = options_of({"name": name, **OPTIONS.get(name, {})}).model_dump(mode="json")
    empty = TrainedDraft(options, None, {}, "float32", target.revision)
    config = empty.algorithm().draft_config(target)
    return replace(empty, config=config, state=empty.algorithm().build_draft(config, tables, seed=0).served_state())


def save(run_dir: Path, snapshot: Snapshot) -> None:
    checkpointer = Checkpointer(run_dir / "checkpoints")
    checkpointer.save(snapshot)
    checkpointer.wait()


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_same_draft_comes_from_a_run_its_checkpoint_and_its_exports(tmp_path, tiny_target_dir, name):
    target = read_target_info(tiny_target_dir)
    tables = load_target_tables(target.path)
    record = fresh(name, target, tables)
    identity = {"algorithm": record.options, "target_revision": target.revision, "capture_dtype": "float32"}
    provenance = Provenance(identity, record.config.to_dict(), to_json(target))
    save(tmp_path / "run", Snapshot(TrainPosition(1, 1), provenance, record.state, {}, best=True))
    checkpoints = tmp_path / "run" / "checkpoints"
    places = [tmp_path / "run", checkpoints / "step-00000001", checkpoints / "latest", checkpoints / "best"]
    for to in dict.fromkeys((served_format(name), "hf")):
        written = export_draft(tmp_path / "run", to, tmp_path / to, "float32")
        assert (written["algorithm"], written["reload_difference_to_rounded"]) == (name, 0.0)
        places.append(tmp_path / to)
    for place in places:
        loaded = load_draft(place, target, tables)
        assert (loaded.algorithm.name, loaded.config, loaded.revision) == (name, record.config, target.revision)
        assert loaded.spec == loaded.algorithm.capture_spec(record.config, "float32")
        state = loaded.draft.served_state()
        assert all(torch.equal(state[key], tensor) for key, tensor in record.state.items())


def test_draft_of_another_target_is_refused(tmp_path, tiny_target_dir):
    target = read_target_info(tiny_target_dir)
    tables = load_target_tables(target.path)
    write_export(fresh("eagle3", target, tables), target, FORMATS["sglang"], tmp_path / "draft")
    with pytest.raises(DraftError, match=r"was trained on target revision .* give the target directory"):
        load_draft(tmp_path / "draft", replace(target, revision="f" * 64), tables)


def test_unknown_format_names_those_that_there_are(tmp_path):
    with pytest.raises(DraftError, match="cannot export to 'gguf'; the formats are: sglang, vllm, hf"):
        export_draft(tmp_path, "gguf", tmp_path / "out")
