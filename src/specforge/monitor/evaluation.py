"""The report of ``specforge eval`` as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specforge.monitor.charts import NUM_COLOURS, Axes, Estimate, Series, bar_chart, interval_chart, line_chart, number
from specforge.monitor.page import render_page, write_page


def write_evaluation(path: Path, report: Mapping[str, Any], title: str) -> None:
    """Write the page to ``path``, whole or not at all. ``report``: what ``specforge eval --json`` prints."""
    write_page(path, render_evaluation(report, title))


def render_evaluation(report: Mapping[str, Any], title: str) -> str:
    """The page as text."""
    sizes: Mapping[str, Mapping[str, Any]] = report["by_batch_size"]
    categories: Mapping[str, Mapping[str, Any]] = report["by_category"]
    # more lines than there are colours cannot be told apart
    positions = list(categories.items()) if 1 < len(categories) <= NUM_COLOURS else []
    lines = [
        Series(name, _points(figures["acceptance_per_position"]), colour)
        for colour, (name, figures) in enumerate(positions)
    ]
    return render_page(
        "evaluation.html",
        title=title,
        first=report["batch_size"],
        cards=_cards(report),
        speed_chart=interval_chart(
            [_estimate(f"batch size {size}", figures, "speed_up") for size, figures in sizes.items()],
            Axes("batch size", "speed-up over plain decoding", 1.0),
        ),
        acceptance_chart=bar_chart(
            [(str(place + 1), share) for place, share in enumerate(report["acceptance_per_position"])],
            Axes("proposed token", "rounds that accepted it"),
        ),
        length_chart=interval_chart(
            [_estimate(name, figures, "accepted_length_mean") for name, figures in categories.items()],
            Axes("category", "accepted length", 1.0),
        ),
        num_categories=len(categories),
        lines=lines,
        line_chart=line_chart(lines, Axes("proposed token", "rounds that accepted it", 0.0, 1.0)),
        tables=[_table(size, figures) for size, figures in sizes.items()],
        facts=_facts(report),
    )


def _cards(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Label, value, what it is compared with, and a class that colours the value."""
    mean = report["accepted_length_mean"]
    length = _interval(report["accepted_length_ci95"]) or "no confidence interval"
    judged = {True: ("yes", "good"), False: ("NO", "bad")}.get(report["lossless"], ("not judged", ""))
    compared = f"{number(report['num_tokens_compared'])} tokens compared, {number(report['num_near_ties'])} near-ties"
    cards = [
        ("Accepted length", "-" if mean is None else f"{mean:.2f}", f"tokens a round; {length}", ""),
        ("Lossless", judged[0], compared, judged[1]),
    ]
    sizes = list(report["by_batch_size"].items())
    for size, figures in [sizes[0], *sizes[1:][-1:]]:
        speeds = f"{number(round(figures['tokens_per_second_speculative']))} against "
        speeds += f"{number(round(figures['tokens_per_second_plain']))} tokens per second"
        cards.append((f"Speed-up, batch size {size}", f"{figures['speed_up']:.2f}x", speeds, ""))
    return [dict(zip(("label", "value", "note", "kind"), card, strict=True)) for card in cards]


def _table(size: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The categories at one batch size, and the total as the last row."""
    categories = figures["by_category"] if len(figures["by_category"]) > 1 else {}
    return {"size": size, "rows": [*(_row(name, own) for name, own in categories.items()), _row("total", figures)]}


def _row(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    mean = figures["accepted_length_mean"]
    intervals = figures["acceptance_per_position_ci95"]
    return {
        "name": name,
        "num_prompts": number(figures["num_prompts"]),
        "num_rounds": number(figures["num_rounds"]),
        "length": "-" if mean is None else f"{mean:.2f}",
        "length_interval": _interval(figures["accepted_length_ci95"]),
        "speed_up": f"{figures['speed_up']:.2f}x" if figures["speed_up"] else "-",
        "speed_up_interval": _interval(figures["speed_up_ci95"]),
        "speculative": number(round(figures["tokens_per_second_speculative"])),
        "plain": number(round(figures["tokens_per_second_plain"])),
        "positions": [
            (f"{share:.2f}", _interval(interval))
            for share, interval in zip(figures["acceptance_per_position"], intervals, strict=True)
        ],
        "lossless": {True: "yes", False: "NO"}.get(figures["lossless"], "not judged"),
    }


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, and the counts that have no other place."""
    names = ("target", "draft", "num_rounds", "num_prompts_compared", "num_mismatches", "batch_invariant")
    found = {name: report[name] for name in (*names, "distinct_4grams")} | report["settings"]
    return [(name, _text(value)) for name, value in found.items()]


def _estimate(label: str, figures: Mapping[str, Any], key: str) -> Estimate:
    value = figures[key]
    return Estimate(label, value or float("nan"), figures[f"{key.removesuffix('_mean')}_ci95"])


def _points(shares: Sequence[float]) -> list[tuple[float, float]]:
    return [(place + 1.0, share) for place, share in enumerate(shares)]


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


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
        return ", ".join(map(_text, value))
    return str(value)
