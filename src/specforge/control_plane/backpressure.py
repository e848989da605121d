"""When may one more sample be captured? A pure policy: numbers in, decision out.

Two credits, counts and bytes. The count credit is a window of slots beyond the last acked one. The byte credit
bounds resident features. Leases are granted in slot order only, so what holds the bytes is always what the trainer
needs first. The slots of the next optimizer step are granted whatever the bytes say: a byte budget that is smaller
than one step slows the run down to one step at a time, but can never stop it.
"""

from __future__ import annotations

from dataclasses import dataclass

from specforge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Credits:
    """``window_slots`` and ``step_slots`` (slots of one optimizer step) count slots; ``None`` bytes: unbounded."""

    window_slots: int
    step_slots: int
    max_resident_bytes: int | None

    def __post_init__(self) -> None:
        if not 1 <= self.step_slots <= self.window_slots:
            raise ConfigError(
                f"the capture window must hold at least one optimizer step ({self.step_slots} slots), "
                f"got window_slots = {self.window_slots}; raise it to {max(self.step_slots, 1)} or more"
            )

    def window_end(self, first_open: int, total: int) -> int:
        """One past the last slot that may be leased or resident, given the first slot that is not acked."""
        return min(total, first_open + self.window_slots)

    def grants(self, slot: int, first_open: int, resident_bytes: int, estimated_bytes: int) -> bool:
        """May ``slot``, inside the window, be captured now? ``resident_bytes`` includes what is leased."""
        if slot < first_open + self.step_slots or self.max_resident_bytes is None:
            return True
        return resident_bytes + estimated_bytes <= self.max_resident_bytes
