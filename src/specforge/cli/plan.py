"""``specforge plan``."""

from __future__ import annotations

from typing import Any

import typer

from specforge.cli.options import ConfigFile, Overrides
from specforge.cli.output import AsJson, print_json, print_table, shown_bytes
from specforge.config.load import load_run_config


def register(app: typer.Typer) -> None:
    app.command("plan", epilog="Example: specforge plan -c run.yaml topology=disaggregated --json")(plan)


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
    processes = planned.pop("processes")
    print_table("Plan", [(name, _shown(name, value)) for name, value in planned.items()])
    print_table("Processes", [(process["name"], _process(process)) for process in processes])


def _shown(name: str, value: Any) -> Any:
    return shown_bytes(value) if isinstance(value, int) and name.endswith("_bytes") else value


def _process(process: dict[str, Any]) -> str:
    where = f"{process['device']}, {process['threads']} thread(s), {shown_bytes(process['memory_bytes'])}"
    return f"{', '.join(process['roles'])} on {where}"
