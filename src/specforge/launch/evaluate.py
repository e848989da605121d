"""``specforge eval`` and the demo's evaluation: a draft and its target decode real prompts together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specforge.algorithms.base import Sampling, TargetTables, TreeShape
from specforge.contracts.tasks import PromptTask
from specforge.errors import ConfigError
from specforge.evaluation.config import EvaluationConfig
from specforge.evaluation.report import SpeculativeReport
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.config import TargetConfig
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.target import load_tokenizer, read_target_info
from specforge.launch.drafts import LoadedDraft, load_draft
from specforge.launch.inputs import resolve_device, resolve_dtype
from specforge.monitor.console import progress
from specforge.prompts.config import DataConfig
from specforge.prompts.tasks import load_prompt_tasks

TREE_ALGORITHMS = ("eagle3", "medusa")
"""The algorithms of this package whose proposers draft trees."""


def evaluate_draft(target: TargetConfig, draft: Path, options: EvaluationConfig) -> dict[str, Any]:
    """Decode the prompts in ``options.prompts`` with and without the draft; the report as JSON data.

    The single prompts are left out.
    """
    if options.prompts is None:
        raise ConfigError("no prompts to evaluate on; set evaluation.prompts to a JSONL file")
    torch.set_num_threads(1)
    device = resolve_device(target.device)
    info = read_target_info(target.path, target.trust_remote_code)
    data = DataConfig(path=options.prompts, limit=options.num_prompts)
    tasks = load_prompt_tasks(data, load_tokenizer(target.path, target.trust_remote_code))
    dtype = str(resolve_dtype(target.dtype, device)).removeprefix("torch.")
    engine = HFTargetEngine(info, dtype, device, target.trust_remote_code)
    loaded = load_draft(draft, info, engine.tables)
    prompts = [prompt_of(task, options.prompt_tokens) for task in tasks]
    report = decode(engine, engine.tables, loaded, prompts, options)
    summary = report.to_dict()
    del summary["prompts"]
    return summary | {"speed_up": report.speed_up, "target": info.path, "draft": str(draft)}


def decode(
    engine: HFTargetEngine,
    tables: TargetTables,
    loaded: LoadedDraft,
    prompts: Sequence[Sequence[int]],
    options: EvaluationConfig,
    title: str = "evaluation",
) -> SpeculativeReport:
    """Speculative decoding of ``prompts`` beside plain decoding, with a progress bar."""
    proposer = loaded.algorithm.proposer(loaded.draft, tables)
    if options.tree is not None and not proposer.drafts_trees:
        tree = options.tree
        raise ConfigError(
            f"a tree was asked for (--tree {tree.top_k},{tree.depth},{tree.num_nodes} or evaluation.tree), but the "
            f"draft is of the algorithm {loaded.algorithm.name}, which drafts chains only; leave the tree out, or give "
            f"a draft of an algorithm that drafts trees (of those that ship: {' and '.join(TREE_ALGORITHMS)})"
        )
    decoder = SpeculativeDecoder(
        engine,
        proposer,
        loaded.spec,
        options.num_proposals,
        sampling=sampling_of(options),
        tree=None if options.tree is None else TreeShape(**options.tree.model_dump()),
    )
    with torch.inference_mode(), progress(title, len(prompts), "prompts") as bar:
        return decoder.evaluate(prompts, options.max_new_tokens, on_prompt=bar.update_to)


def sampling_of(options: EvaluationConfig) -> Sampling | None:
    """How tokens are drawn, ``None`` for greedy decoding."""
    if not options.temperature:
        return None
    generator = torch.Generator().manual_seed(options.seed)
    return Sampling(options.temperature, generator, options.top_k, options.top_p)


def prompt_of(task: PromptTask, prompt_tokens: int) -> tuple[int, ...]:
    """The tokens before the first answer; of a sample that is all answer (plain text), its beginning."""
    start = task.loss_spans[0][0]
    return task.input_ids[:start] if start else task.input_ids[:prompt_tokens]
