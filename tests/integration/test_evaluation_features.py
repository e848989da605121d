"""Evaluation features of a real target: captured by the first run, read by the second."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from specforge.algorithms.parts.tables import load_target_tables
from specforge.config.load import run_config_from
from specforge.evaluation.cache import EvalCache, EvalKey, chat_template_sha256, data_sha256
from specforge.evaluation.evaluator import Evaluator, EvaluatorSettings
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.target import read_target_info
from specforge.launch.feature_sets import capture_tasks
from specforge.launch.inputs import read_run_inputs
from specforge.launch.vocabulary import tokenizer_sha256


@pytest.fixture
def inputs(tmp_path, tiny_target_dir):
    """What a run of six samples reads first."""
    data = tmp_path / "held-out.jsonl"
    rows = [{"input_ids": list(range(3, 12 + number)), "loss_spans": [[4, 9]]} for number in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config_from(
        {
            "run_dir": str(tmp_path / "run"),
            "target": {"path": str(tiny_target_dir), "device": "cpu"},
            "data": {"path": str(data)},
            "training": {"device": "cpu"},
        },
        tmp_path,
    )
    return read_run_inputs(config)


def key_of(inputs):
    return EvalKey(
        data_sha256=data_sha256(inputs.tasks),
        num_samples=len(inputs.tasks),
        target_revision=inputs.target.revision,
        target_dtype="float32",
        device_type="cpu",
        tokenizer_sha256=tokenizer_sha256(Path(inputs.target.path)),
        chat_template_sha256=chat_template_sha256(inputs.target, inputs.config.data.chat_template),
        spec=inputs.spec,
        max_length=inputs.config.data.max_length,
    )


def no_engine():
    raise AssertionError("the target was loaded")


def test_a_second_run_evaluates_without_the_weights_of_the_target(tmp_path, inputs):
    engines = []

    def load():
        engines.append(HFTargetEngine(inputs.target))
        return engines[-1]

    tables = load_target_tables(inputs.target.path)
    draft = inputs.algorithm.build_draft(inputs.algorithm.draft_config(inputs.target), tables, 0)
    found = []
    for make in (load, no_engine):
        cache = EvalCache(tmp_path / "cache")
        features = cache.features(key_of(inputs), lambda into, make=make: capture_tasks(inputs, into, make))
        found.append(Evaluator(inputs.algorithm, tables, features, EvaluatorSettings(32)).run(draft))
    assert len(engines) == 1
    assert found[0] == found[1]
    assert found[0]["eval/num_samples"] == 6
    expected = [sample.tensors["input_ids"].tolist() for sample in engines[0].capture(inputs.tasks, inputs.spec)]
    assert [features.read(name)["input_ids"].tolist() for name in features.entries] == expected


def test_a_target_with_other_weights_is_captured_anew(tmp_path, inputs):
    cache = EvalCache(tmp_path / "cache")
    cache.features(key_of(inputs), lambda into: capture_tasks(inputs, into, lambda: HFTargetEngine(inputs.target)))
    moved = tmp_path / "moved"
    shutil.copytree(inputs.target.path, moved)
    same = replace(inputs, target=read_target_info(moved))
    cache.features(key_of(same), lambda into: capture_tasks(same, into, no_engine))
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    other = replace(inputs, target=read_target_info(moved))
    with pytest.raises(AssertionError, match="the target was loaded"):
        cache.features(key_of(other), lambda into: capture_tasks(other, into, no_engine))
