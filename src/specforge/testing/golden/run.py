"""Which vector is run by what, and the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from specforge.testing.golden.dflash import run_dflash
from specforge.testing.golden.domino import run_domino
from specforge.testing.golden.dspark import run_dspark
from specforge.testing.golden.eagle3 import run_eagle3
from specforge.testing.golden.peagle import run_peagle
from specforge.testing.golden.report import Comparison, InputsAbsent, NotBuilt, Status, print_table
from specforge.testing.golden.schedule import run_schedule
from specforge.testing.golden.tables import run_tables
from specforge.testing.golden.traces import run_inference
from specforge.testing.golden.vectors import Vector, find_vectors, read_vector

REPORT_WIDTH = 160
"""Columns of the table where the output is not a terminal."""

FAMILIES: dict[str, Callable[[Vector, Comparison], None]] = {
    "inference": run_inference,
    "eagle3": run_eagle3,
    "dflash": run_dflash,
    "schedule": run_schedule,
    "domino": run_domino,
    "dspark": run_dspark,
    "peagle": run_peagle,
}


def _runner(family: str) -> Callable[[Vector, Comparison], None]:
    if family not in FAMILIES:
        raise NotBuilt(f"no runner for the family {family!r}")
    return FAMILIES[family]


def run_vector(path: Path, name: str) -> list[Comparison]:
    """The results of one file: one, or one for each part of a file of tables."""
    result = Comparison(name)
    try:
        vector = read_vector(path)
        if isinstance(vector.facts.get("values"), dict):
            return run_tables(vector, name)
        _runner(vector.family)(vector, result)
        expected = {key for key in vector.tensors if key.startswith(("out.", "grad."))}
        return [result.finish(expected)]
    except NotBuilt as reason:
        result.status, result.note = Status.NOT_BUILT, str(reason)
    except InputsAbsent as reason:
        result.status, result.note = Status.NO_INPUTS, str(reason)
    except Exception as error:  # noqa: BLE001 - one vector that cannot be run must not hide the others
        result.status, result.note = Status.FAILED, f"{type(error).__name__}: {error}"
    return [result]


def run_directory(directory: Path) -> list[Comparison]:
    """Every vector below ``directory``."""
    return [
        result
        for path in find_vectors(directory)
        for result in run_vector(path, str(path.relative_to(directory).with_suffix("")))
    ]


def is_failure(result: Comparison, strict: bool) -> bool:
    return result.status in {Status.OVER, Status.FAILED} or (strict and result.status is Status.NOT_BUILT)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m specforge.testing.golden", description="Compare with the golden vectors below a directory."
    )
    parser.add_argument("directory", type=Path, help="folder with vectors, at any depth")
    parser.add_argument("--strict", action="store_true", help="fail on vectors of what is not built yet")
    options = parser.parse_args(arguments)
    if not options.directory.is_dir():
        parser.error(f"{options.directory} is not a directory")
    results = run_directory(options.directory)
    if not results:
        parser.error(f"{options.directory} has no vectors (.json files)")
    console = Console() if sys.stdout.isatty() else Console(width=REPORT_WIDTH)
    print_table(console, results)
    counts = {status: sum(result.status is status for result in results) for status in Status}
    console.print(", ".join(f"{count} {status.value}" for status, count in counts.items() if count))
    sys.exit(any(is_failure(result, options.strict) for result in results))
