"""The ledger in a SQLite file: write-ahead log, ``synchronous=FULL``, mode 0600."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from specforge.control_plane.metadata.database import Database
from specforge.errors import ConfigError

_MAGIC = b"SQLite format 3\0"


class SqliteDatabase(Database):
    """The file ``path``, made if it is not there."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        if read_only and not path.is_file():
            raise ConfigError(f"expected a ledger at {path}, got no such file; give the directory of a run")
        self._path = path
        mode = "ro" if read_only else "rw"
        url = sa.URL.create("sqlite", database=f"file:{path.absolute()}", query={"mode": mode, "uri": "true"})
        engine = sa.create_engine(url, poolclass=sa.pool.NullPool, connect_args={"check_same_thread": False})
        sa.event.listen(engine, "connect", _configure_reader if read_only else _configure_writer)
        # Transactions are ours, not the driver's; IMMEDIATE takes the write lock before the first read of a transition.
        begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        sa.event.listen(engine, "begin", lambda db: db.exec_driver_sql(begin))
        super().__init__(str(path), engine, read_only=read_only)
        try:
            if not read_only:
                self._make_private()
            self._open()
        except sa.exc.DatabaseError as error:
            self.close()
            raise self._no_ledger(error.orig) from error
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        self._connection = self._engine.connect()
        self._prepare()

    def _make_private(self) -> None:
        """Make the file 0600 if it is not there; what is no database is left as it is."""
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise ConfigError(
                f"the ledger {self._path} cannot be opened for writing ({error.strerror}); choose a writable directory"
            ) from error
        with self._path.open("rb") as file:
            start = file.read(len(_MAGIC))
        if start not in (b"", _MAGIC):
            raise self._no_ledger("it is no database")

    def _is_empty(self) -> bool:
        return not self.connection.scalar(sa.text("SELECT count(*) FROM sqlite_master"))


def _configure_writer(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    # cache_size is in KiB, if negative. Prompts are read in random order: of a million of them a larger cache holds too
    # few to help, and SQLite then takes fresh memory for every page. Each of their leases changes a page of its own: a
    # log of 16,000 pages (64 MB) holds most of those pages several times before they are copied.
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=10000",
        "cache_size=-8192",
        "wal_autocheckpoint=16000",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _configure_reader(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout=10000")
