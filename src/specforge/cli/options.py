"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The run file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted overrides of the run file, such as training.lr=3e-4."),
]


def existing_file(path: Path, option: str) -> Path:
    """``path`` made absolute, where it is a file; else a usage error that names ``option``."""
    if not path.is_file():
        raise typer.BadParameter(f"{path} is not a file", param_hint=option)
    return path.absolute()
