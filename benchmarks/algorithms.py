"""What each draft algorithm is worth on the demo's target: same prompts, same samples, same token budget, three seeds.

Every job is the demo's own training with another ``algorithm`` (or other options of one), on features that jobs which
capture the same share, then real greedy speculative
decoding of the held-out prompts with as many proposals as the algorithm learns. Beside it stands what the training's
metrics say about the very same texts: ``simulated_acc_len``.

    python benchmarks/algorithms.py [--seeds N] [--only NAME ...] [--processes N] [--out DIR] [--json FILE]

``--out`` keeps the runs: what is finished there is not trained again.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from specforge.config.run import RunConfig
from specforge.contracts.capture_server import Generate
from specforge.demo.run import Demo, DemoRecipe, held_out_prompts, make_responses
from specforge.evaluation.simulated import simulate
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.huggingface import HFTargetEngine
from specforge.launch.capture import capture
from specforge.launch.drafts import load_draft
from specforge.launch.inputs import read_target_inputs
from specforge.launch.local import train
from specforge.monitor.jsonl import read_scalars
from specforge.prompts.config import DataConfig

NEW_TOKENS = 64
LOSS_STEPS = 16
"""Steps at the beginning and at the end whose mean losses are compared."""


@dataclass(frozen=True)
class Case:
    """One row of the tables. ``options`` change the demo's options of the algorithm."""

    name: str
    algorithm: str
    options: tuple[tuple[str, Any], ...] = ()


ALGORITHMS = tuple(Case(name, name) for name in ("eagle3", "peagle", "dflash", "domino", "dspark", "mtp", "medusa"))
CHOICES = (
    Case("eagle3, sample_mean", "eagle3", (("normalisation", "sample_mean"),)),
    Case("eagle3, mask_offset 0", "eagle3", (("mask_offset", 0),)),
    Case("eagle3, frozen head", "eagle3", (("freeze_lm_head", True),)),
)


def run_job(root: Path, case: Case, seed: int) -> dict[str, Any]:
    """Train and evaluate one case with one seed, or read what an earlier call found."""
    torch.set_num_threads(1)
    out = root / f"seed{seed}" / case.name.replace(", ", "-").replace(" ", "-")
    result = out / "result.json"
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(out, seed, "colocated", case.algorithm, DemoRecipe(), train_target=False)
    train(config_of(root, case, seed, DataConfig(features=features_of(root, case, seed))), resume=True)
    losses = [record["loss"] for record in read_scalars(out / "train" / "metrics.jsonl")]
    found = {
        "case": case.name,
        "seed": seed,
        "first_loss": statistics.fmean(losses[:LOSS_STEPS]),
        "last_loss": statistics.fmean(losses[-LOSS_STEPS:]),
        **evaluate(demo, seed),
    }
    result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def config_of(root: Path, case: Case, seed: int, data: DataConfig) -> RunConfig:
    """The demo's run of ``case``."""
    out = root / f"seed{seed}" / case.name.replace(", ", "-").replace(" ", "-")
    config = Demo(out, seed, "colocated", case.algorithm, DemoRecipe(), train_target=False).run_config()
    options = config.algorithm.model_copy(update=dict(case.options))
    return config.model_copy(update={"algorithm": options, "data": data})


def features_of(root: Path, case: Case, seed: int) -> Path:
    """Where the features of a case are: cases that capture the same share them."""
    responses = DataConfig(path=responses_of(root, seed).responses, format="tokens")
    spec = read_target_inputs(config_of(root, case, seed, responses)).spec
    return root / f"seed{seed}" / f"features-{spec.fingerprint[:16]}"


def capture_features(root: Path, case: Case, seed: int) -> None:
    """Capture what ``case`` needs, once: the same bits as if it had captured them itself."""
    torch.set_num_threads(1)
    responses = DataConfig(path=responses_of(root, seed).responses, format="tokens")
    capture(config_of(root, case, seed, responses), features_of(root, case, seed))


def responses_of(root: Path, seed: int) -> Demo:
    return Demo(root / f"seed{seed}", seed, "colocated", "eagle3", DemoRecipe(), train_target=False)


def record(root: Path, seed: int) -> None:
    """The samples of ``seed``, the same for every case."""
    torch.set_num_threads(1)
    demo = responses_of(root, seed)
    demo.out.mkdir(parents=True, exist_ok=True)
    make_responses(demo)


def evaluate(demo: Demo, seed: int) -> dict[str, Any]:
    """Real and simulated accepted length on the same texts: the target's greedy answers to held-out prompts."""
    engine = HFTargetEngine(demo.target_dir)
    loaded = load_draft(demo.out / "train", engine.info, engine.tables)
    prompts = [prompt.input_ids for prompt in held_out_prompts(replace(demo, seed=seed))]
    spec = replace(loaded.spec, dtype="float32")
    answers = [generation.token_ids for generation in engine.generate(prompts, Generate(NEW_TOKENS))]
    simulated = simulate(
        engine,
        loaded.algorithm,
        loaded.draft,
        engine.tables,
        spec,
        list(zip(prompts, answers, strict=True)),
        NEW_TOKENS,
    )
    num_proposals = sum(name.startswith("accuracy_") for name in simulated.scalars)
    proposer = loaded.algorithm.proposer(loaded.draft, engine.tables)
    report = SpeculativeDecoder(engine, proposer, loaded.spec, num_proposals).evaluate(prompts, NEW_TOKENS)
    return {
        "num_proposals": num_proposals,
        "accepted_length": report.accepted_length_mean,
        "simulated_acc_len": simulated.simulated_acc_len,
        "simulated_acc_len_all_rows": simulated.scalars["simulated_acc_len"],
        "acceptance_per_position": list(report.acceptance_per_position),
        "lossless": report.lossless,
        "num_mismatches": report.num_mismatches,
        "num_near_ties": report.num_near_ties,
        "num_prompts": report.num_prompts_compared,
        "speed_up": report.speed_up,
        "num_parameters": loaded.config.num_parameters,
    }


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One case over its seeds."""

    def spread(key: str) -> dict[str, Any]:
        values = [result[key] for result in results]
        return {"mean": statistics.fmean(values), "values": values}

    return {
        key: spread(key)
        for key in (
            "accepted_length",
            "simulated_acc_len",
            "first_loss",
            "last_loss",
            "speed_up",
            "simulated_acc_len_all_rows",
        )
    } | {
        "simulated_over_real": [result["simulated_acc_len"] / result["accepted_length"] for result in results],
        "num_proposals": results[0]["num_proposals"],
        "num_parameters": results[0]["num_parameters"],
        "lossless": all(result["lossless"] for result in results),
        "num_near_ties": sum(result["num_near_ties"] for result in results),
        "num_prompts": sum(result["num_prompts"] for result in results),
    }


def table(cases: dict[str, dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        "| algorithm | weights | proposals | loss | accepted length | simulated / real | speed-up | lossless |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        real = case["accepted_length"]
        each = ", ".join(f"{value:.2f}" for value in real["values"])
        ratios = ", ".join(f"{value:.2f}" for value in case["simulated_over_real"])
        lines.append(
            f"| {name} | {case['num_parameters'] / 1e6:.2f} M | {case['num_proposals']} | "
            f"{case['first_loss']['mean']:.3f}, {case['last_loss']['mean']:.3f} | **{real['mean']:.2f}** ({each}) | "
            f"{ratios} | {case['speed_up']['mean']:.2f} | "
            f"{'yes' if case['lossless'] else 'NO'}, {case['num_prompts']} prompts, {case['num_near_ties']} near-ties |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare draft algorithms on the demo's target.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    root = (options.out or Path(tempfile.mkdtemp(prefix="specforge-algorithms-"))).resolve()
    cases = [case for case in (*ALGORITHMS, *CHOICES) if not options.only or case.name in options.only]
    jobs = [(case, seed) for seed in range(options.seeds) for case in cases]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in [pool.submit(record, root, seed) for seed in range(options.seeds)]:
            future.result()
        sets = {features_of(root, case, seed): (case, seed) for case, seed in jobs}
        for future in [pool.submit(capture_features, root, case, seed) for case, seed in sets.values()]:
            future.result()
        futures = [(case, pool.submit(run_job, root, case, seed)) for case, seed in jobs]
        results: dict[str, list[dict[str, Any]]] = {}
        for case, future in futures:
            found = future.result()
            results.setdefault(case.name, []).append(found)
            print(f"{case.name} seed {found['seed']}: accepted length {found['accepted_length']:.3f}, "
                  f"simulated {found['simulated_acc_len']:.3f}, lossless {found['lossless']}", flush=True)  # fmt: skip
    summary = {name: summarise(found) for name, found in results.items()}
    print(table(summary))
    if options.json:
        machine = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        found = machine | {"cases": summary, "results": results}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
