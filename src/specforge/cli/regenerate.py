"""``specforge regenerate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.cli.options import ConfigFile, Overrides
from specforge.cli.output import AsJson, named, print_json, print_table
from specforge.config.load import load_run_config

NAMES = {
    "path": "file",
    "num_samples": "samples",
    "num_generated": "answered now",
    "num_kept": "answered before",
    "num_tokens": "tokens",
    "num_loss_tokens": "tokens of answers",
    "target_revision": "target revision",
}
"""What a person is shown of the file; ``--json`` has all of it."""


def register(app: typer.Typer) -> None:
    app.command(
        "regenerate",
        short_help="Let the target answer prompts, into a file to train on.",
        epilog="Example: specforge regenerate -c run.yaml --to answers.jsonl data.generate.temperature=0.8; then "
        "specforge train -c run.yaml data.path=answers.jsonl data.generate=null",
    )(regenerate)


def regenerate(
    config: ConfigFile,
    to: Annotated[Path, typer.Option("--to", help="The file of answers: a new one, or one to go on with.")],
    overrides: Overrides = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            min=1,
            help="Prompts that the target answers together where it is greedy: faster, but near-ties may fall "
            "otherwise than in a run that generates while it trains.",
        ),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Let the target answer the prompts of a run file with data.generate, and keep the answers as tokens.

    The same command goes on with one that was interrupted.
    """
    run = load_run_config(config, overrides or [])
    from specforge.launch.regenerate import regenerate as run_regenerate

    written = run_regenerate(run, to.absolute(), batch_size)
    if as_json:
        print_json(written)
    else:
        print_table("Answered", named(written, NAMES))
        read_as = [] if run.data.format == "auto" else ["data.format=auto"]
        given = " ".join([*(overrides or []), *read_as, "data.generate=null", f"data.path={written['path']}"])
        typer.echo(f"train on it: specforge train -c {config} {given}")
