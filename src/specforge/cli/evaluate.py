"""``specforge eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from specforge.cli import evaluate_options as options
from specforge.cli.evaluate_table import print_evaluation
from specforge.cli.options import existing_file
from specforge.cli.output import AsJson, print_json
from specforge.config.load import section_from
from specforge.errors import UserError
from specforge.evaluation.config import EvaluationConfig
from specforge.inference.config import TargetConfig

DEFAULTS = options.DEFAULTS


def register(app: typer.Typer) -> None:
    app.command(
        "eval",
        short_help="Measure a draft by real speculative decoding.",
        epilog="Example: specforge eval --target models/qwen3 --draft runs/chat --prompts mt_bench/question.jsonl "
        "--batch-size 1,4 --html eval.html",
    )(evaluate)


def evaluate(
    target: options.Target,
    draft: options.Draft,
    prompts: options.Prompts,
    num_prompts: options.NumPrompts = DEFAULTS.num_prompts,
    prompt_tokens: options.PromptTokens = DEFAULTS.prompt_tokens,
    chat_template: options.ChatTemplate = None,
    as_text: options.AsText = False,
    max_new_tokens: options.MaxNewTokens = DEFAULTS.max_new_tokens,
    batch_size: options.BatchSizes = "1",
    num_proposals: options.NumProposals = None,
    temperature: options.Temperature = DEFAULTS.temperature,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    tree: options.Tree = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    trust_remote_code: options.TrustRemoteCode = False,
    html: options.Html = None,
    as_json: AsJson = False,
) -> None:
    """Measure a draft by real speculative decoding, and check that greedy output is the target's own."""
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    refuse_what_does_nothing(sampling, tree, num_proposals)
    template = None if chat_template is None else str(existing_file(chat_template, "--chat-template"))
    values = {
        "prompts": [str(existing_file(path, "--prompts")) for path in prompts],
        "num_prompts": num_prompts,
        "prompt_tokens": prompt_tokens,
        "chat_template": template,
        "as_text": as_text,
        "max_new_tokens": max_new_tokens,
        "batch_sizes": batch_sizes(batch_size),
        "num_proposals": DEFAULTS.num_proposals if num_proposals is None else num_proposals,
        **sampling,
        "seed": DEFAULTS.seed if seed is None else seed,
        "tree": None if tree is None else tree_shape(tree),
    }
    target_values = {"path": str(target), "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    decoding = section_from(EvaluationConfig, "evaluation", values, Path.cwd())
    target_config = section_from(TargetConfig, "target", target_values, Path.cwd())
    if html is not None:
        check_page(html)
    report = measured(target_config, draft, decoding)
    show(report, as_json)
    if html is not None:
        write_html(html, report, f"Evaluation of {draft.name}")


def measured(target: TargetConfig, draft: Path, decoding: EvaluationConfig) -> dict[str, Any]:
    """The report; a warning where it has no accepted length."""
    from specforge.launch.evaluate import evaluate_draft

    report = evaluate_draft(target, draft, decoding)
    if not report["num_rounds"]:
        typer.echo(f"warning: {no_round_counted(decoding)}", err=True)
    return report


def check_page(html: Path) -> None:
    """A :class:`UserError`, before anything is decoded, where the page could not be written."""
    if html.is_dir():
        raise UserError(f"--html {html} is a directory; give the name of a file")
    from specforge.monitor.page import check_writable

    try:
        check_writable(html)
    except OSError as error:
        raise UserError(f"--html {html} cannot be written ({error.strerror}); give another file") from None


def write_html(html: Path, report: dict[str, Any], title: str) -> None:
    """The page, after the report was printed: what was measured is never lost with it."""
    from specforge.monitor.evaluation import write_evaluation

    try:
        write_evaluation(html, report, title)
    except OSError as error:
        raise UserError(
            f"--html {html} could not be written ({error.strerror}); the report is on standard output"
        ) from None
    typer.echo(f"report: {html}", err=True)


def show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        print_evaluation(report)


def refuse_what_does_nothing(sampling: dict[str, Any], tree: str | None, num_proposals: int | None) -> None:
    """A :class:`UserError` for options that contradict each other."""
    unused = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "seed") if sampling[name] is not None]
    if unused and not sampling["temperature"]:
        raise UserError(
            f"{' and '.join(unused)} would do nothing, because decoding is greedy without a --temperature above 0; "
            f"add one, or leave out {' and '.join(unused)}"
        )
    if tree is not None and num_proposals is not None:
        raise UserError(
            f"--tree {tree} says how many tokens are proposed, and so does --num-proposals {num_proposals}; give one"
        )


def no_round_counted(options: EvaluationConfig) -> str:
    """Why an evaluation has no accepted length, and what to do."""
    proposals = options.num_proposals if options.tree is None else options.tree.depth + 1
    needed = proposals + 2  # the token of the prefill comes before the first round, the target's own ends a full one
    if options.max_new_tokens >= needed:
        return "every answer ended with its first token, so there is no accepted length; give other --prompts"
    fewer = "--num-proposals" if options.tree is None else "the depth of --tree"
    return (
        f"no round had room for {proposals} proposals, so there is no accepted length; raise --max-new-tokens from "
        f"{options.max_new_tokens} to at least {needed}, or lower {fewer}"
    )


def tree_shape(text: str) -> dict[str, int]:
    """``"8,5,63"`` as the keys of :class:`~specforge.evaluation.config.TreeConfig`."""
    numbers = text.split(",")
    if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers):
        raise UserError(f"--tree takes three whole numbers, TOP_K,DEPTH,NODES (for example 8,5,63), got {text!r}")
    top_k, depth, num_nodes = map(int, numbers)
    return {"top_k": top_k, "depth": depth, "num_nodes": num_nodes}


def batch_sizes(text: str) -> list[int]:
    """``"1,4,16"`` as numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--batch-size takes whole numbers from 1 up, as in 1 or 1,4,16, got {text!r}")
    return [int(part) for part in parts]
