"""Learning-rate schedules in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"]
DecayShape = Literal["linear", "cosine", "exponential", "minus_sqrt"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up over ``int(warmup_ratio * total_steps)`` steps, then a decay to ``min_lr_ratio * lr``.

    ``lr_at(t)`` is the rate of the 0-based optimizer step ``t``: ``lr * (t + 1) / w`` while ``t < w``, so the first
    rate is not zero; the first step after the warm-up has the full rate; from ``total_steps`` on it is the minimum.

    * ``cosine``, ``linear``: from the warm-up to the end
    * ``constant``: never falls
    * ``inverse_sqrt``: ``lr * sqrt(w / t)``, with no end
    * ``wsd`` (warm-up, stable, decay): full until the last ``int(decay_ratio * total_steps)`` steps, then by
      ``decay_shape``
    """

    kind: ScheduleKind
    lr: float
    total_steps: int
    warmup_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    decay_ratio: float = 0.1
    decay_shape: DecayShape = "cosine"

    def lr_at(self, step: int) -> float:
        warmup = int(self.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * self._share_at(step, warmup))

    def _share_at(self, step: int, warmup: int) -> float:
        """What is left of the way from the peak (1) to the minimum (0) at ``step``, after the warm-up."""
        if self.kind == "constant":
            return 1.0
        if self.kind == "inverse_sqrt":
            return math.sqrt(max(1, warmup) / max(1, warmup, step))
        start = warmup
        if self.kind == "wsd":
            start = max(warmup, self.total_steps - int(self.decay_ratio * self.total_steps))
        progress = min(1.0, max(0, step - start) / max(1, self.total_steps - start))
        return _fall(self.decay_shape if self.kind == "wsd" else self.kind, progress)


def _fall(shape: str, progress: float) -> float:
    """From 1 to 0 as ``progress`` goes from 0 to 1."""
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if shape == "exponential":
        return 2.0 * math.exp2(-progress) - 1.0
    return 1.0 - (math.sqrt(progress) if shape == "minus_sqrt" else progress)
