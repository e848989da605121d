"""``specforge status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.cli.output import AsJson, flat, print_json, print_table


def register(app: typer.Typer) -> None:
    app.command("status", epilog="Example: specforge status runs/chat --json")(status)


def status(
    run_dir: Annotated[Path, typer.Argument(help="The directory of a run (run_dir).")],
    as_json: AsJson = False,
) -> None:
    """Say how far the run in a directory is."""
    from specforge.launch.status import run_status

    found = run_status(run_dir)
    if as_json:
        print_json(found)
    else:
        print_table("Status", flat(found))
