"""Queues of dispatched slots: ``StreamingRefQueue`` over a channel, ``SampleRefQueue`` within one process."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from specforge.contracts.refs import Slot, SlotRef
from specforge.control_plane.channel.base import RefReader
from specforge.errors import ChannelClosed, ControlPlaneError, InvalidTransition


class StreamingRefQueue:
    """What the loader reads from. ``skip_ids``: slots that a restarted consumer trained before and must not see again.

    ``idle_timeout_s``: a stream that is open and gives nothing for that long is an error, ``None`` waits for ever.
    One thread gets; ``ack`` and ``fail`` may come from another one.
    """

    def __init__(
        self, reader: RefReader, skip_ids: frozenset[Slot] = frozenset(), idle_timeout_s: float | None = None
    ) -> None:
        self._reader = reader
        self._skip_ids = skip_ids
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.Lock()
        self._returned: deque[SlotRef] = deque()

    def get(self, max_slots: int) -> list[SlotRef]:
        """Blocks until exactly ``max_slots`` slots are there, or the stream ended: then the rest, [] at the end.

        Raises ``ProducerFailed``, and ``ControlPlaneError`` when nothing came for ``idle_timeout_s``.
        """
        with self._lock:
            taken = [self._returned.popleft() for _ in range(min(max_slots, len(self._returned)))]
        try:
            while len(taken) < max_slots:
                refs = self._reader.poll(max_slots - len(taken), self._idle_timeout_s)
                if not refs and self._reader.ended:
                    break
                self._check_silence(refs, max_slots - len(taken))
                wanted = [ref for ref in refs if ref.slot not in self._skip_ids]
                if len(wanted) < len(refs):
                    self._reader.mark_consumed(len(refs) - len(wanted))
                taken += wanted
        except BaseException:
            self.fail(taken)
            raise
        return taken

    def ack(self, refs: Sequence[SlotRef]) -> None:
        """These slots are done with."""
        self._reader.mark_consumed(len(refs))

    def fail(self, refs: Sequence[SlotRef]) -> None:
        """These slots were not used: the next ``get`` gives them again, first and in this order."""
        with self._lock:
            self._returned.extendleft(reversed(refs))

    def _check_silence(self, refs: Sequence[SlotRef], num_missing: int) -> None:
        if refs or self._idle_timeout_s is None:
            return
        raise ControlPlaneError(
            f"the capture side is silent: {num_missing} more slots are needed, and for {self._idle_timeout_s:g} s none "
            "came though the run is not over; check that the capture workers live and make progress (their logs, "
            "num_leased in the summary of the control plane), or give them more time with control_plane.idle_timeout_s"
        )


class SampleRefQueue:
    """An in-process queue with partitions (one a consumer rank) and leases.

    What ``get`` gave and nobody acked within ``lease_s`` is given again, in front. ``clock`` is in seconds.
    """

    def __init__(
        self, num_partitions: int = 1, lease_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._waiting: list[deque[SlotRef]] = [deque() for _ in range(num_partitions)]
        self._leased: list[dict[Slot, tuple[float, SlotRef]]] = [{} for _ in range(num_partitions)]
        self._lease_s = lease_s
        self._clock = clock
        self._closed = False
        self._changed = threading.Condition()

    def put(self, refs: Iterable[SlotRef], partition: int = 0) -> None:
        with self._changed:
            if self._closed:
                raise ChannelClosed("put on a queue that was closed")
            self._waiting[partition].extend(refs)
            self._changed.notify_all()

    def get(self, partition: int, max_slots: int, timeout_s: float | None = None) -> list[SlotRef]:
        """Up to ``max_slots``; blocks until there is one. [] when time is up, or when all is acked after ``close``."""
        deadline = None if timeout_s is None else self._clock() + timeout_s
        waiting, leased = self._waiting[partition], self._leased[partition]
        with self._changed:
            while True:
                now = self._clock()
                self._redeliver(partition, [slot for slot, (expiry, _) in leased.items() if expiry <= now])
                if waiting or (self._closed and not leased):
                    break
                if deadline is not None and now >= deadline:
                    return []
                wake_at = min((expiry for expiry, _ in leased.values()), default=deadline)
                if deadline is not None and wake_at is not None:
                    wake_at = min(wake_at, deadline)
                self._changed.wait(None if wake_at is None else max(0.0, wake_at - now))
            taken = [waiting.popleft() for _ in range(min(max_slots, len(waiting)))]
            leased.update((ref.slot, (now + self._lease_s, ref)) for ref in taken)
            return taken

    def ack(self, partition: int, slots: Sequence[Slot]) -> None:
        """Done with. A slot that is not leased (any longer) is an ``InvalidTransition``, and nothing is acked."""
        with self._changed:
            for slot in self._owned(partition, slots):
                del self._leased[partition][slot]
            self._changed.notify_all()

    def fail(self, partition: int, slots: Sequence[Slot]) -> None:
        """Not used: given again, first."""
        with self._changed:
            self._redeliver(partition, self._owned(partition, slots))
            self._changed.notify_all()

    def close(self) -> None:
        """No more puts; consumers get what is left and what fails."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _owned(self, partition: int, slots: Sequence[Slot]) -> Sequence[Slot]:
        for slot in slots:
            if slot not in self._leased[partition]:
                raise InvalidTransition(f"{slot} is not leased in partition {partition}")
        return slots

    def _redeliver(self, partition: int, slots: Sequence[Slot]) -> None:
        refs = sorted((self._leased[partition].pop(slot)[1] for slot in slots), key=lambda ref: ref.slot)
        self._waiting[partition].extendleft(reversed(refs))
