"""When may one more sample be captured? A pure policy: numbers in, decision out.

Two credits, samples in flight and resident bytes, each with a high and a low watermark: once one of them is used up,
capture pauses until both are below the low watermark, so that it goes on in stretches and not sample by sample.

Deadlock-free by construction: leases are granted in slot order, so what holds the bytes is what the trainer needs
first, and the slots of the next optimizer step are granted whatever the numbers say. A byte budget that is smaller
than one step slows the run down to one step at a time, but can never stop it.
"""

from __future__ import annotations

from dataclasses import dataclass

from specforge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Credits:
    """``window_slots`` and ``step_slots`` (slots of one optimizer step) count slots; ``None`` bytes: unbounded.

    ``low_watermark`` is the share of both limits below which a pause ends; 1.0: no hysteresis.
    """

    window_slots: int
    step_slots: int
    max_resident_bytes: int | None
    low_watermark: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.step_slots <= self.window_slots:
            raise ConfigError(
                f"the capture window must hold at least one optimizer step ({self.step_slots} slots), "
                f"got window_slots = {self.window_slots}; raise it to {max(self.step_slots, 1)} or more"
            )
        if not 0 < self.low_watermark <= 1:
            raise ConfigError(f"expected a low_watermark above 0 and up to 1, got {self.low_watermark}")


class BackPressure:
    """The state of the policy: whether capture is paused."""

    def __init__(self, limits: Credits) -> None:
        self._limits = limits
        self.paused = False

    def grants(self, in_next_step: bool, num_in_flight: int, resident_bytes: int, estimated_bytes: int) -> bool:
        """May one more sample be captured? ``in_next_step``: the next optimizer step needs it.

        ``num_in_flight`` counts samples of the window that are leased or captured, ``resident_bytes`` everything that
        is leased or stored, ``estimated_bytes`` what this sample adds.
        """
        limits = self._limits
        budget = limits.max_resident_bytes
        if num_in_flight >= limits.window_slots or (budget is not None and resident_bytes + estimated_bytes > budget):
            self.paused = True
        elif self.paused:
            low = limits.low_watermark
            few = num_in_flight < low * limits.window_slots
            self.paused = not (few and (budget is None or resident_bytes + estimated_bytes <= low * budget))
        return in_next_step or not self.paused
