"""``specforge demo``: a real draft, from text to a serving format, in one command.

    responses   the target continues prompts from training modules     OUT/responses.jsonl
    training    a draft on hidden states captured live                 OUT/train/
    evaluation  speculative decoding on prompts from held-out modules
    export      the draft as SGLang loads it, reloaded and compared    OUT/sglang/
                (OUT/vllm/ or OUT/hf/ where SGLang serves none)
    report      table, OUT/report.json, OUT/report.html

Every phase either finds its result complete or makes it again; ``resume`` runs the phases in order and training
continues from its last checkpoint, so an interrupted demo ends with the same weights.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from specforge.algorithms.catalog import options_of
from specforge.config.run import RunConfig
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.config import ControlPlaneConfig
from specforge.demo.corpus import standard_library_modules
from specforge.demo.prompts import CutPrompt, cut_prompts
from specforge.demo.recipes import DRAFTS, DemoRecipe, DraftRecipe
from specforge.demo.target import STATE_FILE, TargetRecipe, train_target
from specforge.errors import UserError
from specforge.evaluation.config import EvaluationConfig
from specforge.evaluation.report import SpeculativeReport
from specforge.inference.config import TargetConfig
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.responses import record_responses
from specforge.inference.target import load_tokenizer
from specforge.launch.drafts import load_draft
from specforge.launch.evaluate import decode
from specforge.launch.export import export_draft, served_format
from specforge.launch.local import train
from specforge.launch.lock import LOCK_FILE, run_lock
from specforge.launch.runtime import TrainOutcome
from specforge.monitor.console import progress
from specforge.monitor.jsonl import read_records, read_scalars
from specforge.monitor.report import write_report
from specforge.prompts.config import DataConfig, GenerateOptions
from specforge.prompts.responses import ResponseOptions
from specforge.training.config import TrainingConfig

PACKAGED_TARGET = Path(__file__).parent / "target_model"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line chose. ``None`` takes what a resumed demo began with, else the default."""

    out: Path
    seed: int | None = None
    topology: str | None = None
    algorithm: str | None = None
    resume: bool = False
    train_target: bool | None = None


class Phases:
    """Wall seconds by phase, over all tries of a resumed demo; kept in ``OUT/phases.json``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path) or {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started, before = time.monotonic(), self.seconds.get(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] = round(before + time.monotonic() - started, 1)
            write_json(self._path, self.seconds)


@dataclass(frozen=True, slots=True)
class Demo:
    """A demo in a directory: resolved options, recipe, target, files."""

    out: Path
    seed: int
    topology: str
    algorithm: str
    recipe: DemoRecipe
    train_target: bool

    @property
    def target_dir(self) -> Path:
        return self.out / "target" if self.train_target else PACKAGED_TARGET

    @property
    def responses(self) -> Path:
        return self.out / "responses.jsonl"

    @property
    def draft(self) -> DraftRecipe:
        """What is trained; an algorithm of another package has its defaults."""
        return DRAFTS.get(self.algorithm, DraftRecipe())

    def run_config(self) -> RunConfig:
        """The training as an ordinary run: ``specforge train -c OUT/train/resolved.yaml`` is the same."""
        recipe, draft = self.recipe, self.draft
        return RunConfig(
            run_dir=self.out / "train",
            seed=self.seed,
            topology=self.topology,
            target=TargetConfig(path=self.target_dir, dtype="float32", device="cpu"),
            data=DataConfig(path=self.responses, format="tokens"),
            algorithm=options_of({"name": self.algorithm, **draft.options}),
            training=TrainingConfig(
                num_epochs=recipe.num_epochs,
                global_batch_size=recipe.global_batch_size,
                micro_batch_tokens=recipe.micro_batch_tokens,
                optimizer=draft.optimizer,
                lr=draft.lr,
                warmup_ratio=recipe.warmup_ratio,
                max_grad_norm=recipe.max_grad_norm,
                checkpoint_every=recipe.checkpoint_every,
                dtype="float32",
                device="cpu",
            ),
            control_plane=ControlPlaneConfig(),
            evaluation=EvaluationConfig(
                num_prompts=recipe.num_eval_prompts,
                max_new_tokens=recipe.eval_new_tokens,
                num_proposals=recipe.num_proposals,
            ),
        )


def run_demo(options: DemoOptions, recipe: DemoRecipe | None = None) -> dict[str, Any]:
    """All phases; returns the report, which is also in ``OUT/report.json`` and ``OUT/report.html``."""
    torch.set_num_threads(1)
    out = options.out.resolve()
    refuse_foreign(out)
    with run_lock(out):
        return run_phases(open_demo(replace(options, out=out), recipe or DemoRecipe()))


def run_phases(demo: Demo) -> dict[str, Any]:
    """All phases of a demo whose directory this process holds."""
    phases = Phases(demo.out / "phases.json")
    if demo.train_target and not is_trained(demo.target_dir):
        with phases.timed("target"):
            train_target(demo.target_dir, TargetRecipe(seed=demo.seed), ranks=min(2, os.cpu_count() or 1))
    with phases.timed("responses"):
        make_responses(demo)
    with phases.timed("training"):
        outcome = train(demo.run_config(), resume=True)
    with phases.timed("evaluation"):
        trained, untrained = evaluate_demo(demo)
    with phases.timed("export"):
        to = served_format(demo.algorithm)
        export = export_draft(demo.out / "train", to, demo.out / to)
    report = make_report(demo, outcome, trained, untrained) | {"export": export, "wall_seconds": phases.seconds}
    write_json(demo.out / "report.json", report)
    write_report(demo.out / "report.html", report, read_scalars(demo.out / "train" / "metrics.jsonl"), "SpecForge demo")
    print_report(report, demo.out)
    return report


def refuse_foreign(out: Path) -> None:
    """Refuse a directory that holds something else than a demo, or than what the first instant of one left."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    found = {path.name for path in out.iterdir()} if out.exists() else set()
    if "demo.json" not in found and found - {LOCK_FILE, partial_of(out / "demo.json").name}:
        raise UserError(f"{out} is not empty and holds no demo; choose another --out")


def open_demo(options: DemoOptions, recipe: DemoRecipe) -> Demo:
    """A new demo in the directory ``out``, or the one that is resumed with what it was begun with."""
    out, begun_file = options.out, options.out / "demo.json"
    chosen = asdict(options)
    settings: dict[str, Any] = {"seed": 0, "topology": "colocated", "algorithm": "eagle3", "train_target": False}
    if not begun_file.exists():
        settings |= {key: chosen[key] for key in settings if chosen[key] is not None}
        write_json(begun_file, {"settings": settings, "recipe": asdict(recipe)})
        return Demo(out, recipe=recipe, **settings)
    if not options.resume:
        raise UserError(f"{out} already holds a demo; add --resume to continue it, or choose another --out")
    try:
        begun = read_json(begun_file)
        settings = {key: begun["settings"][key] for key in settings}
        recipe = DemoRecipe(**begun["recipe"])
    except (KeyError, TypeError):
        raise UserError(f"{begun_file} is damaged or of another version; choose another --out") from None
    for key, value in settings.items():
        if chosen[key] is not None and chosen[key] != value:
            raise UserError(
                f"{out} was begun with {key} {value}, not {chosen[key]}; "
                f"resume it without --{key.replace('_', '-')}, or choose another --out"
            )
    return Demo(out, recipe=recipe, **settings)


def make_responses(demo: Demo) -> None:
    """Prompts from the modules that the target was trained on, continued by the target itself."""
    recipe = demo.recipe
    names = trained_modules(demo.target_dir)
    modules = [module for module in standard_library_modules() if module.name in names]
    key = f"responses|{demo.seed}"
    tokenizer = load_tokenizer(demo.target_dir)
    prompts = cut_prompts(modules, tokenizer, recipe.num_responses, recipe.prompt_tokens, key)
    engine = HFTargetEngine(demo.target_dir)
    tasks = [
        PromptTask("", index, prompt.input_ids, (), {"module": prompt.module}, num_to_generate=recipe.response_tokens)
        for index, prompt in enumerate(prompts)
    ]
    options = ResponseOptions(GenerateOptions(max_new_tokens=recipe.response_tokens), demo.seed)
    recorded = record_responses(engine, tasks, demo.responses, options, recipe.generation_batch_size)
    with progress("responses", recipe.num_responses, "prompts") as bar:
        for done in recorded:
            bar.update_to(done)


def held_out_prompts(demo: Demo) -> list[CutPrompt]:
    """Prompts of the evaluation, from modules that the target never saw."""
    names = trained_modules(demo.target_dir)
    modules = [module for module in standard_library_modules() if module.name not in names]
    recipe = demo.recipe
    tokenizer = load_tokenizer(demo.target_dir)
    return cut_prompts(modules, tokenizer, recipe.num_eval_prompts, recipe.prompt_tokens, f"held-out|{demo.seed}")


def evaluate_demo(demo: Demo) -> tuple[SpeculativeReport, SpeculativeReport]:
    """The trained draft on every held-out prompt, and the draft as it was before training on some of them."""
    config = demo.run_config()
    engine = HFTargetEngine(demo.target_dir)
    prompts = [prompt.input_ids for prompt in held_out_prompts(demo)]
    trained = load_draft(demo.out / "train", engine.info, engine.tables)
    fresh = trained.algorithm.build_draft(trained.config, engine.tables, demo.seed)
    untrained = replace(trained, draft=fresh.eval())
    few = prompts[: demo.recipe.num_untrained_eval_prompts]
    return (
        decode(engine, engine.tables, trained, prompts, config.evaluation, "evaluation"),
        decode(engine, engine.tables, untrained, few, config.evaluation, "untrained"),
    )


def make_report(
    demo: Demo, outcome: TrainOutcome, trained: SpeculativeReport, untrained: SpeculativeReport
) -> dict[str, Any]:
    """``report.json`` but for the export and the wall seconds."""
    events = list(read_records(demo.out / "train" / "metrics.jsonl"))
    first_step = next((record for record in events if record.get("event") == "first_step"), {"num_captured": None})
    return {
        "accepted_length_mean": trained.accepted_length_mean,
        "accepted_length_untrained": untrained.accepted_length_mean,
        "acceptance_per_position": list(trained.acceptance_per_position),
        "lossless": bool(trained.lossless and untrained.lossless),
        "num_prompts_compared": trained.num_prompts_compared,
        "num_near_ties": trained.num_near_ties + untrained.num_near_ties,
        "distinct_4grams": trained.distinct_4grams,
        "tokens_per_second_plain": trained.tokens_per_second_plain,
        "tokens_per_second_speculative": trained.tokens_per_second_speculative,
        "speed_up": trained.speed_up,
        "num_samples_trained": outcome.ledger["num_slots_trained"],
        "num_samples_unique": outcome.ledger["num_unique_samples_trained"],
        "num_samples_captured_at_first_step": first_step["num_captured"],
        "num_steps": outcome.step,
        "draft_weights_sha256": outcome.draft_weights_sha256,
        "topology": demo.topology,
        "algorithm": demo.algorithm,
        "seed": demo.seed,
        "configuration": asdict(demo.recipe) | asdict(demo.draft),
    }


def print_report(report: dict[str, Any], out: Path) -> None:
    """The table that ends a demo, on standard error like the progress bars."""
    table = Table(title=f"SpecForge demo: {report['algorithm']}", show_header=False, title_justify="left")
    rows = {
        "accepted length": f"{_length(report['accepted_length_mean'])} tokens a round "
        f"(untrained draft: {_length(report['accepted_length_untrained'])})",
        "acceptance by position": " ".join(f"{share:.2f}" for share in report["acceptance_per_position"]) or "-",
        "lossless": f"{'yes' if report['lossless'] else 'NO'}: {report['num_prompts_compared']} held-out prompts, "
        f"{report['num_near_ties']} near-ties",
        "tokens per second": f"{report['tokens_per_second_speculative']:.0f} speculative, "
        f"{report['tokens_per_second_plain']:.0f} plain ({report['speed_up']:.2f}x)",
        "trained on": f"{report['num_samples_trained']} samples ({report['num_samples_unique']} different) in "
        f"{report['num_steps']} steps, {report['topology']}",
        "draft weights": f"sha256 {report['draft_weights_sha256'][:16]}...",
        "export": f"{report['export']['path']} ({report['export']['format']}, reloaded: same logits)",
        "seconds": ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["wall_seconds"].items()),
        "report": str(out / "report.html"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True).print(table)


def _length(mean: float | None) -> str:
    """An accepted length, which an evaluation without a round that counts has not."""
    return "-" if mean is None else f"{mean:.2f}"


def trained_modules(target_dir: Path) -> set[str]:
    """Names of the modules that the target in ``target_dir`` was trained on."""
    listed = json.loads((target_dir / "trained_on.json").read_text())
    return {entry["name"] for entry in listed["trained_on"]}


def is_trained(target_dir: Path) -> bool:
    """Whether the training of a target came to its end; its state goes when everything else is written."""
    return (target_dir / "trained_on.json").exists() and not (target_dir / STATE_FILE).exists()


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def write_json(path: Path, value: Any) -> None:
    """Write, sync and rename, so that nobody ever sees half a file."""
    with partial_of(path).open("w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial_of(path).replace(path)


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote; ``None`` where there is nothing that can be read."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
