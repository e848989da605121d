"""``specforge eval`` and the demo's evaluation: a draft and its target decode real prompts together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from specforge.algorithms.base import Sampling, TargetTables, TreeShape
from specforge.contracts.capture import TargetInfo
from specforge.errors import ConfigError, DataError
from specforge.evaluation.config import EvaluationConfig
from specforge.evaluation.outcome import BatchOutcome, measure, report_of
from specforge.evaluation.report import SpeculativeReport
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.export.artifact import PROVENANCE_KEY, WEIGHTS, read_config
from specforge.inference.config import TargetConfig
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.target import load_tokenizer, read_target_info
from specforge.launch.drafts import LoadedDraft, find_checkpoint, load_draft
from specforge.launch.inputs import resolve_device, resolve_dtype
from specforge.monitor.console import progress
from specforge.prompts.questions import Prompt, QuestionEncoder, chosen_in_turn, read_questions
from specforge.training.checkpoint import read_state

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
    prompts = load_prompts(options, load_tokenizer(target.path, target.trust_remote_code), info)
    check_batch_sizes(options.batch_sizes, len(prompts))
    dtype = str(resolve_dtype(target.dtype, device)).removeprefix("torch.")
    engine = HFTargetEngine(info, dtype, device, target.trust_remote_code)
    # a run that is still going on writes newer checkpoints meanwhile
    source = find_checkpoint(draft) if draft.is_dir() and not (draft / WEIGHTS).exists() else draft
    loaded = load_draft(source, info, engine.tables)
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
        "draft_step": _step_of(source),
        "target_revision": info.revision,
        "dtype": dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }
    report = report_of(outcomes, categories)
    for row, prompt in zip(report["prompts"], prompts, strict=True):
        row.update(file=prompt.file, line=prompt.line)
    return report | {"target": info.path, "draft": str(draft), "settings": settings}


def _step_of(source: Path) -> int | None:
    """The optimizer step of a checkpoint, or of the one that an export was made of (``None``: it does not say)."""
    if not (source / WEIGHTS).exists():
        return read_state(source).position.step
    training = read_config(source)[PROVENANCE_KEY].get("training")
    return None if training is None else int(training["step"])


def check_batch_sizes(batch_sizes: Sequence[int], num_prompts: int) -> None:
    """Refuse a batch that could never be full: its figures would be those of a smaller one."""
    if max(batch_sizes) > num_prompts:
        raise ConfigError(
            f"a batch size of {max(batch_sizes)} was asked for, but there are {num_prompts} prompts to decode; give at "
            "least as many prompts as the largest batch has (--num-prompts or evaluation.num_prompts, for each file), "
            "or smaller batches (--batch-size or evaluation.batch_sizes)"
        )


def load_prompts(options: EvaluationConfig, tokenizer: Any, target: TargetInfo) -> list[Prompt]:
    """The prompts of all files. One that leaves no room for its answer in the target's positions is left out, with a
    warning.

    Raises :class:`DataError`, also where no prompt is left, and :class:`ConfigError` for a file that is given twice.
    """
    max_tokens = target.max_position_embeddings
    encoder = QuestionEncoder(tokenizer, options.prompt_tokens, options.chat_template, options.as_text)
    prompts: list[Prompt] = []
    num_long = 0
    for path, category in zip(options.prompts, default_categories(options.prompts), strict=True):
        for question in chosen_in_turn(read_questions(path, category), options.num_prompts):
            try:
                ids = encoder.encode(question)
                _check_ids(ids, target.vocab_size)
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


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise DataError("the prompt has no tokens; expected at least one")
    if max(ids) >= vocab_size or min(ids) < 0:
        raise DataError(
            f"the prompt has the token id {max(ids) if max(ids) >= vocab_size else min(ids)}, but the target has a "
            f"vocabulary of {vocab_size} tokens; give prompts for this target, with its own tokenizer"
        )


def default_categories(files: Sequence[Path]) -> list[str]:
    """The category of each file's prompts that name none: the file's name without its ending, and with as much before
    and behind it as tells the files apart. A file that is given twice is a :class:`ConfigError`.
    """
    times = Counter(path.resolve() for path in files)
    if twice := [path for path in files if times[path.resolve()] > 1]:
        raise ConfigError(f"{twice[0]} is given twice (also as {twice[1]}), which would count its prompts twice")
    longer: tuple[Callable[[Path], str], ...] = (
        lambda path: f"{path.absolute().parent.name}/{path.stem}",
        lambda path: str(path.absolute()),
    )
    names = [path.stem for path in files]
    for form in longer:
        counts = Counter(names)
        names = [form(path) if counts[name] > 1 else name for path, name in zip(files, names, strict=True)]
    return names


def decode(
    engine: HFTargetEngine,
    tables: TargetTables,
    loaded: LoadedDraft,
    prompts: Sequence[Sequence[int]],
    options: EvaluationConfig,
    title: str = "evaluation",
) -> SpeculativeReport:
    """Speculative decoding of ``prompts`` beside plain decoding, at the first batch size, with a progress bar."""
    check_batch_sizes(options.batch_sizes[:1], len(prompts))
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
