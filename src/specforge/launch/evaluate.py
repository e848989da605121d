"""``specforge eval`` and the demo's evaluation: a draft and its target decode real prompts together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specforge.algorithms.base import Sampling, TargetTables, TreeShape
from specforge.errors import ConfigError, DataError
from specforge.evaluation.config import EvaluationConfig
from specforge.evaluation.outcome import BatchOutcome, measure, report_of
from specforge.evaluation.report import SpeculativeReport
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.config import TargetConfig
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.target import load_tokenizer, read_target_info
from specforge.launch.drafts import LoadedDraft, load_draft
from specforge.launch.inputs import resolve_device, resolve_dtype
from specforge.monitor.console import progress
from specforge.prompts.questions import Prompt, QuestionEncoder, chosen_in_turn, read_questions

TREE_ALGORITHMS = ("eagle3", "medusa")
"""The algorithms of this package whose proposers draft trees."""

_log = logging.getLogger(__name__)


def evaluate_draft(target: TargetConfig, draft: Path, options: EvaluationConfig) -> dict[str, Any]:
    """Decode the prompts of ``options.prompts`` with and without the draft, at every batch size.

    The report as JSON data (``evaluation.outcome.report_of``), with what was run in ``settings``.
    """
    if not options.prompts:
        raise ConfigError("no prompts to evaluate on; set evaluation.prompts to a JSONL file")
    torch.set_num_threads(1)
    device = resolve_device(target.device)
    info = read_target_info(target.path, target.trust_remote_code)
    prompts = load_prompts(options, load_tokenizer(target.path, target.trust_remote_code), info.max_position_embeddings)
    dtype = str(resolve_dtype(target.dtype, device)).removeprefix("torch.")
    engine = HFTargetEngine(info, dtype, device, target.trust_remote_code)
    loaded = load_draft(draft, info, engine.tables)
    ids, categories = [prompt.input_ids for prompt in prompts], [prompt.category for prompt in prompts]
    outcomes: list[BatchOutcome] = []
    for batch_size in options.batch_sizes:
        decoder = decoder_of(engine, engine.tables, loaded, options, batch_size)
        first = outcomes[0].report if outcomes else None
        with torch.inference_mode(), progress(f"batch size {batch_size}", len(prompts), "prompts") as bar:
            outcomes.append(
                measure(decoder, ids, categories, options.max_new_tokens, first=first, on_prompt=bar.update_to)
            )
    settings = options.model_dump(mode="json") | {
        "algorithm": loaded.algorithm.name,
        "dtype": dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    report = report_of(outcomes, categories)
    for row, prompt in zip(report["prompts"], prompts, strict=True):
        row.update(file=prompt.file, line=prompt.line)
    return report | {"target": info.path, "draft": str(draft), "settings": settings}


def load_prompts(options: EvaluationConfig, tokenizer: Any, max_tokens: int) -> list[Prompt]:
    """The prompts of all files. One that leaves no room for its answer in ``max_tokens`` is left out, with a warning.

    Raises :class:`DataError`, also where no prompt is left.
    """
    encoder = QuestionEncoder(tokenizer, options.prompt_tokens, options.chat_template, options.as_text)
    prompts: list[Prompt] = []
    num_long = 0
    for path in options.prompts:
        for question in chosen_in_turn(read_questions(path), options.num_prompts):
            try:
                ids = encoder.encode(question)
            except DataError as error:
                raise DataError(f"{path} line {question.line}: {error}") from None
            if len(ids) + options.max_new_tokens > max_tokens:
                num_long += 1
            else:
                prompts.append(Prompt(ids, question.category, str(path), question.line))
    left_out = (
        f"{num_long} prompts were left out: with {options.max_new_tokens} new tokens they are longer than the "
        f"{max_tokens} positions of the target"
    )
    if not prompts:
        raise DataError(f"no prompt is left, {left_out}; give shorter prompts or fewer new tokens")
    if num_long:
        _log.warning("%s", left_out)
    return prompts


def decode(
    engine: HFTargetEngine,
    tables: TargetTables,
    loaded: LoadedDraft,
    prompts: Sequence[Sequence[int]],
    options: EvaluationConfig,
    title: str = "evaluation",
) -> SpeculativeReport:
    """Speculative decoding of ``prompts`` beside plain decoding, at the first batch size, with a progress bar."""
    decoder = decoder_of(engine, tables, loaded, options, options.batch_sizes[0])
    with torch.inference_mode(), progress(title, len(prompts), "prompts") as bar:
        return decoder.evaluate(prompts, options.max_new_tokens, on_prompt=bar.update_to)


def decoder_of(
    engine: HFTargetEngine, tables: TargetTables, loaded: LoadedDraft, options: EvaluationConfig, batch_size: int
) -> SpeculativeDecoder:
    """The decoder that ``options`` describe. Refuses a tree of a draft that drafts none."""
    proposers = [loaded.algorithm.proposer(loaded.draft, tables) for _ in range(batch_size)]
    if options.tree is not None and not proposers[0].drafts_trees:
        tree = options.tree
        raise ConfigError(
            f"a tree was asked for (--tree {tree.top_k},{tree.depth},{tree.num_nodes} or evaluation.tree), but the "
            f"draft is of the algorithm {loaded.algorithm.name}, which drafts chains only; leave the tree out, or give "
            f"a draft of an algorithm that drafts trees (of those that ship: {' and '.join(TREE_ALGORITHMS)})"
        )
    return SpeculativeDecoder(
        engine,
        proposers,
        loaded.spec,
        options.num_proposals,
        sampling=sampling_of(options),
        tree=None if options.tree is None else TreeShape(**options.tree.model_dump()),
    )


def sampling_of(options: EvaluationConfig) -> Sampling | None:
    """How tokens are drawn, ``None`` for greedy decoding."""
    if not options.temperature:
        return None
    generator = torch.Generator().manual_seed(options.seed)
    return Sampling(options.temperature, generator, options.top_k, options.top_p)
