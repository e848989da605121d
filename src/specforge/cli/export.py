"""``specforge export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.cli.output import AsJson, flat, print_json, print_table

FORMATS = ("sglang",)


def register(app: typer.Typer) -> None:
    app.command("export", epilog="Example: specforge export --checkpoint runs/chat --to sglang --out draft")(export)


def export(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="A checkpoint, or a run (its newest checkpoint).")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must not hold files.")],
    to: Annotated[str, typer.Option("--to", help=f"Serving format: {', '.join(FORMATS)}.")] = "sglang",
    as_json: AsJson = False,
) -> None:
    """Write a draft in the format that a serving engine loads, and check what was written."""
    if to not in FORMATS:
        raise typer.BadParameter(f"{to!r} is not one of {', '.join(FORMATS)}", param_hint="--to")
    from specforge.launch.export import export_draft

    written = export_draft(checkpoint, to, out)
    if as_json:
        print_json(written)
    else:
        print_table("Exported", flat(written))
