"""Exported drafts in a real vLLM: the output stays the target's, and as many tokens are accepted as in our decoder.

vLLM runs in an environment of its own (``make test-engines`` makes it), one process a configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_drafts import RECIPE, demo_of, prompts_of
from served_rounds import near_ties, our_rounds

from specforge.algorithms.parts.vocabulary import kept_ids, vocabulary_maps
from specforge.demo.run import PACKAGED_TARGET
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.export.draft import FORMATS, write_export
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.target import read_target_info
from specforge.launch.drafts import load_draft, read_draft
from specforge.launch.export import export_draft

pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]

HERE = Path(__file__).parent
DEADLINE_S = 1200
ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
Decode = Callable[[list[list[int]], dict[str, Any] | None], dict[str, Any]]


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, f"{command[:2]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def decode(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Decode:
    """Decodes prompts in vLLM, with a speculative configuration or without; what ``vllm_decode.py`` answers."""
    python = repository / ".venv-engines" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} does not exist; make test-engines creates the engines' environment")

    def decoded(prompts: list[list[int]], speculative: dict[str, Any] | None) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("vllm")
        request, answer = folder / "request.json", folder / "answer.json"
        values = {
            "target": str(PACKAGED_TARGET),
            "prompts": prompts,
            "max_new_tokens": RECIPE.eval_new_tokens,
            "speculative": speculative,
        }
        request.write_text(json.dumps(values))
        run([str(python), str(HERE / "vllm_decode.py"), str(request), str(answer)], ENGINE_ENVIRONMENT)
        return dict(json.loads(answer.read_text()))

    return decoded


@pytest.fixture(scope="session")
def plain(decode: Decode, drafts: Path) -> list[list[int]]:
    """vLLM's output without a draft, by prompt."""
    return list(decode(prompts_of(demo_of(drafts, "eagle3")), None)["tokens"])


@pytest.fixture(scope="session")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where drafts are trained, each the first time that it is asked for."""
    return tmp_path_factory.mktemp("drafts")


def trained(drafts: Path, algorithm: str) -> Path:
    """The run of ``algorithm``, trained now unless it is."""
    done = drafts / f"{algorithm}.trained"
    if not done.exists():
        run([sys.executable, str(HERE / "engine_drafts.py"), str(drafts), algorithm])
        done.touch()
    return drafts / algorithm / "train"


def speculative_config(directory: Path, algorithm: str, num_proposals: int) -> dict[str, Any]:
    """vLLM's flag for an exported draft, as the model card gives it."""
    method = {"peagle": "eagle3"}.get(algorithm, algorithm)
    config = {"model": str(directory), "method": method, "num_speculative_tokens": num_proposals}
    return config | ({"parallel_drafting": True} if algorithm == "peagle" else {})


def compared(
    directory: Path,
    algorithm: str,
    num_proposals: int,
    prompts: list[list[int]],
    plain: list[list[int]],
    decode: Decode,
) -> float:
    """Accepted length by vLLM's counters, which must agree with ours; the output must be ``plain``."""
    served = decode(prompts, speculative_config(directory, algorithm, num_proposals))
    engine = HFTargetEngine(PACKAGED_TARGET)
    ties = near_ties(engine, prompts, plain, served["tokens"])
    num_tokens = sum(map(len, plain))
    assert ties * 1000 < num_tokens

    loaded = load_draft(directory, engine.info, engine.tables)
    proposer = loaded.algorithm.proposer(loaded.draft, engine.tables)
    decoder = SpeculativeDecoder(engine, proposer, loaded.spec, num_proposals)
    ours = our_rounds(decoder, prompts, RECIPE.eval_new_tokens, num_proposals)

    length: float = 1.0 + served["num_accepted_tokens"] / served["num_drafts"]
    print(
        f"\n{directory.name}: vLLM {length:.4f}, ours {ours.accepted_length:.4f}, {num_tokens} tokens, {ties} near-ties"
    )
    assert served["num_draft_tokens"] == num_proposals * served["num_drafts"]
    assert sum(served["accepted_per_position"]) == served["num_accepted_tokens"]
    assert abs(length / ours.accepted_length - 1.0) < 0.05
    return length


@pytest.mark.parametrize(
    ("algorithm", "to", "num_proposals", "least_length"),
    [
        ("eagle3", "vllm", 5, 1.5),
        ("eagle3", "sglang", 5, 1.5),
        ("dflash", "vllm", 7, 1.1),
        ("peagle", "vllm", 5, 1.2),
        ("medusa", "vllm", 4, 1.1),
    ],
)
def test_vllm_drafts_what_our_decoder_drafts_and_loses_nothing(
    tmp_path: Path,
    drafts: Path,
    decode: Decode,
    plain: list[list[int]],
    algorithm: str,
    to: str,
    num_proposals: int,
    least_length: float,
):
    """Drafts with random weights would pass for lossless; hence the accepted lengths, engine against our decoder."""
    prompts, out = prompts_of(demo_of(drafts, algorithm)), tmp_path / f"{algorithm}-{to}"
    export_draft(trained(drafts, algorithm), to, out, "float32")
    assert compared(out, algorithm, num_proposals, prompts, plain, decode) > least_length


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_pruned_vocabulary_is_mapped_to_the_targets(
    tmp_path: Path, drafts: Path, decode: Decode, plain: list[list[int]], to: str
):
    """The rows of the trained head that belong to the commoner half of the vocabulary are a pruned draft."""
    record, target = read_draft(trained(drafts, "eagle3")), read_target_info(PACKAGED_TARGET)
    rows = (json.loads(line)["input_ids"] for line in (drafts / "eagle3" / "responses.jsonl").read_text().splitlines())
    counts = torch.bincount(torch.tensor([token for row in rows for token in row]), minlength=target.vocab_size)
    kept = kept_ids(counts, target.vocab_size // 2)
    d2t, t2d = vocabulary_maps(kept, target.vocab_size)
    state = {**record.state, "lm_head.weight": record.state["lm_head.weight"][kept], "d2t": d2t, "t2d": t2d}
    pruned = replace(record, config=replace(record.config, draft_vocab_size=len(kept)), state=state)

    out, prompts = tmp_path / f"pruned-{to}", prompts_of(demo_of(drafts, "eagle3"))
    write_export(pruned, target, FORMATS[to], out, "float32")
    assert compared(out, "eagle3", 5, prompts, plain, decode) > 1.5


def test_card_of_a_real_run_says_its_data_and_its_measured_length(tmp_path: Path, drafts: Path):
    checkpoint, report = trained(drafts, "eagle3"), tmp_path / "report.json"
    specforge = [sys.executable, "-m", "specforge"]
    prompts = drafts / "eagle3" / "responses.jsonl"
    draft = ["--target", str(PACKAGED_TARGET), "--draft", str(checkpoint)]
    evaluate = ["eval", *draft, "--prompts", str(prompts), "--num-prompts", "4", "--max-new-tokens", "24", "--json"]
    report.write_text(run([*specforge, *evaluate]))
    export = ["export", "--checkpoint", str(checkpoint), "--to", "vllm", "--out", str(tmp_path / "draft")]
    run([*specforge, *export, "--accepted-length-from", str(report)])

    card = (tmp_path / "draft" / "README.md").read_text()
    said = json.loads((tmp_path / "draft" / "config.json").read_text())["specforge"]["training"]
    measured = json.loads(report.read_text())["accepted_length_mean"]
    assert said["measured"]["accepted_length"] == measured > 1.0
    assert f"{measured:.3f} tokens a round" in card
    assert len(said["data_sha256"]) == 64
    assert said["data_sha256"] in card
    assert (said["step"], said["run"]["global_batch_size"]) == (200, RECIPE.global_batch_size)
    assert str(drafts) not in card
    assert str(PACKAGED_TARGET.parent) not in card
