"""Golden vectors of decoding: recorded rounds of a tiny target with a draft, repeated by the product's own decoder.

A trace's json names the draft's architecture; its weights are in the twin or in a file that it names. The target is in
the same folder.

Legend: l proposals of a round.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from specforge.algorithms.base import Algorithm, DraftModel, DraftRequest, Proposal, Proposer
from specforge.algorithms.catalog import algorithm_names, get_algorithm, options_of
from specforge.contracts.capture import CaptureSpec
from specforge.evaluation.speculative import Round, SpeculativeDecoder
from specforge.inference.engine import TargetSession
from specforge.inference.huggingface import HFTargetEngine
from specforge.testing.golden.eagle_tree import run_eagle_tree
from specforge.testing.golden.report import Comparison, InputsAbsent, Kind, NotBuilt, Status
from specforge.testing.golden.vectors import Vector, present
from specforge.testing.golden.verify import run_verify

STEP_KEYS = {"start", "verify_ids", "target_argmax", "accepted", "committed", "confidence_logits"}


def run_inference(vector: Vector, result: Comparison) -> None:
    """Runs what the keys of the json say that it is."""
    for key, run in _KINDS.items():
        if key in vector.facts:
            run(vector, result)
            return
    raise NotBuilt("no runner for an inference vector with these keys")


def run_trace(vector: Vector, result: Comparison) -> None:
    """Every sample of ``samples``: the same proposals, verdicts and output, round by round."""
    recorded = _algorithm_of(vector.facts)
    if recorded.name not in algorithm_names():
        raise NotBuilt(f"the algorithm {recorded.name!r}")
    with _target(vector.path.parent) as directory:
        engine = _RecordingEngine(HFTargetEngine(directory))
    algorithm = get_algorithm(options_of(recorded.options))
    draft = _draft(algorithm, engine, vector)
    spec = algorithm.capture_spec(draft[1], "float32")
    proposer = _RecordingProposer(algorithm.proposer(draft[0], engine.tables))
    recording = _Recording(SpeculativeDecoder(engine, proposer, spec, recorded.num_proposals), engine, proposer)
    for place, sample in enumerate(vector.facts["samples"]):
        _run_sample(f"samples[{place}]", sample, recording, recorded.num_proposals, result)


def _run_sample(
    name: str, sample: dict[str, Any], recording: _Recording, num_proposals: int, result: Comparison
) -> None:
    recording.engine.choices.clear()
    prompt, steps = sample["prompt"], sample["steps"]
    # the recorded rounds are full ones, also the last: the output was cut after it
    end = max(step["start"] for step in steps) + 2 * (num_proposals + 1)
    decoded = recording.decoder.speculative(prompt, end - len(prompt))
    tokens = [*prompt, *decoded.tokens]
    _exact(result, f"{name}.output", tokens[: len(sample["output"])], sample["output"])
    if "first_token" in sample:
        _exact(result, f"{name}.first_token", [decoded.tokens[0]], [sample["first_token"]])
    _exact(result, f"{name}.steps", [len(decoded.rounds) >= len(steps)], [True])
    for index, (step, mine) in enumerate(zip(steps, decoded.rounds, strict=False)):
        if unknown := set(step) - STEP_KEYS:
            raise ValueError(f"unknown keys in a step: {sorted(unknown)}")
        at = f"{name}.steps[{index}]"
        _run_step(at, step, (tokens[mine.start], mine, recording.engine.choices[index + 1]), result)
        if step.get("confidence_logits") is not None:
            # drafting ends at the first confidence that is too low, so those after it are not known
            got = torch.tensor(recording.proposer.confidences[index])
            expected = torch.tensor(step["confidence_logits"])[: max(len(got), len(mine.proposals))]
            result.check(Kind.LOGITS, f"{at}.confidence_logits", got[: len(expected)], expected)


def _run_step(name: str, step: dict[str, Any], mine: tuple[int, Round, list[int]], result: Comparison) -> None:
    token, round_, choices = mine
    _exact(result, f"{name}.start", [round_.start], [step["start"]])
    _exact(result, f"{name}.verify_ids", [token, *round_.proposals], step["verify_ids"])
    _exact(result, f"{name}.accepted", [len(round_.accepted)], [step["accepted"]])
    _exact(result, f"{name}.committed", round_.committed, step["committed"])
    _exact(result, f"{name}.target_argmax", choices, step["target_argmax"])


def _exact(result: Comparison, name: str, got: Sequence[int], expected: Sequence[int]) -> None:
    result.check(Kind.METRICS, name, torch.tensor(list(got)), torch.tensor(list(expected)))


# --- the target and the draft ----------------------------------------------------------------------------------------


@contextmanager
def _target(folder: Path) -> Iterator[Path]:
    """A Hugging Face directory with the ``target_config.json`` and ``target.safetensors`` of ``folder``."""
    config, weights = present(folder / "target_config.json"), present(folder / "target.safetensors")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copyfile(config, directory / "config.json")
        shutil.copyfile(weights, directory / "model.safetensors")
        yield directory


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The algorithm of a trace, its options as plain data, and the most proposals of a round."""

    name: str
    options: dict[str, Any]
    num_proposals: int


def _algorithm_of(facts: dict[str, Any]) -> _Recorded:
    layers = tuple(facts["target_layer_ids"])
    if "chain_length" in facts:
        options = {"name": "eagle3", "aux_layers": layers, "architecture": "qwen3", **_sizes(facts["config"])}
        return _Recorded("eagle3", options, facts["chain_length"])
    block, options = facts["block_size"], {"aux_layers": layers, "block_size": facts["block_size"]}
    options |= {"mask_token_id": facts["mask_token_id"], "num_layers": len(layers)}
    if "config" in facts:
        options |= {**_sizes(facts["config"]), "num_layers": facts["config"]["layers"]}
    if "markov_rank" in facts:
        names = ("markov_rank", "markov_head_type", "confidence_head_with_markov", "confidence_threshold")
        return _Recorded("dspark", {"name": "dspark", **options, **{name: facts[name] for name in names}}, block)
    if "gru_hidden_dim" in facts:
        names = ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label")
        return _Recorded("domino", {"name": "domino", **options, **{name: facts[name] for name in names}}, block - 1)
    return _Recorded("dflash", {"name": "dflash", **options}, block - 1)


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    names = {
        "intermediate_size": "intermediate_size",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
    }
    return {ours: config[theirs] for ours, theirs in {**names, "head_dim": "head_dim"}.items()}


def _draft(algorithm: Algorithm, engine: _RecordingEngine, vector: Vector) -> tuple[DraftModel, Any]:
    """The product's draft with the recorded weights; what those leave out is the target's."""
    config = algorithm.draft_config(engine.info)
    draft = algorithm.build_draft(config, engine.tables, seed=0)
    weights, state = _weights(vector), draft.state_dict()
    frozen = {name for name in state if name.startswith(("lm_head.", "d2t", "t2d"))}
    if set(state) - frozen != set(weights):
        raise ValueError(f"weights that are not on both sides: {sorted((set(state) - frozen) ^ set(weights))}")
    draft.load_state_dict({**state, **weights})
    return draft.eval(), config


def _weights(vector: Vector) -> dict[str, Tensor]:
    """From the twin, a file that the json names, or one whose name begins that of the json."""
    tensors = vector.tensors
    if not tensors:
        named = re.findall(r"([\w.\-]+)\.safetensors", " ".join(v for v in vector.facts.values() if isinstance(v, str)))
        files = [vector.path.with_name(f"{name}.safetensors") for name in named if name != "target"]
        same_start = [p for p in vector.path.parent.glob("*.safetensors") if vector.path.stem.startswith(p.stem)]
        files += sorted(same_start, key=lambda path: len(path.stem), reverse=True)
        if (file := next((file for file in files if file.is_file()), None)) is None:
            raise InputsAbsent("the weights of its draft are not there")
        tensors = load_file(file)
    weights = {name.removeprefix("w."): value for name, value in tensors.items() if name.startswith("w.")}
    if "chain_length" in vector.facts:
        weights = {name.replace("layers.0.", "midlayer."): value for name, value in weights.items()}
    return weights


# --- what a round leaves behind --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Recording:
    decoder: SpeculativeDecoder
    engine: _RecordingEngine
    proposer: _RecordingProposer


class _RecordingEngine:
    """The target, without stop tokens; ``choices`` has the greedy tokens of every forward."""

    def __init__(self, engine: HFTargetEngine) -> None:
        self.info, self.dtype, self.tables = replace(engine.info, eos_token_ids=()), engine.dtype, engine.tables
        self.reference_logits = engine.reference_logits
        self.choices: list[list[int]] = []
        self._engine = engine

    def session(self, spec: CaptureSpec) -> TargetSession:
        return _RecordingSession(self._engine.session(spec), self.choices)


class _RecordingSession:
    def __init__(self, session: TargetSession, choices: list[list[int]]) -> None:
        self._session, self._choices = session, choices
        self.crop, self.keep = session.crop, session.keep

    def forward(
        self, token_ids: Sequence[int], parents: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, features = self._session.forward(token_ids, parents)
        self._choices.append(logits.argmax(dim=-1).tolist())
        return logits, features


class _RecordingProposer(Proposer):
    """The draft; ``confidences`` has the confidence logits of every round, of a draft that predicts them."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.confidences: list[tuple[float, ...]] = []

    def reset(self) -> None:
        self._proposer.reset()
        self.confidences = []

    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        proposal = self._proposer.propose(tokens, features, request)
        self.confidences.append(getattr(self._proposer, "confidences", ()))
        return proposal


def _run_target(vector: Vector, result: Comparison) -> None:
    """The configuration of the target of the traces: the product reads it."""
    with _target(vector.path.parent) as directory:
        info = HFTargetEngine(directory).info
    for ours, theirs in (
        ("num_layers", "num_hidden_layers"),
        ("hidden_size", "hidden_size"),
        ("vocab_size", "vocab_size"),
    ):
        result.check(Kind.METRICS, theirs, float(getattr(info, ours)), float(vector.facts[theirs]))
    result.status = Status.PASSED


_KINDS: dict[str, Callable[[Vector, Comparison], None]] = {
    "trees": run_eagle_tree,
    "siblings": run_verify,
    "samples": run_trace,
    "model_type": _run_target,
}
