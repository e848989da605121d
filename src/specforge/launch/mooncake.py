"""MooncakeService: a Mooncake master and an owner of the features' memory, for the time of a run.

Both programs are children of this process: started again on the same ports when they die, killed by the kernel when
this process goes. A master that comes back has forgotten every object, an owner that comes back owns empty memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from specforge.config.launch import RestartOptions
from specforge.data_plane.config import MooncakeConfig
from specforge.errors import ConfigError, FeatureStoreError, MissingExtraError
from specforge.launch import die_with_parent
from specforge.launch.restarts import Restarts

_START_S = 30.0
_STOP_S = 5.0
_POLL_S = 0.02
_PORTS = range(20_000, 30_000)
"""Below the system's range for outgoing connections, one of which could take a port while its server is down, and above
the range that Mooncake draws from."""

ROOM = 1.25
"""Bytes of memory for each byte of features: objects of mixed sizes leave gaps that none of them fits into."""
_LEAST_BYTES = 16 * 2**20
"""No owner takes less."""

_ANY_HOST = "0.0.0.0"  # noqa: S104 (named in a warning)

Part = Literal["master", "client"]


@dataclass(frozen=True, slots=True)
class ServiceTimes:
    """Flags of the master, in seconds.

    ``client_ttl_s``: how long after its last sign of life an owner counts as dead, and its objects as gone.
    ``lease_s``: no get may take longer; the lease protects nothing here, since removals do not wait for it.
    ``put_discard_s``, ``put_release_s``: after how long a put that was not finished is given up, and its memory free.
    Memory must not be free while a writer that was held up may still send into it: ``put_release_s`` is longer than the
    library's own patience with a transfer, about 30 s. The tests' shorter times are for writers that die.
    """

    client_ttl_s: int = 5
    lease_s: int = 60
    put_discard_s: int = 30
    put_release_s: int = 60


@dataclass(frozen=True, slots=True)
class ServiceAddresses:
    """``host:port`` of the master's RPC and of its HTTP."""

    master: str
    admin: str


@dataclass(slots=True)
class _Program:
    part: Part
    command: list[str]
    log_file: Path
    restarts: Restarts
    process: subprocess.Popen[bytes] | None = None
    due_at: float | None = field(default=None)


class MooncakeService:
    """``on_given_up`` hears, from another thread and once, why a program is not started again any more."""

    def __init__(
        self,
        config: MooncakeConfig,
        capacity_bytes: int,
        run_dir: Path,
        on_given_up: Callable[[str], None],
        restarts: RestartOptions | None = None,
        times: ServiceTimes | None = None,
    ) -> None:
        """``capacity_bytes`` of features have room; memory for them, and ``ROOM``, is taken as they come in, and kept.

        Raises ``MissingExtraError`` where Mooncake is not installed.
        """
        host = config.host
        drawn = _free_ports(host, 3)
        self.addresses = ServiceAddresses(config.master or f"{host}:{drawn[0]}", config.admin or f"{host}:{drawn[1]}")
        self._on_given_up = on_given_up
        options, times = restarts or RestartOptions(), times or ServiceTimes()
        programs = _programs()
        logs = run_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        commands: dict[Part, list[str]] = {
            "master": [str(programs / "mooncake_master"), *_master_flags(self.addresses, times)],
            "client": [
                str(programs / "mooncake_client"),
                *_client_flags(config, self.addresses, max(_LEAST_BYTES, int(ROOM * capacity_bytes)), drawn[2]),
            ],
        }
        self._programs = {
            part: _Program(part, command, logs / f"mooncake-{part}.log", Restarts(options))
            for part, command in commands.items()
        }
        self._wake_read, self._wake_write = os.pipe()
        self._started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._watch, name="mooncake-service", daemon=True)

    def start(self) -> ServiceAddresses:
        """Returns when the service has room for features. Raises ``ConfigError`` where a configured port is taken,
        ``FeatureStoreError`` when the service does not come up.
        """
        for option, address in (("master", self.addresses.master), ("admin", self.addresses.admin)):
            host, port = _split(address)
            if not _is_free(host, int(port)):
                raise ConfigError(
                    f"data_plane.mooncake.{option}: nothing can listen at {address}, which another process holds or "
                    "which is no address of this host; leave it out to have a port chosen"
                )
        self._thread.start()
        failure = self._started.get()
        if failure is not None:
            self.stop()
            raise failure
        return self.addresses

    def stop(self) -> None:
        """The owner first, then the master, each with its time to leave. Idempotent; what was stored is gone."""
        if self._is_stopping:
            return
        self._is_stopping = True
        os.write(self._wake_write, b"x")
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def pids(self) -> dict[Part, int]:
        """Of the programs that run now."""
        return {part: program.process.pid for part, program in self._programs.items() if program.process is not None}

    # Everything below runs in the watching thread: the kernel ties a child to the thread that started it.

    def _watch(self) -> None:
        try:
            try:
                self._come_up()
            except Exception as error:  # noqa: BLE001 (raised again by start)
                self._started.put(error)
                return
            self._started.put(None)
            while not self._is_stopping:
                self._wait_for_an_event()
        finally:
            for part in ("client", "master"):
                _end(self._programs[part])

    def _come_up(self) -> None:
        give_up_at = time.monotonic() + _START_S
        with httpx.Client(base_url=f"http://{self.addresses.admin}", trust_env=False, timeout=_START_S) as admin:
            self._start(self._programs["master"])
            self._wait_until(lambda: _answers(admin, "/health"), self._programs["master"], give_up_at)
            self._start(self._programs["client"])
            self._wait_until(lambda: _answers(admin, "/get_all_segments"), self._programs["client"], give_up_at)

    def _wait_until(self, is_up: Callable[[], bool], program: _Program, give_up_at: float) -> None:
        while not is_up():
            assert program.process is not None
            code = program.process.poll()
            if code is not None or time.monotonic() > give_up_at or self._is_stopping:
                what = f"exited with code {code}" if code is not None else f"was not ready after {_START_S:g} s"
                raise FeatureStoreError(
                    f"mooncake_{program.part} {what}: {_last_words(program.log_file)} (log: {program.log_file})"
                )
            time.sleep(_POLL_S)

    def _wait_for_an_event(self) -> None:
        """A death, the end of a wait before a restart, or the call to stop."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        with contextlib.ExitStack() as opened:
            for program in self._programs.values():
                if program.process is not None:
                    descriptor = os.pidfd_open(program.process.pid)
                    opened.callback(os.close, descriptor)
                    poll.register(descriptor, select.POLLIN)
            due = [program.due_at for program in self._programs.values() if program.due_at is not None]
            poll.poll(max(0.0, min(due) - time.monotonic()) * 1000 if due else None)
        for program in self._programs.values():
            if self._is_stopping:
                return
            if program.process is not None and program.process.poll() is not None:
                self._died(program, program.process.returncode)
            elif program.due_at is not None and program.due_at <= time.monotonic():
                self._start(program)

    def _died(self, program: _Program, code: int) -> None:
        program.process = None
        delay_s = program.restarts.died()
        if delay_s is not None:
            program.due_at = time.monotonic() + delay_s
            return
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self._on_given_up(
            f"mooncake_{program.part} {what} and is not started again after {program.restarts.num_deaths} deaths in a "
            f"row: {_last_words(program.log_file)} (log: {program.log_file})"
        )

    def _start(self, program: _Program) -> None:
        program.due_at = None
        with program.log_file.open("ab") as log:
            program.process = subprocess.Popen(
                [sys.executable, "-I", "-S", die_with_parent.__file__, str(os.getpid()), *program.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"MC_LOG_LEVEL": "WARNING"} | os.environ,
                start_new_session=True,
            )
        program.restarts.started()


def warnings(config: MooncakeConfig) -> list[str]:
    """What a run with Mooncake opens, whatever is configured. For the plan."""
    text = (
        f"Mooncake: its transfer ports listen on all interfaces ({_ANY_HOST}), in every process of the run, on ports "
        f"between 12000 and 17000 that the library draws, although data_plane.mooncake.host is {config.host}; whoever "
        "reaches them can read and overwrite features: let only hosts of the run through"
    )
    return [text]


def _master_flags(addresses: ServiceAddresses, times: ServiceTimes) -> list[str]:
    (host, port), (admin_host, admin_port) = _split(addresses.master), _split(addresses.admin)
    return [
        f"--rpc_address={host}",
        f"--rpc_port={port}",
        f"--metrics_host={admin_host}",
        f"--metrics_port={admin_port}",
        f"--default_kv_lease_ttl={times.lease_s}s",
        f"--client_ttl={times.client_ttl_s}",
        f"--put_start_discard_timeout_sec={times.put_discard_s}",
        f"--put_start_release_timeout_sec={times.put_release_s}",
    ]


def _client_flags(config: MooncakeConfig, addresses: ServiceAddresses, segment_bytes: int, port: int) -> list[str]:
    return [
        f"--host={config.host}",
        f"--port={port}",
        f"--global_segment_size={segment_bytes}",
        "--local_buffer_size=0",
        f"--master_server_address={addresses.master}",
        f"--metadata_server={config.metadata_server}",
        f"--protocol={config.protocol}",
        f"--device_names={config.device}",
    ]


def _programs() -> Path:
    """Where the programs of the installed package are."""
    found = importlib.util.find_spec("mooncake")
    for place in found.submodule_search_locations or () if found else ():
        if (Path(place) / "mooncake_master").is_file():
            return Path(place)
    raise MissingExtraError("mooncake", "mooncake")


def _free_ports(host: str, count: int) -> list[int]:
    ports: list[int] = []
    for port in random.sample(_PORTS, 1000):
        if _is_free(host, port):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise ConfigError(
        f"data_plane.mooncake.host: no {count} free ports at {host} between {_PORTS.start} and {_PORTS.stop}; it must "
        "be an address of this host"
    )


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as listener:
        # As the programs do: connections of a server that is gone do not count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def _answers(admin: httpx.Client, path: str) -> bool:
    """Whether the master's HTTP says something, and not nothing, at ``path``."""
    try:
        response = admin.get(path)
    except httpx.TransportError:
        return False
    return response.status_code == httpx.codes.OK and bool(response.text.strip())


def _end(program: _Program) -> None:
    process, program.process = program.process, None
    if process is None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(log_file: Path) -> str:
    lines = log_file.read_text(errors="replace").strip().splitlines()
    # Errors and fatal errors begin with their letter and the month.
    errors = [line for line in lines if re.match(r"[EF]\d{4} ", line)]
    return (errors or lines or ["it said nothing"])[-1]


def _split(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    return host, port
