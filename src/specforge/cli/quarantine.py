"""``specforge quarantine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.cli.output import AsJson, print_json, print_table
from specforge.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command("quarantine", epilog="Example: specforge quarantine runs/chat --retry prompt-17")(quarantine)


def quarantine(
    run_dir: Annotated[Path, typer.Argument(help="The directory of a run (run_dir).")],
    retry: Annotated[
        list[str] | None, typer.Option("--retry", metavar="SAMPLE_ID", help="Train on this prompt again; repeatable.")
    ] = None,
    retry_all: Annotated[bool, typer.Option("--retry-all", help="Train on all of them again.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the prompts that a run set aside and why, or give them another chance when the run is resumed."""
    from specforge.launch.ledger import list_quarantined, retry_quarantined

    if retry and retry_all:
        raise ConfigError("--retry and --retry-all exclude each other: give one of them")
    if retry or retry_all:
        retried = retry_quarantined(run_dir, None if retry_all else retry)
        if as_json:
            print_json({"run_dir": run_dir, "retried": retried})
        else:
            prompts = "1 prompt" if len(retried) == 1 else f"{len(retried)} prompts"
            typer.echo(f"{prompts} will be trained again: specforge train -c {run_dir / 'resolved.yaml'} --resume")
        return
    found = list_quarantined(run_dir)
    if as_json:
        print_json({"run_dir": run_dir, "quarantined": found})
    elif not found:
        typer.echo(f"no prompt is set aside in {run_dir}")
    for item in [] if as_json else found:
        name = item["sample_id"] or f"prompt {item['index']}"
        print_table(f"{name} (skipped from slot {item['from_slot']:,} on)", [("why", item["reason"])])
