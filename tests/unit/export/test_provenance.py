"""What a model card and ``config.json`` say about the training, and what they never say."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from export_drafts import TARGET, trained

from specforge.errors import DraftError
from specforge.export.draft import FORMATS, read_export, write_export
from specforge.export.provenance import Measured, TrainingRecord, measured_in

IDENTITY = {
    "seed": 7, "algorithm": {"name": "eagle3", "ttt_steps": 7, "draft_vocab_size": None}, "target_revision": "abc123",
    "capture_dtype": "float32", "aux_layers": [1, 3, 4], "data_sha256": "d" * 64, "order": "strict",
    "total_steps": 320, "global_batch_size": 8, "optimizer": "muon", "lr": 0.01, "betas": [0.9, 0.95],
}  # fmt: skip
SETTINGS = {
    "algorithm": "eagle3", "draft_step": 320, "target_revision": "abc123", "num_proposals": 5, "tree": None,
    "prompts": ["/home/me/mt.jsonl", "/home/me/gsm.jsonl"],
}  # fmt: skip
REPORT = {
    "accepted_length_mean": 2.3456, "num_rounds": 870, "num_prompts": 32, "num_prompts_compared": 96, "lossless": True,
    "draft": "/home/me/draft", "target": "/home/me/tiny-target", "settings": SETTINGS,
}  # fmt: skip
MEASURED = Measured(2.3456, 870, 32, 5, None, ("mt.jsonl", "gsm.jsonl"))


EXPORTED = ("eagle3", TARGET, 320)


def changed(**settings: Any) -> dict[str, Any]:
    return {**REPORT, "settings": {**SETTINGS, **settings}}


def written(tmp_path: Path, to: str, record: TrainingRecord) -> tuple[str, dict[str, Any]]:
    write_export(trained("eagle3"), TARGET, FORMATS[to], tmp_path / "out", training=record)
    card = (tmp_path / "out" / "README.md").read_text()
    return card, json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("to", list(FORMATS))
def test_card_says_how_the_draft_was_trained_and_how_good_it_is(tmp_path: Path, to: str):
    record = TrainingRecord.of(320, IDENTITY, MEASURED)
    card, served = written(tmp_path, to, record)
    for fact in ("step 320", "d" * 64, "lr 0.01", "seed 7", "optimizer muon", "betas [0.9, 0.95]", "ttt_steps 7"):
        assert fact in card
    assert "(870 rounds, 32 prompts of mt.jsonl, gsm.jsonl; chains of 5 proposals, greedy)" in card
    assert "draft_vocab_size null" not in card
    training = served["specforge"]["training"]
    assert (training["step"], training["data_sha256"], training["run"]["lr"]) == (320, "d" * 64, 0.01)
    assert training["measured"] == asdict(MEASURED) | {"prompts": list(MEASURED.prompts)}
    assert read_export(tmp_path / "out").options["name"] == "eagle3"


def test_card_of_a_draft_that_was_not_measured_says_so(tmp_path: Path):
    card, served = written(tmp_path, "vllm", TrainingRecord.of(320, IDENTITY))
    assert "not measured" in card
    assert served["specforge"]["training"]["measured"] is None


def test_no_path_of_this_machine_gets_into_an_export(tmp_path: Path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    record = TrainingRecord.of(
        1, {**IDENTITY, "data_path": str(tmp_path)}, measured_in(tmp_path / "report.json", *EXPORTED)
    )
    card, served = written(tmp_path, "sglang", record)
    assert str(tmp_path) not in card + json.dumps(served)
    assert "/somewhere" not in card + json.dumps(served)
    assert "/home" not in card + json.dumps(served)


def test_accepted_length_is_read_from_an_evaluation(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    assert measured_in(path, *EXPORTED) == MEASURED
    tree = {"top_k": 8, "depth": 5, "num_nodes": 63}
    path.write_text(json.dumps(changed(tree=tree)))
    assert "trees of top_k 8, depth 5, num_nodes 63" in str(measured_in(path, *EXPORTED))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read"),
        (json.dumps({**REPORT, "accepted_length_mean": None}), "accepted_length_mean to be a number of at least 1"),
        (json.dumps({**REPORT, "accepted_length_mean": 0.5}), "at least 1, got 0.5"),
        (json.dumps({**REPORT, "num_prompts_compared": 0}), "sampled decoding compares nothing"),
        (json.dumps({**REPORT, "num_prompts": None}), "num_prompts and num_prompts_compared above 0"),
        (json.dumps({**REPORT, "settings": {}}), "does not say what was run"),
        (json.dumps({**REPORT, "lossless": False}), "lossless: false"),
        (json.dumps(changed(algorithm="medusa")), "another draft: its algorithm is medusa, .* is eagle3"),
        (json.dumps(changed(target_revision="def456")), "its target revision is def456, .* is abc123"),
        (json.dumps(changed(draft_step=100)), "its step is 100, .* is 320"),
        (json.dumps({**changed(target_revision=None), "target": "/a/other"}), "its target is other, .* is tiny-target"),
    ],
)
def test_file_that_is_no_such_evaluation_is_refused(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DraftError, match=message):
        measured_in(path, *EXPORTED)
