"""A process's connection to a Mooncake Store: every return code looked at, every call that the service's absence failed
tried again until it is back or ``reconnect_s`` is over.

Answers of the library are negative codes; those that mean that a side is away are told from those that mean something:

    -200 no room            -703 half-written       -704 no such object      -600 object larger than the buffer
    -707 read took longer than the lease            -800 the owner of the memory is away      -900 the master is away
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from specforge.errors import FeatureStoreError

NO_ROOM = -200
WRONG_SIZE = -600
HALF_WRITTEN = -703
NOT_FOUND = -704
_LEASE_EXPIRED = -707
_TRANSFER_FAILED = -800
_MASTER_AWAY = -900
_ABSENT = frozenset({HALF_WRITTEN, NOT_FOUND})
_AWAY = frozenset({_TRANSFER_FAILED, _MASTER_AWAY})

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_HTTP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    """How a process reaches the Mooncake Store of a run; sizes in bytes.

    ``master`` and ``admin`` are the ``host:port`` of the master's RPC and HTTP, ``host`` is this host's own address.
    ``buffer_bytes``: all that this process puts or holds at a time. ``capacity_bytes``: what of this process may be
    readable at a time; ``None``: whatever the service has room for.
    """

    run_id: str
    master: str
    admin: str
    host: str = "127.0.0.1"
    protocol: str = "tcp"
    device: str = ""
    metadata_server: str = "P2PHANDSHAKE"
    buffer_bytes: int = 256 * 2**20
    capacity_bytes: int | None = None
    reconnect_s: float = 60.0


class _Patience:
    """The waits of one call: they double, and are over after ``reconnect_s``."""

    def __init__(self, connection: MooncakeConnection, doing: str) -> None:
        self._connection, self._doing = connection, doing
        self._give_up_at = time.monotonic() + connection.settings.reconnect_s
        self._pause_s = _FIRST_PAUSE_S

    def wait(self, why: str, *, for_master: bool) -> None:
        """Raises ``FeatureStoreError`` with ``why`` when it is over; with ``for_master`` the master's port is tried
        meanwhile, since a call of the library would wait for seconds.
        """
        while True:
            left_s = self._give_up_at - time.monotonic()
            if left_s <= 0:
                raise FeatureStoreError(f"{self._doing}: {why}")
            if self._connection.closing.wait(min(self._pause_s, left_s)):
                raise FeatureStoreError(f"{self._doing}: this feature store was closed meanwhile")
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            if not for_master or _answers(self._connection.settings.master):
                return


class MooncakeConnection:
    """``library`` is the module ``mooncake.store``. Safe to use from several threads, not across a fork.

    Raises ``FeatureStoreError`` where the master does not answer within ``reconnect_s``, from any method.
    """

    def __init__(self, settings: MooncakeSettings, library: Any) -> None:
        self.settings = settings
        self.closing = threading.Event()
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._num_calls = 0
        # Without a master, the library's setup blocks for a minute and a half.
        if not _answers(settings.master):
            _Patience(self, "connecting to Mooncake").wait(self._why(_MASTER_AWAY), for_master=True)
        self._replication = library.ReplicateConfig()
        self._replication.replica_num = 1
        self._replication.with_hard_pin = True  # else a full store drops what is oldest
        self._client = library.MooncakeDistributedStore()
        # A segment of 0 bytes: the features are owned by another process, so this one's death loses none.
        code = self._client.setup(
            settings.host, settings.metadata_server, 0, 0, settings.protocol, settings.device, settings.master
        )
        if code != 0:
            raise FeatureStoreError(
                f"Mooncake's setup failed with code {code} (host {settings.host}, protocol {settings.protocol}, master "
                f"{settings.master}): check data_plane.mooncake and the lines of the library above"
            )
        # A proxy of the environment is not for the data plane.
        self._admin = httpx.Client(base_url=f"http://{settings.admin}", trust_env=False, timeout=_HTTP_TIMEOUT_S)

    def register(self, address: int, num_bytes: int) -> None:
        """For good: transfers read and write this memory alone."""
        with self._in_use():
            code = self._client.register_buffer(address, num_bytes)
        if code != 0:
            raise FeatureStoreError(
                f"Mooncake could not register a transfer buffer of {num_bytes} bytes (code {code}): lower "
                "data_plane.mooncake.buffer_bytes, or raise the limit of locked memory (ulimit -l) for rdma"
            )

    def put(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """0, or a code, for each object: ``NO_ROOM`` or one of no other meaning."""

        def attempt(positions: Sequence[int], is_retry: bool) -> list[int]:
            names = [keys[at] for at in positions]
            codes: list[int] = self._client.batch_put_from(
                names, [addresses[at] for at in positions], [sizes[at] for at in positions], self._replication
            )
            if not is_retry:
                return codes
            # Where the first attempt was cut off in the middle, Mooncake says 0 to the second and keeps nothing.
            there = self._client.batch_is_exist(names)
            return [
                code if code or found == 1 else min(found, 0) or HALF_WRITTEN
                for code, found in zip(codes, there, strict=True)
            ]

        # An object that a put does not find again was started with a master that is no more.
        return self._each("storing features", len(keys), attempt, _AWAY | _ABSENT)

    def get(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Bytes read, or a code, for each object: ``NOT_FOUND``, ``HALF_WRITTEN``, ``WRONG_SIZE`` or one of no other
        meaning. What was removed, by whomever, while it was read is ``NOT_FOUND``: its bytes may be another's.
        """

        def attempt(positions: Sequence[int], _is_retry: bool) -> list[int]:
            names = [keys[at] for at in positions]
            counts: list[int] = self._client.batch_get_into(
                names, [addresses[at] for at in positions], [sizes[at] for at in positions]
            )
            there = self._client.batch_is_exist(names)
            return [
                count if count < 0 or found == 1 else min(found, 0) or NOT_FOUND
                for count, found in zip(counts, there, strict=True)
            ]

        return self._each("reading features", len(keys), attempt, _AWAY | {_LEASE_EXPIRED})

    def remove(self, keys: Sequence[str]) -> None:
        """Those that exist, at once: readers' leases do not count."""

        def attempt(positions: Sequence[int], _is_retry: bool) -> list[int]:
            codes: list[int] = self._client.batch_remove([keys[at] for at in positions], True)
            return codes

        for key, code in zip(keys, self._each("freeing features", len(keys), attempt, _AWAY), strict=True):
            if code not in _ABSENT | {0}:
                raise FeatureStoreError(f"Mooncake refused to free {key} with code {code}")

    def try_to_remove(self, keys: Sequence[str]) -> None:
        """``remove`` in one attempt, whose failure is another's news."""
        with self._in_use():
            self._client.batch_remove(list(keys), True)

    def remove_all(self, pattern: str) -> int:
        """Number of objects, of those whose key matches ``pattern``, that are gone."""

        def attempt(_positions: Sequence[int], _is_retry: bool) -> list[int]:
            return [self._client.remove_by_regex(pattern, True)]

        [count] = self._each("freeing features", 1, attempt, _AWAY)
        if count < 0:
            raise FeatureStoreError(f"Mooncake refused to free what matches {pattern!r} with code {count}")
        return count

    def exist(self, keys: Sequence[str]) -> list[bool]:
        def attempt(positions: Sequence[int], _is_retry: bool) -> list[int]:
            codes: list[int] = self._client.batch_is_exist([keys[at] for at in positions])
            return codes

        codes = self._each("asking for features", len(keys), attempt, _AWAY)
        if min(codes, default=0) < 0:
            raise FeatureStoreError(f"Mooncake could not say whether features exist: code {min(codes)}")
        return [code == 1 for code in codes]

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Bytes of each object, with its header; ``None`` where there is none."""
        found: dict[str, int] = {}
        asked = list(keys)
        while True:
            with self._in_use():
                described = self._client.batch_get_replica_desc(asked) if asked else {}
            for key, replicas in described.items():
                found[key] = replicas[0].get_memory_descriptor().buffer_descriptor.size
            # No description: there is no object, or the master did not answer.
            missing = [key for key in asked if key not in found]
            asked = [key for key, exists in zip(missing, self.exist(missing), strict=True) if exists]
            if not asked:
                return [found.get(key) for key in keys]

    def all_keys(self) -> list[str]:
        """Of all objects of the master, whosever they are."""
        return self._page("/get_all_keys").splitlines()

    def segments(self) -> list[int]:
        """Bytes of each mounted segment."""
        lines = re.findall(r"^segment_total_capacity_bytes\{[^}]*\} (\S+)$", self._page("/metrics"), re.MULTILINE)
        return [int(float(number)) for number in lines]

    def close(self) -> None:
        """Waits for the calls of other threads: the library crashes where it is used after its end."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self.closing.is_set():
                return
            self.closing.set()
            self._changed.wait_for(lambda: not self._num_calls)
            self._client.close()
            self._admin.close()

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise FeatureStoreError("this feature store was opened before a fork: open another in the child process")
        with self._changed:
            if self.closing.is_set():
                raise FeatureStoreError("this feature store is closed")
            self._num_calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_calls -= 1
                self._changed.notify_all()

    def _each(
        self,
        doing: str,
        num_keys: int,
        attempt: Callable[[Sequence[int], bool], list[int]],
        transient: frozenset[int],
    ) -> list[int]:
        """The answers to ``attempt`` for positions 0 .. ``num_keys``, tried again where they are ``transient``."""
        patience = _Patience(self, doing)
        with self._in_use():
            answers = attempt(range(num_keys), False) if num_keys else []
        while away := [at for at, answer in enumerate(answers) if answer in transient]:
            code = min(answers[at] for at in away)
            patience.wait(self._why(code), for_master=code == _MASTER_AWAY)
            with self._in_use():
                again = attempt(away, True)
            for at, answer in zip(away, again, strict=True):
                answers[at] = answer
        return answers

    def _page(self, path: str) -> str:
        patience = _Patience(self, "asking the Mooncake master")
        while True:
            try:
                with self._in_use():
                    response = self._admin.get(path)
                if response.status_code == httpx.codes.OK:
                    return response.text
                why = f"it answered {response.status_code}"
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
            patience.wait(
                f"the HTTP of the Mooncake master at {self.settings.admin} does not answer ({path}: {why})",
                for_master=False,
            )

    def _why(self, code: int) -> str:
        settings = self.settings
        if code == _MASTER_AWAY:
            return (
                f"the Mooncake master at {settings.master} does not answer, and did not for {settings.reconnect_s:g} s "
                "(data_plane.mooncake.reconnect_s): see its log, and start it again where SpecForge does not manage it"
            )
        if code == _LEASE_EXPIRED:
            return (
                "reading took longer than Mooncake's lease: get fewer samples at a time, or start mooncake_master "
                "with a larger --default_kv_lease_ttl"
            )
        return (
            f"the process that owns the features' memory cannot be reached from {settings.host} (code {code}), and "
            f"could not for {settings.reconnect_s:g} s (data_plane.mooncake.reconnect_s): is a mooncake_client of the "
            f"master {settings.master} up, and are its transfer ports open (http://{settings.admin}/get_all_segments "
            "names it)?"
        )


def _answers(address: str) -> bool:
    """Whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True
