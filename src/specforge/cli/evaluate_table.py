"""The tables that ``specforge eval`` prints for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specforge.cli.output import named, print_columns, print_table, shown

NAMES = {
    "accepted_length_mean": "accepted length (tokens a round)",
    "num_rounds": "rounds",
    "lossless": "lossless",
    "batch_invariant": "same output at every batch size",
    "num_prompts_compared": "prompts compared",
    "num_tokens_compared": "tokens compared",
    "num_mismatches": "mismatches",
    "num_near_ties": "near-ties",
    "distinct_4grams": "share of different 4-grams",
    "target": "target",
    "draft": "draft",
}
"""What is said once; ``--json`` has all of it."""

HEADER = ("", "prompts", "accepted length", "speed-up", "tokens/s", "plain", "acceptance by position")


def print_evaluation(report: Mapping[str, Any]) -> None:
    """The facts of a report, and a table of its categories for every batch size."""
    print_table(
        "Evaluation", [row for row in named(report, NAMES) if row[0] != NAMES["batch_invariant"] or row[1] is not None]
    )
    for batch_size, outcome in report.get("by_batch_size", {}).items():
        print()
        categories = outcome["by_category"] if len(outcome["by_category"]) > 1 else {}
        print_columns(
            f"Batch size {batch_size} (with 95 % confidence intervals)",
            HEADER,
            [*(_row(name, figures) for name, figures in categories.items()), _row("total", outcome)],
        )


def _row(name: str, figures: Mapping[str, Any]) -> Sequence[str]:
    return (
        name,
        shown(figures["num_prompts"]),
        with_interval(figures["accepted_length_mean"], figures["accepted_length_ci95"]),
        with_interval(figures["speed_up"] or None, figures["speed_up_ci95"], "x"),
        f"{figures['tokens_per_second_speculative']:,.0f}",
        f"{figures['tokens_per_second_plain']:,.0f}",
        " ".join(f"{share:.2f}" for share in figures["acceptance_per_position"]) or "-",
    )


def with_interval(value: float | None, interval: Sequence[float] | None, unit: str = "") -> str:
    """``2.31 (2.10 to 2.52)``, and ``2.31 (-)`` without an interval."""
    if value is None:
        return "-"
    return f"{value:.2f}{unit} ({'-' if interval is None else f'{interval[0]:.2f} to {interval[1]:.2f}'})"
