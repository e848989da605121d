"""A run's report as one HTML file that opens anywhere: no script, no network, everything escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specforge.monitor.charts import Axes, Series, bar_chart, line_chart, number, share_bar
from specforge.monitor.page import render_page, write_page

MAX_POINTS = 800
NUM_TABLE_ROWS = 16
HEADLINE_KEYS = frozenset(
    {
        "accepted_length_mean",
        "accepted_length_untrained",
        "acceptance_per_position",
        "lossless",
        "num_prompts_compared",
        "tokens_per_second_plain",
        "tokens_per_second_speculative",
        "wall_seconds",
        "configuration",
    }
)
"""Keys of a report that have a place of their own; every other one is a row of the table of figures."""


def write_report(
    path: Path, report: Mapping[str, Any], training_curve: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Write the page to ``path``, whole or not at all.

    ``report`` is what ``report.json`` holds (all keys optional; ``configuration`` may be a nested mapping);
    ``training_curve`` has one record a step: ``step``, ``loss``, ``accuracy_0`` .., ``simulated_acc_len``.
    """
    write_page(path, render_report(report, training_curve, title))


def render_report(report: Mapping[str, Any], training_curve: Sequence[Mapping[str, Any]], title: str) -> str:
    """The page as text."""
    accuracies = _accuracy_series(training_curve)
    return render_page(
        "report.html",
        title=title,
        headlines=_headlines(report),
        loss_chart=line_chart(_averaged(training_curve, "loss"), Axes("optimizer step", "training loss")),
        accuracy_chart=line_chart(accuracies, Axes("optimizer step", "accuracy per position", 0.0, 1.0)),
        accuracies=accuracies,
        length_chart=line_chart(
            _averaged(training_curve, "simulated_acc_len"),
            Axes("optimizer step", "simulated accepted length", 1.0),
        ),
        acceptance_chart=bar_chart(
            [(str(i + 1), float(share)) for i, share in enumerate(report.get("acceptance_per_position") or ())],
            Axes("proposed token", "rounds that accepted it"),
        ),
        phases=_phases(report.get("wall_seconds") or {}),
        figures=[(key, _text(value)) for key, value in report.items() if key not in HEADLINE_KEYS],
        configuration=_flat(report.get("configuration") or {}),
        curve=_curve_table(training_curve),
    )


def _headlines(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Cards: label, value, what it is compared with, and a class that colours the value."""
    cards: list[dict[str, str]] = []
    trained, untrained = report.get("accepted_length_mean"), report.get("accepted_length_untrained")
    if "accepted_length_mean" in report:
        note = "tokens a verification round" if untrained is None else f"untrained draft: {untrained:.2f}"
        if trained is None:
            note = "no verification round counted"
        value = "-" if trained is None else f"{trained:.2f}"
        cards.append({"label": "Accepted length", "value": value, "note": note, "kind": ""})
    plain, fast = report.get("tokens_per_second_plain"), report.get("tokens_per_second_speculative")
    if plain and fast is not None:
        note = f"{number(round(fast))} against {number(round(plain))} tokens per second"
        cards.append({"label": "Speed-up", "value": f"{fast / plain:.2f}x", "note": note, "kind": ""})
    if "lossless" in report:
        value, kind = {True: ("yes", "good"), False: ("NO", "bad")}.get(report["lossless"], ("not judged", ""))
        count = report.get("num_prompts_compared")
        note = "output equals plain decoding" if count is None else f"{number(count)} prompts compared token by token"
        cards.append({"label": "Lossless", "value": value, "note": note, "kind": kind})
    wall = report.get("wall_seconds") or {}
    if wall:
        seconds = _total(wall)
        cards.append({"label": "Wall time", "value": _duration(seconds), "note": f"{seconds:.1f} s", "kind": ""})
    return cards


def _averaged(curve: Sequence[Mapping[str, Any]], key: str) -> list[Series]:
    """The values of the steps, faint, and their moving average over them."""
    points = _points(curve, key)
    return [Series("each step", points, faint=True), Series("moving average", _smoothed(points))]


def _accuracy_series(curve: Sequence[Mapping[str, Any]]) -> list[Series]:
    names = sorted(
        {key for record in curve for key in record if key.startswith("accuracy_") and key[9:].isdigit()},
        key=lambda key: int(key[9:]),
    )
    return [
        Series(f"position {int(name[9:]) + 1}", _smoothed(_points(curve, name)), colour)
        for colour, name in enumerate(names)
    ]


def _points(curve: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value), averaged in groups of neighbours where there are more steps than a chart can show."""
    points = [
        (float(record["step"]), float(record[key]))
        for record in curve
        if record.get(key) is not None and math.isfinite(record[key])
    ]
    group = -(-len(points) // MAX_POINTS)
    if group <= 1:
        return points
    groups = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving average over a twentieth of the points."""
    half = len(points) // 40
    smooth = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - half) : index + half + 1]
        smooth.append((x, sum(y for _, y in near) / len(near)))
    return smooth


def _phases(wall_seconds: Mapping[str, Any]) -> list[dict[str, Any]]:
    total = _total(wall_seconds) or 1.0
    return [
        {
            "name": name,
            "seconds": f"{seconds:.1f}",
            "share": f"{seconds / total:.0%}",
            "bar": share_bar(seconds / total),
        }
        for name, seconds in wall_seconds.items()
        if name != "total"
    ]


def _total(wall_seconds: Mapping[str, Any]) -> float:
    """A phase called ``total`` is the sum of the others, not one more."""
    return float(wall_seconds.get("total", sum(wall_seconds.values())))


def _curve_table(curve: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Every column at evenly spaced steps, the first and the last among them."""
    if not curve:
        return {"columns": [], "rows": []}
    count = min(NUM_TABLE_ROWS, len(curve))
    chosen = sorted({round(i * (len(curve) - 1) / max(1, count - 1)) for i in range(count)})
    columns = [key for key in curve[-1] if key not in ("step", "time_s")]
    rows = [[_text(curve[i]["step"]), *(_text(curve[i].get(key)) for key in columns)] for i in chosen]
    return {"columns": ["step", *columns], "rows": rows}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys, as they are written in overrides."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _text(value)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
