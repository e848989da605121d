"""``specforge demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.algorithms.catalog import ALGORITHMS, algorithm_names
from specforge.cli.output import AsJson, print_json


def register(app: typer.Typer) -> None:
    app.command(
        "demo",
        short_help="Train, measure and export a draft here, in minutes.",
        epilog="Example: specforge demo --out runs/demo --topology disaggregated",
    )(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory of the demo.")] = Path("runs/demo"),
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything drawn.  [default: 0]")
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option("--topology", help="colocated (one process) or disaggregated (two).  [default: colocated]"),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option("--algorithm", help=f"Draft algorithm: {', '.join(ALGORITHMS)}.  [default: eagle3]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the demo in --out.")] = False,
    train_target: Annotated[
        bool | None, typer.Option("--train-target", help="Train the target too, instead of the one shipped.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train, measure and export a real draft on this machine: one command, a few minutes, no network."""
    for option, value, choices in (
        ("--topology", topology, ("colocated", "disaggregated")),
        ("--algorithm", algorithm, algorithm_names()),
    ):
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=option)
    from specforge.demo.run import DemoOptions, run_demo

    report = run_demo(
        DemoOptions(
            out=out, seed=seed, topology=topology, algorithm=algorithm, resume=resume, train_target=train_target
        )
    )
    if as_json:
        print_json(report)
