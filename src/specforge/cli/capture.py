"""``specforge capture``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from specforge.cli.options import ConfigFile, Overrides
from specforge.cli.output import AsJson, named, print_json, print_table
from specforge.config.load import load_run_config
from specforge.config.run import RunConfig
from specforge.prompts.config import PATH_ONLY

NAMES = {
    "path": "directory",
    "num_samples": "samples",
    "num_captured": "captured now",
    "num_kept": "captured before",
    "num_failed": "failed",
    "total_bytes": "features",
    "aux_layers": "captured layers",
    "capture_dtype": "captured as",
    "target_revision": "target revision",
}
"""What a person is shown of a feature set; ``--json`` has all of it."""


def register(app: typer.Typer) -> None:
    app.command(
        "capture",
        short_help="Capture features once, to train on them many times.",
        epilog="Example: specforge capture -c run.yaml --to features/chat; then "
        "specforge train -c run.yaml data.path=null data.features=features/chat",
    )(capture)


def capture(
    config: ConfigFile,
    to: Annotated[Path, typer.Option("--to", help="Directory of the feature set: new, empty, or one to go on with.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the target over the prompts of a run file once and keep the features.

    The same command goes on with a capture that was interrupted.
    """
    run = load_run_config(config, overrides or [])
    from specforge.launch.capture import capture as run_capture

    captured = run_capture(run, to.absolute())
    if as_json:
        print_json(captured)
    else:
        print_table("Captured", named(captured, NAMES))
        given = " ".join([*(overrides or []), *_resets(run), "data.path=null", f"data.features={captured['path']}"])
        typer.echo(f"train on it: specforge train -c {config} {given}")


def _resets(run: RunConfig) -> list[str]:
    """Overrides that take back how ``data.path`` was read."""
    fields = type(run.data).model_fields
    changed = [name for name in PATH_ONLY if getattr(run.data, name) != fields[name].default]
    return [f"data.{name}={json.dumps(fields[name].default).strip(chr(34))}" for name in changed]
