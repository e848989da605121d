"""``specforge plan``."""

from __future__ import annotations

from typing import Any

import typer

from specforge.cli.options import ConfigFile, Overrides
from specforge.cli.output import AsJson, named, print_json, print_table, shown_bytes
from specforge.config.load import load_run_config

NAMES = {
    "run_dir": "run directory",
    "topology": "topology",
    "num_train_ranks": "train ranks",
    "step_samples": "samples of a step on each of them",
    "ranks_a_sample": "train ranks that share a sample",
    "ranks_a_copy": "train ranks that share a copy of the training state",
    "num_samples": "samples",
    "total_slots": "samples x epochs",
    "total_steps": "optimizer steps",
    "aux_layers": "captured layers",
    "capture_dtype": "captured as",
    "store": "feature store",
    "store_capacity_bytes": "size of the store",
    "transfer_bytes": "transfer buffer of a process",
    "retain_memory_bytes": "kept for later epochs in memory",
    "retain_file_bytes": "kept for later epochs in files",
    "order": "order",
    "window_slots": "samples captured ahead",
    "window_bytes": "their features, at most",
    "release": "features are released",
    "resident_bytes.at_step": "resident, released at_step",
    "resident_bytes.at_checkpoint": "resident, released at_checkpoint",
    "max_sample_bytes": "largest sample",
    "total_feature_bytes": "features of the whole run",
    "ledger": "ledger",
    "ledger_path": "ledger file",
    "ledger_url": "ledger database",
    "ledger_name": "ledger schema",
    "servers": "capture servers",
    "target_bytes": "target weights",
    "draft_parameters": "draft parameters",
}
"""What a person is shown of a plan; ``--json`` has all of it."""


def register(app: typer.Typer) -> None:
    app.command(
        "plan",
        short_help="Print what a run file would run and cost.",
        epilog="Example: specforge plan -c run.yaml topology=disaggregated --json",
    )(plan)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print what a run file would run, and what it would cost, without running it."""
    run = load_run_config(config, overrides or [])
    from specforge.launch.inputs import read_run_inputs

    planned = read_run_inputs(run).plan.to_dict()
    if as_json:
        print_json({"plan": planned, "config": run.model_dump(mode="json")})
        return
    print_table("Plan", named(planned, NAMES))
    print_table("Processes", [(process["name"], _process(process)) for process in planned["processes"]])
    if planned["warnings"]:
        print_table("Warnings", [("", warning) for warning in planned["warnings"]])


def _process(process: dict[str, Any]) -> str:
    threads = "1 thread" if process["threads"] == 1 else f"{process['threads']} threads"
    size = shown_bytes(process["memory_bytes"])
    return f"{' + '.join(process['roles'])}; device {process['device']}, {threads}, {size} and the runtime"
