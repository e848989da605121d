"""A real PostgreSQL server for tests: started, stopped and killed at will, on loopback, with ``fsync`` on.

The programs come from the ``pgserver`` wheel, or from an installation on ``PATH``. PostgreSQL refuses to run as root;
root's server runs as the user ``nobody``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_USER = "specforge"
_DEADLINE_S = 60.0


class PostgresServer:
    """A cluster in ``directory``, made at the first start; it keeps its port, and so its URL, over restarts.

    The password of its only user is ``password``; ``environment`` is how libpq, in any process, gets to know it. As
    root, ``directory`` has to be one that others may reach.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.password = secrets.token_hex(16)
        self.environment = {"PGPASSWORD": self.password}
        self._data = directory / "data"
        self._log = directory / "log"
        self._programs = _programs()
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://{_USER}@127.0.0.1:{self._port}/postgres"

    def start(self) -> str:
        """Serve; answers the URL once the server takes connections."""
        if self._process is not None:
            raise RuntimeError("the server runs already; stop it before it is started again")
        if not self._data.exists():
            self._make_cluster()
        deadline = time.monotonic() + _DEADLINE_S
        process = self._spawn()
        while not self._is_ready():
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise RuntimeError(f"the PostgreSQL server in {self.directory} did not start: {self._last_words()}")
            time.sleep(0.02)
            # The children of a server that was killed outlive it for a moment, and no other starts beside them.
            if process.poll() is not None:
                process = self._spawn()
        self._process = process
        return self.url

    def _spawn(self) -> subprocess.Popen[bytes]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self._port,
            "unix_socket_directories": "",
            "fsync": "on",
            "shared_buffers": "16MB",
            "max_connections": 20,
        }
        arguments = [item for key, value in settings.items() for item in ("-c", f"{key}={value}")]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, *arguments], stdout=log, stderr=log, **_unprivileged()
            )

    def stop(self) -> None:
        """In good order, sessions cut off. Without effect where it does not run."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """``kill -9`` of the server; its children follow when they notice. What was committed is recovered."""
        self._end(signal.SIGKILL)

    def restart(self, *, kill: bool = True) -> str:
        """Down and up again on the same port."""
        if kill:
            self.kill()
        else:
            self.stop()
        return self.start()

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(timeout=_DEADLINE_S)

    def _make_cluster(self) -> None:
        owner = _unprivileged().get("user")
        if owner is not None:
            os.chown(self.directory, owner, -1)
        secret = self.directory / "password"
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        if owner is not None:
            os.chown(secret, owner, -1)
        options = ("-U", _USER, f"--pwfile={secret}", "-A", "scram-sha-256", "-E", "UTF8", "--no-locale")
        done = subprocess.run(
            [str(self._programs / "initdb"), "-D", str(self._data), *options],
            check=False,
            capture_output=True,
            text=True,
            **_unprivileged(),
        )
        secret.unlink()
        if done.returncode:
            raise RuntimeError(f"initdb failed in {self.directory}: {done.stderr.strip()}")

    def _is_ready(self) -> bool:
        import psycopg  # noqa: PLC0415

        try:
            psycopg.connect(self.url, password=self.password, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


@contextlib.contextmanager
def temporary_server() -> Iterator[PostgresServer]:
    """A running server in a directory of its own, which goes with it. ``PGPASSWORD`` is set meanwhile."""
    directory = Path(tempfile.mkdtemp(prefix="specforge-postgres-"))
    server = PostgresServer(directory)
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(directory)


def _programs() -> Path:
    """Where ``initdb`` and ``postgres`` are."""
    wheel = importlib.util.find_spec("pgserver")
    for place in wheel.submodule_search_locations or () if wheel else ():
        if (programs := Path(place) / "pginstall" / "bin").is_dir():
            return programs
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    raise RuntimeError("no PostgreSQL server is installed; pip install 'specforge[dev]', or put postgres on PATH")


def _unprivileged() -> dict[str, Any]:
    """What makes a child of root run as somebody else; nothing where this process is not root's."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": "/"}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
