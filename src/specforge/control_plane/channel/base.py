"""The streaming channel: committed, dispatched refs on their way to a consumer, in order.

Two types, one for each end. A channel ends (``close``) or fails (``fail``); a dead producer is never mistaken for a
finished one. Both ends may be used from several threads of their process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from specforge.contracts.refs import SlotRef


class RefWriter(Protocol):
    """The producer's end. ``publish`` after ``close`` or ``fail`` is ``ChannelClosed``."""

    def publish(self, refs: Sequence[SlotRef]) -> None:
        """All refs, or none of them, can be polled when it returns."""
        ...

    def close(self) -> None:
        """End of stream: the consumer gets what was published and then the end. Idempotent; nothing after ``fail``."""
        ...

    def fail(self, reason: str) -> None:
        """The consumer raises ``ProducerFailed`` with ``reason`` at its next call, before undelivered refs.

        Idempotent; the first reason stays; nothing after ``close``.
        """
        ...

    def in_flight(self) -> int:
        """Published and not yet marked as consumed."""
        ...


class RefReader(Protocol):
    """The consumer's end."""

    def poll(self, max_refs: int, timeout_s: float | None = None) -> list[SlotRef]:
        """Up to ``max_refs`` refs in published order; blocks until there is one, the stream ends or time is up.

        ``timeout_s`` None waits for ever. An empty list means that time is up, or that the stream has ended.
        Raises ``ProducerFailed`` once the producer failed.
        """
        ...

    @property
    def ended(self) -> bool:
        """The producer closed the stream and everything in it was polled."""
        ...

    def mark_consumed(self, num_refs: int) -> None:
        """``num_refs`` more refs are done with; lets the producer see the back-pressure."""
        ...

    def stream(self) -> Iterator[SlotRef]:
        """Every ref until the end of the stream."""
        ...
