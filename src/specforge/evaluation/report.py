"""SpeculativeReport: the figures of speculative decoding, and how they follow from the decoded prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from specforge.evaluation.statistics import Bootstrap, Interval


@dataclass(frozen=True, slots=True)
class DecodedPrompt:
    """One prompt decoded both ways, in the batch of number ``batch``, whose prompts share its seconds.

    ``accepted``: accepted proposals of each round that counts. ``compared``: whether the outputs are meant to be equal
    (they are not where tokens are sampled). ``mismatch``: index of the first new token in which they differ, ``None``
    for equal ones and for those not compared; ``near_tie``: that difference is excused.
    """

    prompt_tokens: int
    batch: int
    plain_tokens: tuple[int, ...]
    speculative_tokens: tuple[int, ...]
    plain_seconds: float
    speculative_seconds: float
    accepted: tuple[int, ...]
    mismatch: int | None
    near_tie: bool
    compared: bool = True

    @property
    def num_compared_tokens(self) -> int:
        """Tokens up to the first difference; all of them without one, none where nothing is compared."""
        if not self.compared:
            return 0
        return len(self.plain_tokens) if self.mismatch is None else self.mismatch


@dataclass(frozen=True, slots=True)
class SpeculativeReport:
    """Definitions: docs/glossary.md.

    * ``accepted_length_mean``: accepted proposals + 1, mean over rounds; 1.0 = nothing accepted; ``None`` without a
      round that counts
    * ``acceptance_per_position[i]``: rounds that accepted at least i + 1 proposals / all rounds; empty without one
    * ``lossless``: every prompt's outputs are equal up to excused near-ties; ``None`` when the target did not compute
      in fp32, where differences are reported and not judged, and when tokens were sampled, where nothing is compared
    * ``tokens_per_second_*``: new tokens after the first / decode time (the target's prefill is left out)
    * ``*_ci95``: 95 % confidence intervals by the bootstrap over prompts, that of the speed-up over batches
      (``evaluation/statistics.py``); ``None`` for fewer than two of them, where nothing was counted, and of the
      speed-up of a category whose prompts share batches with others
    * ``distinct_4grams``: distinct / all 4-grams of the plain output, mean over prompts with at least 4 new tokens
    """

    accepted_length_mean: float | None
    accepted_length_ci95: Interval | None
    acceptance_per_position: tuple[float, ...]
    acceptance_per_position_ci95: tuple[Interval | None, ...]
    num_rounds: int
    lossless: bool | None
    num_prompts_compared: int
    num_tokens_compared: int
    num_mismatches: int
    num_near_ties: int
    tokens_per_second_plain: float
    tokens_per_second_speculative: float
    speed_up_ci95: Interval | None
    distinct_4grams: float
    prompts: tuple[DecodedPrompt, ...]

    @property
    def speed_up(self) -> float:
        """Speculative over plain tokens per second; 0 where nothing was timed."""
        return (
            self.tokens_per_second_speculative / self.tokens_per_second_plain if self.tokens_per_second_plain else 0.0
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"speed_up": self.speed_up}


def summarise(
    rows: Sequence[DecodedPrompt], num_proposals: int, judged: bool, *, whole_batches: bool = True
) -> SpeculativeReport:
    """The report over ``rows``; sums first, ratios last. ``judged`` says whether differences count as losses.

    ``whole_batches``: whether ``rows`` are all prompts of their batches, without which a speed-up has no interval.
    """
    rounds = [count for row in rows for count in row.accepted]
    mismatches = sum(row.mismatch is not None and not row.near_tie for row in rows)
    bootstrap = Bootstrap(len(rows))
    num_rounds = [len(row.accepted) for row in rows]
    plain = ([len(row.plain_tokens) - 1 for row in rows], [row.plain_seconds for row in rows])
    speculative = ([len(row.speculative_tokens) - 1 for row in rows], [row.speculative_seconds for row in rows])
    reached = [
        [sum(count > position for count in row.accepted) for row in rows]
        for position in range(num_proposals if rounds else 0)
    ]
    return SpeculativeReport(
        accepted_length_mean=1.0 + sum(rounds) / len(rounds) if rounds else None,
        accepted_length_ci95=bootstrap.interval(
            [[sum(row.accepted) for row in rows], num_rounds], lambda sums: 1.0 + sums[0] / sums[1]
        ),
        acceptance_per_position=tuple(sum(counts) / len(rounds) for counts in reached),
        acceptance_per_position_ci95=tuple(
            bootstrap.interval([counts, num_rounds], lambda sums: sums[0] / sums[1]) for counts in reached
        ),
        num_rounds=len(rounds),
        lossless=mismatches == 0 if judged else None,
        num_prompts_compared=sum(row.compared for row in rows),
        num_tokens_compared=sum(row.num_compared_tokens for row in rows),
        num_mismatches=mismatches,
        num_near_ties=sum(row.near_tie for row in rows),
        tokens_per_second_plain=_rate(sum(plain[0]), sum(plain[1])),
        tokens_per_second_speculative=_rate(sum(speculative[0]), sum(speculative[1])),
        speed_up_ci95=_speed_up_interval(rows, [*speculative, *plain]) if whole_batches else None,
        distinct_4grams=distinct_ngrams([row.plain_tokens for row in rows], 4),
        prompts=tuple(rows),
    )


def _speed_up_interval(rows: Sequence[DecodedPrompt], columns: Sequence[Sequence[float]]) -> Interval | None:
    """Over batches: prompts of one have the same steps. ``columns``: tokens and seconds, speculative and plain."""
    places = {batch: place for place, batch in enumerate(dict.fromkeys(row.batch for row in rows))}
    sums = [[0.0] * len(places) for _ in columns]
    for column, totals in zip(columns, sums, strict=True):
        for row, value in zip(rows, column, strict=True):
            totals[places[row.batch]] += value
    return Bootstrap(len(places)).interval(sums, lambda found: (found[0] / found[1]) / (found[2] / found[3]))


def distinct_ngrams(outputs: Sequence[Sequence[int]], length: int) -> float:
    """Distinct / all n-grams of each output, mean over outputs that have one; 0 where none has."""
    shares = []
    for tokens in outputs:
        grams = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
