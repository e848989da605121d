"""Runs that train from a real vLLM, with no precomputed feature, beside the same runs in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from vllm_server import RunningVllm, tail, vllm_server

from specforge.demo.run import PACKAGED_TARGET

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

NUM_STEPS = 50
ALGORITHMS: dict[str, dict[str, Any]] = {
    "eagle3": {"name": "eagle3", "ttt_steps": 3},
    "dflash": {"name": "dflash", "block_size": 4, "num_layers": 1},
}
LAYER_IDS = (2, 4, 5, 8)
"""What both want, numbered as vLLM does: outputs of the layers 1, 3 and 4, and of the last one."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningVllm]:
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with vllm_server(PACKAGED_TARGET, LAYER_IDS, "float32", log) as running:
        yield running


def losses(directory: Path, algorithm: str, **overrides: Any) -> list[float]:
    """Of every step of a run of ``algorithm``, trained now."""
    run_yaml = runs.write_run(
        directory,
        PACKAGED_TARGET,
        algorithm=ALGORITHMS[algorithm],
        training__num_epochs=9,
        training__max_steps=NUM_STEPS,
        training__checkpoint_every=NUM_STEPS,
        data_plane__capture_dtype="float32",
        **overrides,
    )
    result = runs.specforge(directory, "train", "-c", str(run_yaml), "--json").succeed()
    assert result["step"] == NUM_STEPS
    assert result["ledger"]["num_slots_trained"] == 4 * NUM_STEPS
    records = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    ("algorithm", "store"), [("eagle3", "shared_memory"), ("eagle3", "mooncake"), ("dflash", "shared_memory")]
)
def test_a_run_from_vllm_learns_what_one_process_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: RunningVllm, algorithm: str, store: str
):
    alone = losses(tmp_path / "alone", algorithm)
    monkeypatch.setenv("SPECFORGE_CAPTURE_TOKEN", server.token)
    served = losses(
        tmp_path / "served",
        algorithm,
        topology="disaggregated",
        target__servers={"dialect": "vllm", "urls": [server.url]},
        data_plane__store={"kind": store},
    )
    assert len(alone) == len(served) == NUM_STEPS, tail(server.log)
    worst = max(abs(got / expected - 1.0) for got, expected in zip(served, alone, strict=True))
    print(f"\n{algorithm} over {store}: loss {served[-1]:.6f}, in one process {alone[-1]:.6f}; {worst:.1e} at most")
    assert alone[-1] < 0.8 * alone[0]
    assert abs(served[-1] / alone[-1] - 1.0) < 0.01
