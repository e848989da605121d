"""The connection of the ledger: one writer, one transaction at a time. ``sqlite`` and ``postgres`` open it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa

from specforge.control_plane.metadata import schema
from specforge.control_plane.metadata.statements import FACT, SET_FACT
from specforge.errors import ConfigError, ControlPlaneError, InvalidTransition
from specforge.faults import fault_point

ResultT = TypeVar("ResultT")


class Database(ABC):
    """One connection, used by one thread at a time. ``label`` names the database in messages."""

    def __init__(self, label: str, engine: sa.Engine, *, read_only: bool) -> None:
        self.label = label
        self._engine = engine
        self._read_only = read_only
        self._lock = threading.RLock()
        self._connection: sa.Connection | None = None
        self._depth = 0
        self._failure: BaseException | None = None
        self._wrote = False
        self._closed = False
        self._texts: dict[sa.ClauseElement, str] = {}

    @property
    def connection(self) -> sa.Connection:
        """Inside ``transact`` only."""
        assert self._connection is not None
        return self._connection

    def transact(self, work: Callable[[], ResultT], *, writes: bool) -> ResultT:
        """Run ``work`` in a transaction, joining the one that is open.

        What was refused inside stays refused: the outermost call rolls back and raises it, even where ``work`` went
        on. Refusals of the database become ``InvalidTransition``, its failures ``ControlPlaneError``.
        """
        with self._lock:
            if self._closed:
                raise ControlPlaneError(f"the ledger {self.label} is closed; open it again")
            if self._depth == 0:
                return self._outermost(work, writes)
            self._wrote = self._wrote or writes
            self._depth += 1
            try:
                return work()
            except sa.exc.DBAPIError as error:
                self._failure = self._failure or error
                raise self._ours(error) from error
            except BaseException as error:
                self._failure = self._failure or error
                raise
            finally:
                self._depth -= 1

    def execute(self, statement: sa.ClauseElement, rows: Sequence[Mapping[str, Any]]) -> int:
        """Run ``statement``, whose parameters are all named in every row, once a row; how many rows of a table that
        changed. Only the text is SQLAlchemy's: its binding of every single value would cost more than SQLite's work.
        """
        text = self._texts.get(statement)
        if text is None:
            # Both drivers take mappings, by "%(name)s" and by ":name".
            style = {"paramstyle": "named"} if self._engine.dialect.name == "sqlite" else {}
            text = self._texts[statement] = str(statement.compile(dialect=type(self._engine.dialect)(**style)))
        done = self.connection.exec_driver_sql(
            text, list(rows) if len(rows) > 1 else rows[0], execution_options={"preserve_rowcount": True}
        )
        return done.rowcount

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed = True
            self._disconnect()
            self._engine.dispose()

    def _outermost(self, work: Callable[[], ResultT], writes: bool) -> ResultT:
        try:
            return self._run(work, writes)
        except sa.exc.DBAPIError as error:
            raise self._ours(error) from error

    def _run(self, work: Callable[[], ResultT], writes: bool) -> ResultT:
        if self._connection is None:
            self._open()
        return self._once(work, writes)

    def _once(self, work: Callable[[], ResultT], writes: bool) -> ResultT:
        self._failure, self._wrote, self._depth = None, writes, 1
        try:
            self.connection.begin()
            result = work()
            self._commit(result)
        except BaseException as error:
            self._roll_back()
            if self._failure is not None and self._failure is not error:
                raise self._failure from error
            raise
        finally:
            self._depth, self._failure = 0, None
        return result

    def _commit(self, result: object) -> None:
        if self._failure is not None:
            raise self._failure
        self._sign(result)
        fault_point("ledger.before_commit")
        try:
            self.connection.commit()
        except BaseException:
            # The transaction may be open still, where nobody would roll it back.
            self._disconnect()
            raise

    def _sign(self, result: object) -> None:  # noqa: B027
        """The last word of a transaction that gives ``result`` if its commit succeeds."""

    def _roll_back(self) -> None:
        # A database that failed (disk full, I/O error, a server gone) may have rolled back by itself.
        try:
            if self._connection is not None:
                self._connection.rollback()
        except sa.exc.DBAPIError:
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sa.exc.DBAPIError:
                connection.invalidate()

    def _open(self) -> None:
        try:
            self._connect()
        except BaseException:
            self._disconnect()
            raise

    @abstractmethod
    def _connect(self) -> None:
        """Make the connection, and the tables where there are none; what is no ledger is a ``ConfigError``."""

    def _prepare(self) -> None:
        """Make the tables in an empty database, or check that they are ours."""
        with self.connection.begin():
            if not self._read_only and self._is_empty():
                schema.metadata.create_all(self.connection, checkfirst=False)
                facts = {"schema_version": schema.SCHEMA_VERSION, "durable_step": 0, "last_transaction": ""}
                self.execute(SET_FACT, [{"at_key": key, "to_value": str(value)} for key, value in facts.items()])
                return
            version = self.connection.scalar(FACT, {"key": "schema_version"})
        if version != str(schema.SCHEMA_VERSION):
            raise ConfigError(
                f"the ledger {self.label} has schema version {version}, this build reads version "
                f"{schema.SCHEMA_VERSION}; resume with the version of SpecForge that started the run, or start a new "
                "run in an empty directory"
            )

    @abstractmethod
    def _is_empty(self) -> bool:
        """No table is there yet: the database was just made, or whoever made it was killed before it had tables."""

    def _no_ledger(self, why: object) -> ConfigError:
        return ConfigError(
            f"expected a ledger at {self.label}, got something that cannot be used as one ({first_line(why)}); "
            "give the ledger of a run, or another place for a new one"
        )

    def _ours(self, error: sa.exc.DBAPIError) -> ControlPlaneError:
        why = first_line(error.orig)
        if isinstance(error, sa.exc.IntegrityError):
            return InvalidTransition(f"the ledger refused: {why}")
        return ControlPlaneError(
            f"the ledger {self.label} could not be used: {why}; check free space and permissions, then resume the run"
        )


def first_line(why: object) -> str:
    return str(why).strip().partition("\n")[0]
