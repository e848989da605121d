"""Results on standard output: a table for a person, or JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of a table.")]


PLAIN_WIDTH = 200
"""Columns of text where the output is a file or a pipe."""


def print_json(value: Any) -> None:
    """Indented JSON; a number that is not finite becomes ``null``, a path its text."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False, default=str))


def print_table(title: str, rows: Iterable[tuple[str, Any]]) -> None:
    """Two columns: a name and its value."""
    table = Table(title=title, show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, shown(value))
    Console(markup=False, highlight=False, emoji=False).print(table)


def print_columns(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with a header: the first column is of names, the others are of figures. Off a terminal it is not cut."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for place, name in enumerate(header):
        table.add_column(name, style="" if place else "bold", justify="right" if place else "left", no_wrap=place > 0)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    console.print(table)


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted rows, in order."""
    rows: list[tuple[str, Any]] = []
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            rows += flat(item, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", item))
    return rows


def named(value: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, Any]]:
    """Rows of ``flat(value)`` that ``names`` (dotted key -> words) lists, in its order; sizes have a unit (``_bytes``).

    Keys that ``value`` lacks are left out.
    """
    found = dict(flat(value))
    return [
        (words, shown_bytes(found[key]) if "_bytes" in key and isinstance(found[key], int) else found[key])
        for key, words in names.items()
        if key in found
    ]


def shown(value: Any) -> str:
    """A value in a table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items()) or "-"
    return str(value)


def shown_bytes(count: int) -> str:
    """``count`` bytes with a binary unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
