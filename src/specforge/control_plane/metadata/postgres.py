"""The ledger in a PostgreSQL database: a schema of its own, ``synchronous_commit=on``, an advisory lock that keeps a
second writer out, and a connection that is made again when the server went away.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa

from specforge.control_plane.metadata.database import Database, first_line
from specforge.control_plane.metadata.statements import FACT, SIGN
from specforge.errors import ConfigError, ControlPlaneError, MissingExtraError

ResultT = TypeVar("ResultT")

_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_OPENING_S = 30.0
"""How long opening waits for a server that starts or for the lock of a writer that dies; longer is for a person."""
_KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}


class PostgresDatabase(Database):
    """The schema ``name`` in the database at ``url``, made if it is not there.

    A lost connection is made again for up to ``retry_s``, and the transaction that it cut off is run again unless it
    had been committed. The password comes from where libpq looks for it: ``PGPASSWORD`` or a pgpass file.
    """

    def __init__(self, url: str, name: str, *, read_only: bool, retry_s: float) -> None:
        self._name = name
        self._retry_s = retry_s
        self._tokens: set[str] = set()
        """Those that can be the last transaction of the ledger: any other is one of another process."""
        self._answer: tuple[str, object] | None = None
        self._lost_outcome: ControlPlaneError | None = None
        """Token and result of the transaction that is being committed."""
        connect = _postgres_connector(url, name, read_only=read_only)
        engine = sa.create_engine("postgresql+psycopg://", creator=connect, poolclass=sa.pool.NullPool)
        super().__init__(f"{url} (schema {name})", engine, read_only=read_only)
        patience = _Patience(min(retry_s, _OPENING_S))
        try:
            while self._connection is None:
                try:
                    self._open()
                except sa.exc.OperationalError as error:
                    if not patience.wait():
                        raise self._unreachable(error) from error
        except sa.exc.DBAPIError as error:
            self.close()
            raise self._no_ledger(error.orig) from error
        except BaseException:
            self.close()
            raise

    def _unreachable(self, error: sa.exc.DBAPIError) -> ConfigError:
        if _is_lock_timeout(error):
            return ConfigError(
                f"the ledger {self.label} is in use by another process; wait until it ends, or give this run another "
                "name for its ledger"
            )
        return ConfigError(
            f"the ledger {self.label} cannot be opened ({first_line(error.orig)}); check that the server runs, its "
            "address, and PGPASSWORD or the pgpass file"
        )

    def _connect(self) -> None:
        self._connection = self._engine.connect()
        if not self._read_only:
            self._take_lock()
            with self._connection.begin():
                self._connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {self._name}")
        self._prepare()
        if self._read_only:
            return
        with self._connection.begin():
            last: str = self._connection.scalar(FACT, {"key": "last_transaction"}) or ""
        if self._tokens and last not in self._tokens:
            raise ControlPlaneError(
                f"another process has written to the ledger {self.label} while this one had lost its connection; "
                "this run is over, the other one goes on"
            )
        self._tokens = {last}

    def _take_lock(self) -> None:
        """One writer: the lock belongs to the session, and goes with the transaction that it left open."""
        key = int.from_bytes(hashlib.sha256(f"specforge/{self._name}".encode()).digest()[:8], signed=True)
        with self.connection.begin():
            self.connection.exec_driver_sql("SET LOCAL lock_timeout = '1s'")
            self.connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": key})

    def _is_empty(self) -> bool:
        count = sa.text("SELECT count(*) FROM information_schema.tables WHERE table_schema = :name")
        return not self.connection.scalar(count, {"name": self._name})

    def _run(self, work: Callable[[], ResultT], writes: bool) -> ResultT:
        if self._lost_outcome is not None:
            raise ControlPlaneError(str(self._lost_outcome))
        patience: _Patience | None = None
        self._answer = None
        while True:
            try:
                if self._connection is None:
                    self._open()
                    if self._answer is not None and self._answer[0] in self._tokens:
                        return self._answer[1]
                return self._once(work, writes)
            except sa.exc.DBAPIError as error:
                if not self._is_lost(error):
                    raise
                self._disconnect()
                patience = patience or _Patience(self._retry_s)
                if not patience.wait():
                    gone = ControlPlaneError(
                        f"the ledger {self.label} could not be reached for {self._retry_s:g} s "
                        f"({first_line(error.orig)}); start its server, then resume the run"
                    )
                    if self._answer is not None:
                        # Nobody knows whether the transaction happened: only a reconciliation, at a restart, can tell.
                        self._lost_outcome = gone
                    raise gone from error

    def _is_lost(self, error: sa.exc.DBAPIError) -> bool:
        """Whether ``error`` says that there is no connection: it broke, or could not be made."""
        is_down = self._connection is None and isinstance(error, sa.exc.OperationalError)
        return is_down or error.connection_invalidated

    def _sign(self, result: object) -> None:
        if not self._wrote or self._read_only:
            self._answer = None
            return
        token = uuid.uuid4().hex
        self.execute(SIGN, [{"to_value": token}])
        self._tokens.add(token)
        self._answer = (token, result)

    def _once(self, work: Callable[[], ResultT], writes: bool) -> ResultT:
        result = super()._once(work, writes)
        if self._answer is not None:
            self._tokens = {self._answer[0]}
        return result


class _Patience:
    """Waits longer each time, until ``limit_s`` are over."""

    def __init__(self, limit_s: float) -> None:
        self._deadline = time.monotonic() + limit_s
        self._pause_s = 0.05

    def wait(self) -> bool:
        """False when there is no time left."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(self._pause_s, left_s))
        self._pause_s = min(2.0, self._pause_s * 2)
        return True


def _postgres_connector(url: str, name: str, *, read_only: bool) -> Callable[[], Any]:
    try:
        import psycopg  # noqa: PLC0415
        from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415
    except ImportError:
        raise MissingExtraError("psycopg", "postgres") from None
    if not _SCHEMA_NAME.fullmatch(name):
        raise ConfigError(
            f"the ledger's name should be lower-case letters, digits and underscores, at most 63, got {name!r}"
        )
    try:
        parts = conninfo_to_dict(url)
    except psycopg.Error:
        raise ConfigError("the ledger's URL should look like postgresql://user@host:port/database") from None
    if "password" in parts:
        raise ConfigError(
            "the ledger's URL holds a password, which would show in logs and files; take it out and give it in the "
            "environment variable PGPASSWORD or in a pgpass file"
        )
    settings = {
        "search_path": name,
        "synchronous_commit": "on",
        "default_transaction_read_only": "on" if read_only else "off",
        # A writer whose host is gone loses its lock after half a minute.
        "tcp_keepalives_idle": "10",
        "tcp_keepalives_interval": "5",
        "tcp_keepalives_count": "3",
    }
    options = " ".join(f"-c {key}={value}" for key, value in settings.items())

    def connect() -> Any:
        return psycopg.connect(url, options=options, application_name="specforge", connect_timeout=10, **_KEEPALIVE)

    return connect


def _is_lock_timeout(error: sa.exc.DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) == "55P03"
