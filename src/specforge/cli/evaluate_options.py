"""The options of ``specforge eval``, a line of help each; :mod:`specforge.cli.evaluate` says what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.evaluation.config import EvaluationConfig

DEFAULTS = EvaluationConfig()

Target = Annotated[Path, typer.Option("--target", help="Directory of the target.")]
Draft = Annotated[Path, typer.Option("--draft", help="A run, a checkpoint or an exported draft.")]
Prompts = Annotated[
    list[Path],
    typer.Option(
        "--prompts",
        help="File of questions (MT-Bench, GSM8K, HumanEval, Alpaca) or of training samples, whose "
        "prompt is what precedes the first answer. May be given several times.",
    ),
]
NumPrompts = Annotated[
    int,
    typer.Option("--num-prompts", min=1, help="How many prompts of each file: the first of its categories in turn."),
]
PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", min=1, help="Tokens at the beginning of a plain text that are its prompt.")
]
ChatTemplate = Annotated[
    Path | None, typer.Option("--chat-template", help="File with a chat template that replaces the target's own.")
]
AsText = Annotated[bool, typer.Option("--as-text", help="Ask without a chat template, as base models want it.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens decoded after each prompt.")]
BatchSizes = Annotated[
    str,
    typer.Option(
        "--batch-size", metavar="N[,N...]", help="Prompts decoded together; several sizes are measured one by one."
    ),
]
NumProposals = Annotated[
    int | None,
    typer.Option(
        "--num-proposals",
        min=1,
        show_default=str(DEFAULTS.num_proposals),
        help="Tokens that the draft proposes in a round, without --tree.",
    ),
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="Sample at this temperature; 0: greedy, checked lossless.")
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", min=1, help="With --temperature: sample among so many of the most likely tokens."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", min=0, max=1, help="With --temperature: sample from the smallest set with this probability."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, show_default=str(DEFAULTS.seed), help="With --temperature: seed of the sampling."),
]
Tree = Annotated[
    str | None,
    typer.Option(
        "--tree",
        metavar="TOP_K,DEPTH,NODES",
        help="Draft trees: children of a node, levels below the first, nodes with the root; for example 8,5,63.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="float32, bfloat16, float16 or auto; only in float32 is lossless output judged."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the target's own Python code, from its directory.")
]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write the report as one HTML page.")]
