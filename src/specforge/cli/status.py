"""``specforge status``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from specforge.cli.output import AsJson, named, print_json, print_table

NAMES = {
    "run_dir": "run directory",
    "running": "running",
    "checkpoints": "checkpoints",
    "best": "best checkpoint",
    "position.step": "optimizer steps saved",
    "position.num_slots": "samples saved",
    "last_line": "last line of metrics.jsonl",
    "metrics.step": "optimizer step",
    "metrics.loss": "loss",
    "metrics.simulated_acc_len": "simulated accepted length",
    "metrics.accuracy_0": "accuracy, first token",
    "metrics.lr": "learning rate",
    "metrics.grad_norm": "gradient norm",
    "metrics.step_s": "seconds a step",
    "metrics.wait_s": "seconds waiting for features",
    "ledger.num_samples": "samples in the ledger",
    "ledger.num_leased": "being captured",
    "ledger.num_committed": "captured, not yet trained",
    "ledger.num_slots_trained": "samples trained",
    "ledger.num_quarantined": "samples set aside",
}
"""What a person is shown of a run; ``--json`` has all of it."""


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
        print_table("Status", named(found | {"last_line": _last_line(found["metrics"])}, NAMES))


def _last_line(metrics: dict[str, Any] | None) -> str | None:
    """When the newest metrics were written, in local time."""
    if metrics is None or "time_s" not in metrics:
        return None
    return datetime.fromtimestamp(metrics["time_s"]).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
