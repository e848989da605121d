"""95 % confidence intervals of ratios of sums, by the bootstrap over prompts, or over batches of them.

The prompts are taken as a random sample of those that the draft will meet. A resample draws as many prompts as there
are, with replacement, and every figure is computed from the sums of that resample, as it is from those of the sample;
the interval lies between the 2.5th and the 97.5th percentile of the resamples (Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13). What depends on each other stays together: the rounds of one prompt, and the seconds
of one batch, whose steps its prompts share. With fewer than about twenty of them such intervals are too narrow. They
say nothing of a machine that was slow all the time.

Legend: n prompts or batches, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
SEED = 20_240_229
LEVEL = 0.95

Interval = tuple[float, float]
Floats = NDArray[np.float64]


class Bootstrap:
    """Resamples of ``num_drawn`` prompts or batches, the same for every figure: ``weights`` [S, n] counts how often
    each is in.

    Keyed by the number alone, so equal samples give equal intervals.
    """

    def __init__(self, num_drawn: int, num_resamples: int = NUM_RESAMPLES) -> None:
        self.num_drawn = num_drawn
        if num_drawn > 1:
            shares = np.full(num_drawn, 1.0 / num_drawn)
            draws = np.random.default_rng([SEED, num_drawn])
            self._weights: Floats = draws.multinomial(num_drawn, shares, num_resamples).astype(np.float64)

    def interval(self, columns: Sequence[Sequence[float]], figure: Callable[[list[Floats]], Floats]) -> Interval | None:
        """The interval of ``figure``, which computes [S] values from the sums [S] of each of the ``columns`` [n].

        ``None`` where n is below two. Resamples in which the figure has no value (nothing was counted) are left
        out; ``None`` too where they are more than the interval leaves out.
        """
        if self.num_drawn < 2:
            return None
        sums = [self._weights @ np.asarray(column, dtype=np.float64) for column in columns]
        with np.errstate(divide="ignore", invalid="ignore"):
            values = figure(sums)
        values = values[np.isfinite(values)]
        if len(values) < LEVEL * len(self._weights):
            return None
        low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return float(low), float(high)
