"""When is a process that died started again, and when is it given up? A pure policy: deaths in, seconds out."""

from __future__ import annotations

import time
from collections.abc import Callable

from specforge.config.launch import RestartOptions


class Restarts:
    """The deaths of one process, or of several that live and die together.

    Those within ``healthy_after_s`` of its start follow each other in a row. So do all between which ``reached`` (such
    as the number of the last checkpoint) did not grow: who goes over the same ground again lives for any time.
    """

    def __init__(
        self,
        options: RestartOptions,
        clock: Callable[[], float] = time.monotonic,
        reached: Callable[[], int] | None = None,
    ) -> None:
        self._options, self._clock, self._reached = options, clock, reached
        self._started_at = 0.0
        self._reached_before = reached() if reached is not None else 0
        self.num_deaths = 0
        """Deaths in the present row."""

    def started(self) -> None:
        self._started_at = self._clock()

    def died(self) -> float | None:
        """Seconds to wait before the next start; ``None``: it died too often in a row, give up."""
        options = self._options
        if self._has_advanced() and self._clock() - self._started_at >= options.healthy_after_s:
            self.num_deaths = 0
        self.num_deaths += 1
        if self.num_deaths > options.max_restarts:
            return None
        # Doubled step by step: as a power of two it would overflow where many restarts are allowed.
        delay_s = options.first_backoff_s
        for _ in range(self.num_deaths - 1):
            if delay_s >= options.longest_backoff_s:
                break
            delay_s *= 2
        return min(delay_s, options.longest_backoff_s)

    def _has_advanced(self) -> bool:
        """Since the last death; always, where nothing says how far it came."""
        if self._reached is None:
            return True
        before, self._reached_before = self._reached_before, self._reached()
        return self._reached_before > before
