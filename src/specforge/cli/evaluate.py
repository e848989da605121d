"""``specforge eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.cli.options import existing_file
from specforge.cli.output import AsJson, named, print_json, print_table
from specforge.config.load import section_from
from specforge.errors import UserError
from specforge.evaluation.config import EvaluationConfig
from specforge.inference.config import TargetConfig

DEFAULTS = EvaluationConfig()
NAMES = {
    "accepted_length_mean": "accepted length (tokens a round)",
    "acceptance_per_position": "acceptance by position",
    "num_rounds": "rounds",
    "lossless": "lossless",
    "num_prompts_compared": "prompts compared",
    "num_tokens_compared": "tokens compared",
    "num_mismatches": "mismatches",
    "num_near_ties": "near-ties",
    "tokens_per_second_speculative": "tokens per second, speculative",
    "tokens_per_second_plain": "tokens per second, plain",
    "speed_up": "speed-up",
    "distinct_4grams": "share of different 4-grams",
    "target": "target",
    "draft": "draft",
}
"""What a person is shown of an evaluation; ``--json`` has all of it."""


def register(app: typer.Typer) -> None:
    app.command(
        "eval",
        short_help="Measure a draft by real speculative decoding.",
        epilog="Example: specforge eval --target models/qwen3 --draft runs/chat --prompts held-out.jsonl",
    )(evaluate)


def evaluate(
    target: Annotated[Path, typer.Option("--target", help="Directory of the target.")],
    draft: Annotated[Path, typer.Option("--draft", help="A run, a checkpoint or an exported draft.")],
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            help="JSONL file in the formats of training data; what precedes the first answer is the prompt.",
        ),
    ],
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1, help="How many prompts to decode.")] = 32,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Tokens at the beginning of a plain text that are its prompt.")
    ] = 64,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens decoded after each prompt.")
    ] = 64,
    num_proposals: Annotated[
        int | None,
        typer.Option(
            "--num-proposals",
            min=1,
            show_default=str(DEFAULTS.num_proposals),
            help="Tokens that the draft proposes in a round, without --tree.",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Sample at this temperature; 0: greedy, checked lossless.")
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="With --temperature: sample among so many of the most likely tokens."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", min=0, max=1, help="With --temperature: sample from the smallest set with this probability."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, show_default=str(DEFAULTS.seed), help="With --temperature: seed of the sampling."
        ),
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(
            "--tree",
            metavar="TOP_K,DEPTH,NODES",
            help="Draft trees: children of a node, levels below the first, nodes with the root; for example 8,5,63.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a draft by real speculative decoding, and check that greedy output is the target's own."""
    sampling = {"top_k": top_k, "top_p": top_p, "seed": seed}
    unused = [f"--{name.replace('_', '-')}" for name, value in sampling.items() if value is not None]
    if unused and not temperature:
        raise UserError(
            f"{' and '.join(unused)} would do nothing, because decoding is greedy without a --temperature above 0; "
            f"add one, or leave out {' and '.join(unused)}"
        )
    if tree is not None and num_proposals is not None:
        raise UserError(
            f"--tree {tree} says how many tokens are proposed, and so does --num-proposals {num_proposals}; give one"
        )
    target_config = section_from(
        TargetConfig, "target", {"path": str(target), "dtype": "float32", "device": device}, Path.cwd()
    )
    values = {
        "prompts": str(existing_file(prompts, "--prompts")),
        "num_prompts": num_prompts,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "num_proposals": DEFAULTS.num_proposals if num_proposals is None else num_proposals,
        "temperature": temperature,
        **sampling,
        "seed": DEFAULTS.seed if seed is None else seed,
        "tree": None if tree is None else tree_shape(tree),
    }
    options = section_from(EvaluationConfig, "evaluation", values, Path.cwd())
    from specforge.launch.evaluate import evaluate_draft

    report = evaluate_draft(target_config, draft, options)
    if not report["num_rounds"]:
        typer.echo(f"warning: {no_round_counted(options)}", err=True)
    if as_json:
        print_json(report)
    else:
        print_table("Evaluation", named(report, NAMES))


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
