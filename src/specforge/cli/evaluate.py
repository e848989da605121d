"""``specforge eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.cli.options import existing_file
from specforge.cli.output import AsJson, flat, print_json, print_table
from specforge.config.load import section_from
from specforge.evaluation.config import EvaluationConfig
from specforge.inference.config import TargetConfig


def register(app: typer.Typer) -> None:
    app.command(
        "eval", epilog="Example: specforge eval --target models/qwen3 --draft runs/chat --prompts held-out.jsonl"
    )(evaluate)


def evaluate(
    target: Annotated[Path, typer.Option("--target", help="Directory of the target.")],
    draft: Annotated[Path, typer.Option("--draft", help="A run, a checkpoint or an exported draft.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="JSONL file of prompts.")],
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="How many prompts to decode.")] = 32,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Prompt length cut from plain texts.")
    ] = 64,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens decoded after each prompt.")
    ] = 64,
    num_proposals: Annotated[
        int, typer.Option("--num-proposals", min=1, help="Tokens that the draft proposes in a round.")
    ] = 5,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a draft by real speculative decoding, and check that the output is the target's own."""
    target_config = section_from(
        TargetConfig, "target", {"path": str(target), "dtype": "float32", "device": device}, Path.cwd()
    )
    options = EvaluationConfig(
        prompts=existing_file(prompts, "--prompts"),
        num_prompts=num_prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        num_proposals=num_proposals,
    )
    from specforge.launch.evaluate import evaluate_draft

    report = evaluate_draft(target_config, draft, options)
    if as_json:
        print_json(report)
    else:
        print_table("Evaluation", flat(report))
