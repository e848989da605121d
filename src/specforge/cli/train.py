"""``specforge train``."""

from __future__ import annotations

from typing import Annotated

import typer

from specforge.cli.options import ConfigFile, Overrides
from specforge.cli.output import AsJson, named, print_json, print_table
from specforge.config.load import load_run_config

NAMES = {
    "run_dir": "run directory",
    "finished": "finished",
    "step": "optimizer steps",
    "num_slots": "samples trained",
    "ledger.num_unique_samples_trained": "different ones",
    "ledger.num_quarantined": "samples set aside",
    "draft_weights_sha256": "draft weights (sha256)",
}
"""What a person is shown of a run that ended; ``--json`` has all of it."""


def register(app: typer.Typer) -> None:
    app.command("train", epilog="Example: specforge train -c run.yaml training.lr=3e-4 topology=disaggregated")(train)


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in run_dir from its last checkpoint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a draft as a run file says."""
    run = load_run_config(config, overrides or [])
    from specforge.launch import local

    outcome = local.train(run, resume=resume).to_dict()
    found = {"run_dir": str(run.run_dir), **outcome}
    if local.speaks_for_the_run():
        if as_json:
            print_json(found)
        else:
            print_table("Trained", named(found, NAMES))
    local.leave_as_rank()
