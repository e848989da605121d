"""When is a process that died started again, and when is it given up? A pure policy: deaths in, seconds out."""

from __future__ import annotations

import time
from collections.abc import Callable

from specforge.config.launch import RestartOptions


class Restarts:
    """The deaths of one process. Those within ``healthy_after_s`` of its start follow each other in a row."""

    def __init__(self, options: RestartOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        self._started_at = 0.0
        self.num_deaths = 0
        """Deaths in the present row."""

    def started(self) -> None:
        self._started_at = self._clock()

    def died(self) -> float | None:
        """Seconds to wait before the next start; ``None``: it died too often in a row, give up."""
        options = self._options
        if self._clock() - self._started_at >= options.healthy_after_s:
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
