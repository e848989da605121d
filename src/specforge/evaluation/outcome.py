"""What an evaluation found, for every batch size and category: the records behind ``specforge eval --json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specforge.evaluation.report import DecodedPrompt, SpeculativeReport, summarise
from specforge.evaluation.speculative import Prompts, SpeculativeDecoder, first_mismatch

CHECKS = ("num_prompts_compared", "num_tokens_compared", "num_mismatches", "num_near_ties")
"""Counts of the comparison with plain decoding: the report's own are sums over the batch sizes."""


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """One batch size.

    ``num_changed``: prompts whose plain output differs from that at the first batch size, ``num_changed_near_ties``:
    those of them that a near-tie excuses; ``None`` at the first size and for sampled tokens.
    """

    batch_size: int
    report: SpeculativeReport
    by_category: dict[str, SpeculativeReport]
    num_changed: int | None = None
    num_changed_near_ties: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, with a short record of every prompt."""
        return {
            "batch_size": self.batch_size,
            **figures(self.report),
            "num_changed": self.num_changed,
            "num_changed_near_ties": self.num_changed_near_ties,
            "by_category": {name: figures(report) for name, report in self.by_category.items()},
        }


def measure(
    decoder: SpeculativeDecoder,
    prompts: Prompts,
    categories: Sequence[str],
    max_new_tokens: int,
    *,
    first: SpeculativeReport | None = None,
    on_prompt: Callable[[int], None] = lambda _done: None,
) -> BatchOutcome:
    """Decode ``prompts``, of a category each, in batches of the decoder's size; ``first``: of the first batch size."""
    report = decoder.evaluate(prompts, max_new_tokens, on_prompt)
    rows: dict[str, list[DecodedPrompt]] = {}
    for category, row in zip(categories, report.prompts, strict=True):
        rows.setdefault(category, []).append(row)
    by_category = {
        name: summarise(found, decoder.num_proposals, decoder.judged, whole_batches=decoder.batch_size == 1)
        for name, found in sorted(rows.items())
    }
    if first is None or not all(row.compared for row in report.prompts):
        return BatchOutcome(decoder.batch_size, report, by_category)
    changed = near_ties = 0
    for prompt, before, now in zip(prompts, first.prompts, report.prompts, strict=True):
        place = first_mismatch(before.plain_tokens, now.plain_tokens)
        if place is not None:
            changed += 1
            near_ties += decoder.is_near_tie(prompt, before.plain_tokens, now.plain_tokens, place)
    return BatchOutcome(decoder.batch_size, report, by_category, changed, near_ties)


def report_of(outcomes: Sequence[BatchOutcome], categories: Sequence[str]) -> dict[str, Any]:
    """The whole report as plain JSON data. Its own figures and ``by_category`` are those of the first batch size.

    ``lossless`` holds for all batch sizes, and the counts of the comparison are sums over them. ``batch_invariant``:
    plain output is the same at every batch size, up to near-ties; ``None`` where that is not judged.
    """
    first = outcomes[0]
    judged = [outcome.report.lossless for outcome in outcomes]
    changed = [(it.num_changed or 0) - (it.num_changed_near_ties or 0) for it in outcomes[1:]]
    total = figures(first.report)
    return {
        "batch_size": first.batch_size,
        **total,
        **{key: sum(figures(outcome.report)[key] for outcome in outcomes) for key in CHECKS},
        "lossless": None if None in judged else all(judged),
        "batch_invariant": None if None in judged or len(outcomes) == 1 else not any(changed),
        "by_category": {name: figures(report) for name, report in first.by_category.items()},
        "by_batch_size": {str(outcome.batch_size): outcome.to_dict() for outcome in outcomes},
        "prompts": [
            {"category": category, **_prompt_figures(place, outcomes)} for place, category in enumerate(categories)
        ],
    }


def figures(report: SpeculativeReport) -> dict[str, Any]:
    """A report without its prompts, but with their number."""
    found = report.to_dict()
    num_prompts = len(found.pop("prompts"))
    return {"num_prompts": num_prompts, **found}


def _prompt_figures(place: int, outcomes: Sequence[BatchOutcome]) -> dict[str, Any]:
    """Of one prompt, at the first batch size; ``equal``: its outputs are, or a near-tie excuses them, at every size."""
    rows = [outcome.report.prompts[place] for outcome in outcomes]
    row, rounds = rows[0], len(rows[0].accepted)
    return {
        "prompt_tokens": row.prompt_tokens,
        "new_tokens": len(row.speculative_tokens),
        "num_rounds": rounds,
        "accepted_length_mean": 1.0 + sum(row.accepted) / rounds if rounds else None,
        "plain_seconds": row.plain_seconds,
        "speculative_seconds": row.speculative_seconds,
        "equal": all(it.mismatch is None or it.near_tie for it in rows) if row.compared else None,
    }
