"""Learning-rate schedules in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up over ``int(warmup_ratio * total_steps)`` steps, then a decay to ``min_lr_ratio * lr``.

    ``lr_at(t)`` is the rate of the 0-based optimizer step ``t``: ``lr * (t + 1) / w`` while ``t < w``, so the first
    rate is not zero; the first step after the warm-up has the full rate; from ``total_steps`` on it is the minimum.
    """

    kind: ScheduleKind
    lr: float
    total_steps: int
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0

    def lr_at(self, step: int) -> float:
        warmup = int(self.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.kind == "constant":
            return self.lr
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        factor = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * factor)
