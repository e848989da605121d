"""ServedRollout: the capture side's work where live servers run the target. One loop a server, below one worker id."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from specforge.control_plane.base import CaptureControl
from specforge.data_plane.base import FeatureStore
from specforge.errors import ConfigError, ControlPlaneError, EngineError, ServerRefused, ServerUnavailable
from specforge.inference.delivery import leave_soon, reason_of
from specforge.inference.servers.base import CaptureServer
from specforge.inference.servers.listing import ServerListing
from specforge.inference.servers.stint import Ending, ServedSettings, Stint

_LOG = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the listing is looked at."""
FIRST_BACKOFF_S = 0.5
JOIN_S = 5.0
"""How long the loops of a run that ends may take, all together."""

Begin = Callable[[CaptureServer, str], Stint]


class ServedRollout:
    """Works for every server that ``listing`` names, each in a loop of its own, as servers come and go.

    Worker ids are ``<worker_id>/<server>.<n>``: the n-th stint at a server. A server that fails loses its leases to
    others, and is asked again after a wait that doubles. One that cannot serve the run at all is asked no more until it
    was taken off the list and put there again.
    """

    def __init__(
        self,
        control: CaptureControl,
        connect: Callable[[str], CaptureServer],
        listing: ServerListing,
        store: FeatureStore,
        settings: ServedSettings,
    ) -> None:
        self._control, self._connect, self._listing, self._store = control, connect, listing, store
        self._settings = settings
        self._stopped = threading.Event()
        self._woken = threading.Event()
        self._seats: dict[str, _Seat] = {}
        self._loops: dict[str, ServerLoop] = {}
        self._refusals: dict[str, str] = {}
        self._served_at = 0.0

    def run(self) -> None:
        """Until no task will ever be offered again, or until :meth:`stop`.

        Raises what the control plane or the store raised, ``ServerRefused`` where no server can serve the run, and
        ``EngineError`` where none did for ``unserved_s``.
        """
        worker_id = self._settings.worker_id
        # What an earlier controller gave to stints that are over: nobody waits for it to expire.
        self._control.leave(worker_id, None)
        self._sign_of_service()
        try:
            while not self._is_over():
                self._woken.wait(LOOK_S)
                self._woken.clear()
        except ControlPlaneError:
            self._end_loops()
            raise
        except Exception as error:
            self._end_loops()
            leave_soon(self._control, worker_id, reason_of(error))
            raise
        except BaseException:
            self._end_loops()
            leave_soon(self._control, worker_id, None)
            raise
        self._end_loops()
        if self._stopped.is_set():
            leave_soon(self._control, worker_id, None)

    def stop(self) -> None:
        """Make :meth:`run` give back what it holds and return, without waiting for servers. From any thread."""
        self._stopped.set()
        self._woken.set()

    def _is_over(self) -> bool:
        """Start and end loops as the listing says; raise what ends the run."""
        if self._stopped.is_set():
            return True
        listed = self._listing.current()
        for url, loop in list(self._loops.items()):
            if url not in listed:
                loop.end(Ending.REMOVED)
            if loop.is_over:
                del self._loops[url]
                if loop.ending is Ending.FAILED and loop.error is not None:
                    raise loop.error
                if loop.ending is Ending.FINISHED:
                    return True
                if loop.ending is Ending.REFUSED:
                    self._refusals[url] = loop.trouble
        self._refusals = {url: reason for url, reason in self._refusals.items() if url in listed}
        for url in listed:
            if url not in self._loops and url not in self._refusals:
                self._loops[url] = self._start(url)
        self._check_service(listed)
        return False

    def _start(self, url: str) -> ServerLoop:
        seat = self._seats.setdefault(url, _Seat(f"{self._settings.worker_id}/{len(self._seats)}"))

        def begin(server: CaptureServer, worker_id: str) -> Stint:
            return Stint(server, worker_id, self._control, self._store, self._settings, self._sign_of_service)

        return ServerLoop(
            url, seat, lambda: self._connect(url), begin, self._settings.longest_backoff_s, self._woken.set
        )

    def _sign_of_service(self) -> None:
        self._served_at = time.monotonic()

    def _check_service(self, listed: tuple[str, ...]) -> None:
        if listed and not self._loops and not self._listing.may_change:
            reasons = "; ".join(self._refusals.values())
            raise ServerRefused(f"no capture server can serve this run: {reasons}")
        if any(loop.waits_for_work for loop in self._loops.values()):
            self._sign_of_service()
        # One sample may take that long by itself: a request, and where it is to be answered one for that before.
        num_requests = 1 if self._settings.responses is None else 2
        limit_s = max(self._settings.unserved_s, num_requests * self._settings.timeout_s)
        if time.monotonic() - self._served_at > limit_s:
            said = [loop.trouble or f"{url}: no answer yet" for url, loop in self._loops.items()]
            said += self._refusals.values()
            raise EngineError(
                f"no capture server has captured anything for {limit_s:g} s ({self._listing}): "
                f"{'; '.join(said) or 'none is listed'}. Start them, or name others in target.servers"
            )

    def _end_loops(self) -> None:
        loops, self._loops = list(self._loops.values()), {}
        for loop in loops:
            loop.end(Ending.STOPPED)
        deadline = time.monotonic() + JOIN_S
        for loop in loops:
            loop.join(max(0.0, deadline - time.monotonic()))


@dataclass(slots=True)
class _Seat:
    """The name of a server below the worker id, and how many worker ids it used up: none is used twice."""

    name: str
    num_stints: int = field(default=0)


class ServerLoop:
    """Stint after stint at the server ``url``, in a thread of its own: a circuit breaker.

    ``woken`` is called at the end. Then ``is_over``, with the ``ending`` and ``error`` of the last stint; ``trouble``
    is what was last wrong, in words that name the server.
    """

    def __init__(
        self,
        url: str,
        seat: _Seat,
        connect: Callable[[], CaptureServer],
        begin: Begin,
        longest_backoff_s: float,
        woken: Callable[[], None],
    ) -> None:
        self.url, self.ending, self.trouble, self.is_over = url, Ending.NOT_YET, "", False
        self.error: Exception | None = None
        self._seat, self._connect, self._begin = seat, connect, begin
        self._longest_backoff_s, self._woken = longest_backoff_s, woken
        self._lock = threading.Lock()
        self._wanted = Ending.NOT_YET
        self._told = threading.Event()
        self._stint: Stint | None = None
        self._num_failures = 0
        self._thread = threading.Thread(target=self._run, name=f"{seat.name} at {url}", daemon=True)
        self._thread.start()

    @property
    def waits_for_work(self) -> bool:
        """The server is well, and there is nothing to do for it."""
        stint = self._stint
        return stint is not None and stint.waits_for_work and not stint.ending

    def end(self, ending: Ending) -> None:
        """With what is in flight (``REMOVED``) or without (``STOPPED``). Does not wait."""
        with self._lock:
            self._wanted, stint = max(self._wanted, ending), self._stint
        self._told.set()
        if stint is not None:
            stint.end(ending)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._told.is_set():
                has_served = self._serve()
                if self.ending not in {Ending.BUSY, Ending.UNAVAILABLE}:
                    break
                self._back_off(has_served)
        except Exception as error:  # noqa: BLE001 - raised in the run's thread
            self.ending, self.error = Ending.FAILED, error
        if self.ending is Ending.REFUSED:
            self.trouble = str(self.error)
            _LOG.error("%s. It is not used any more", self.trouble)
        self.is_over = True
        self._woken()

    def _serve(self) -> bool:
        """A stint, whose ``ending`` and ``error`` are the loop's; whether it captured anything."""
        try:
            server = self._connect()
        except (ConfigError, ServerUnavailable) as error:  # such as a file with the token, just being replaced
            self.ending, self.error = Ending.UNAVAILABLE, error
            return False
        with contextlib.closing(server):
            stint = self._next(server)
            stint.work()
        self._seat.num_stints += stint.has_leased
        self.ending, self.error = stint.ending, stint.error
        return stint.num_served > 0

    def _next(self, server: CaptureServer) -> Stint:
        stint = self._begin(server, f"{self._seat.name}.{self._seat.num_stints + 1}")
        with self._lock:
            self._stint, wanted = stint, self._wanted
        if wanted:
            stint.end(wanted)
        return stint

    def _back_off(self, has_served: bool) -> None:
        if has_served:
            self._num_failures, self.trouble = 0, ""
        self._num_failures += 1
        longest = min(self._longest_backoff_s, FIRST_BACKOFF_S * 2 ** min(self._num_failures - 1, 30))
        # Loops that lost the same server, or the same network, do not all come back in the same instant.
        pause_s = longest * random.uniform(0.5, 1.0)  # noqa: S311
        if str(self.error) != self.trouble:
            self.trouble = str(self.error)
            _LOG.warning("%s. It is asked again from time to time, next in %.1f s", self.trouble, pause_s)
        self._told.wait(pause_s)
