"""SqlMetadataStore: the ledger in a database. Every transition is one guarded statement, every call one transaction.

The statements are SQLAlchemy Core and the invariants are in ``schema``, so a second dialect needs another
``_open`` and nothing else. SQLite: write-ahead log, ``synchronous=FULL``, a 0600 file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, func, select

from specforge.contracts import codec
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata import schema
from specforge.control_plane.metadata.base import (
    Attempt,
    Dispatch,
    LedgerCounts,
    SampleRecord,
    SampleState,
    SlotState,
)
from specforge.control_plane.metadata.checks import (
    check_order_key,
    check_same_task,
    check_step,
    task_gap,
    unknown_sample,
)
from specforge.control_plane.metadata.schema import acks, run, samples, slots, tasks
from specforge.errors import ConfigError, ControlPlaneError, DataError, InvalidTransition

_MAGIC = b"SQLite format 3\0"
_CHUNK = 1000
"""Rows a statement where a call has no natural bound."""

_ATTEMPT = (samples.c.idx == bindparam("at_idx"), samples.c.generation == bindparam("at_generation"))
# Spelled out, because an IN list cannot be executed for many rows at once.
_LEASABLE = sa.or_(samples.c.state == SampleState.PENDING, samples.c.state == SampleState.RELEASED)
_LEASE = (
    samples.update()
    .where(samples.c.idx == bindparam("at_idx"), _LEASABLE)
    .values(state=SampleState.LEASED, generation=samples.c.generation + 1, worker_id=bindparam("to_worker"))
)
_REQUEUE = (
    samples.update()
    .where(*_ATTEMPT, samples.c.state == SampleState.LEASED)
    .values(state=SampleState.PENDING, worker_id=None)
)
_COMMIT = (
    samples.update()
    .where(*_ATTEMPT, samples.c.state == SampleState.LEASED)
    .values(state=SampleState.COMMITTED, worker_id=None, ref=bindparam("to_ref"))
)
_FAIL = (
    samples.update()
    .where(*_ATTEMPT, samples.c.state == SampleState.LEASED)
    .values(
        state=SampleState.PENDING,
        worker_id=None,
        num_failures=samples.c.num_failures + 1,
        reason=bindparam("to_reason"),
    )
)
_QUARANTINE = (
    samples.update()
    .where(samples.c.idx == bindparam("at_idx"), samples.c.state == SampleState.PENDING)
    .values(
        state=SampleState.QUARANTINED, reason=bindparam("to_reason"), quarantined_from=bindparam("to_quarantined_from")
    )
)
_RELEASE = (
    samples.update()
    .where(*_ATTEMPT, samples.c.state == SampleState.COMMITTED)
    .values(state=SampleState.RELEASED, ref=None)
)
# The SELECT gives no row, and so nothing is inserted, unless the sample is committed with that generation.
_DISPATCH = slots.insert().from_select(
    ["slot", "idx", "generation"],
    select(sa.cast(bindparam("at_slot"), sa.Integer), samples.c.idx, samples.c.generation).where(
        *_ATTEMPT, samples.c.state == SampleState.COMMITTED
    ),
)
_ACK = acks.insert()
_FORGET_IN_FLIGHT = (
    samples.update()
    .where(samples.c.state.in_((SampleState.LEASED, SampleState.COMMITTED)))
    .values(state=SampleState.PENDING, worker_id=None, ref=None)
)


class SqlMetadataStore:
    """The ledger of one run in the SQLite file ``path``, made if it is not there.

    A file of another schema version, or that is no ledger, is a ``ConfigError``. A database that cannot be
    written (disk full, read-only) is a ``ControlPlaneError`` and the call has changed nothing.
    """

    durable = True

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self._path = Path(path)
        self._lock = threading.RLock()
        self._engine, self._connection = _open(self._path, read_only=read_only)

    # The run

    def register(self, new_tasks: Sequence[PromptTask]) -> None:
        with self._transaction() as db:
            for start in range(0, len(new_tasks), _CHUNK):
                self._register(db, new_tasks[start : start + _CHUNK])

    def _register(self, db: sa.Connection, chunk: Sequence[PromptTask]) -> None:
        indices = [task.index for task in chunk]
        rows = db.execute(select(tasks.c.idx, tasks.c.body).where(tasks.c.idx.in_(indices)))
        recorded: dict[int, str] = {row.idx: row.body for row in rows}
        expected: int = db.scalar(select(func.coalesce(func.max(tasks.c.idx), -1) + 1)) or 0
        fresh: list[dict[str, Any]] = []
        for task in chunk:
            body = codec.dumps(task)
            if task.index in recorded:
                check_same_task(recorded[task.index] == body, task)
                continue
            if task.index != expected + len(fresh):
                raise task_gap(expected + len(fresh), task)
            fresh.append({"idx": task.index, "sample_id": task.sample_id, "body": body})
        if not fresh:
            return
        try:
            db.execute(tasks.insert(), fresh)
        except sa.exc.IntegrityError:
            raise DataError(
                f"a sample id among prompts {indices[0]} to {indices[-1]} is used twice; sample ids are unique in a run"
            ) from None
        new_rows = [
            {"idx": row["idx"], "state": SampleState.PENDING, "generation": 0, "num_failures": 0} for row in fresh
        ]
        db.execute(samples.insert(), new_rows)

    def bind(self, order_key: str) -> None:
        with self._transaction() as db:
            bound = db.scalar(select(run.c.value).where(run.c.key == "order_key"))
            check_order_key(bound, order_key)
            if bound is None:
                db.execute(run.insert(), {"key": "order_key", "value": order_key})

    def num_tasks(self) -> int:
        with self._transaction() as db:
            return db.scalar(select(func.coalesce(func.max(tasks.c.idx), -1) + 1)) or 0

    def tasks(self) -> Iterator[PromptTask]:
        start = 0
        while True:
            with self._transaction() as db:
                query = select(tasks.c.body).where(tasks.c.idx >= start).order_by(tasks.c.idx).limit(_CHUNK)
                bodies = list(db.scalars(query))
            yield from (codec.loads(PromptTask, body) for body in bodies)
            if len(bodies) < _CHUNK:
                return
            start += _CHUNK

    def find(self, sample_id: str) -> int | None:
        with self._transaction() as db:
            return db.scalar(select(tasks.c.idx).where(tasks.c.sample_id == sample_id))

    # Samples

    def lease(self, indices: Sequence[int], worker_id: str) -> list[int]:
        with self._transaction() as db:
            if len(set(indices)) != len(indices):
                raise InvalidTransition(f"a sample is leased twice in one call: {list(indices)}")
            rows = [{"at_idx": index, "to_worker": worker_id} for index in indices]
            _guarded(db, _LEASE, rows, "lease: not every sample is pending or released")
            query = select(samples.c.idx, samples.c.generation).where(samples.c.idx.in_(indices))
            generations = {row.idx: row.generation for row in db.execute(query)}
            return [generations[index] for index in indices]

    def requeue(self, attempts: Sequence[Attempt]) -> None:
        with self._transaction() as db:
            _guarded(db, _REQUEUE, _attempts(attempts), "requeue: not every attempt is leased")

    def commit(self, refs: Sequence[tuple[int, SampleRef]]) -> list[bool]:
        with self._transaction() as db:
            wanted = [index for index, _ in refs]
            query = select(samples.c.idx, samples.c.state, samples.c.generation).where(samples.c.idx.in_(wanted))
            known = {row.idx: row for row in db.execute(query)}
            accepted: list[bool] = []
            rows: dict[int, dict[str, Any]] = {}
            for index, ref in refs:
                if index not in known:
                    raise unknown_sample(index, len(known))
                live = known[index].generation == ref.generation
                accepted.append(
                    live and known[index].state in {SampleState.LEASED, SampleState.COMMITTED, SampleState.RELEASED}
                )
                if live and known[index].state == SampleState.LEASED:
                    body = codec.dumps(ref)
                    rows.setdefault(index, {"at_idx": index, "at_generation": ref.generation, "to_ref": body})
            _guarded(db, _COMMIT, list(rows.values()), "commit: a sample changed meanwhile")
            return accepted

    def fail(self, attempt: Attempt, reason: str) -> int:
        with self._transaction() as db:
            rows = [{**_attempts([attempt])[0], "to_reason": reason}]
            _guarded(
                db, _FAIL, rows, f"fail: sample {attempt.sample} is not leased with generation {attempt.generation}"
            )
            query = select(samples.c.num_failures).where(samples.c.idx == attempt.sample)
            return int(db.execute(query).scalar_one())

    def quarantine(self, index: int, from_slot: int, reason: str) -> None:
        with self._transaction() as db:
            rows = [{"at_idx": index, "to_reason": reason, "to_quarantined_from": from_slot}]
            _guarded(db, _QUARANTINE, rows, f"quarantine: sample {index} is not pending")

    def quarantined(self) -> dict[int, int]:
        with self._transaction() as db:
            query = select(samples.c.idx, samples.c.quarantined_from).where(samples.c.state == SampleState.QUARANTINED)
            return {row.idx: row.quarantined_from for row in db.execute(query)}

    def release(self, attempts: Sequence[Attempt]) -> None:
        with self._transaction() as db:
            _guarded(db, _RELEASE, _attempts(attempts), "release: not every sample is committed with that generation")

    # Slots

    def dispatch(self, entries: Sequence[Dispatch]) -> None:
        with self._transaction() as db:
            # One statement a row: drivers do not count the rows of INSERT ... SELECT over many parameter sets.
            for slot, index, generation in entries:
                row = {"at_slot": slot, "at_idx": index, "at_generation": generation}
                _guarded(
                    db, _DISPATCH, [row], f"dispatch: sample {index} is not committed with generation {generation}"
                )

    def ack(self, acked: Sequence[int], step: int) -> None:
        check_step(step)
        if not acked:
            return
        with self._transaction() as db:
            try:
                db.execute(_ACK, [{"slot": slot, "step": step} for slot in acked])
            except sa.exc.IntegrityError as error:
                raise InvalidTransition(
                    f"the ledger refused: ack: only a dispatched slot can be acked, and once ({error.orig})"
                ) from error

    def checkpointed(self, step: int) -> None:
        with self._transaction() as db:
            if step > _durable_step(db):
                _set_durable_step(db, step)

    def rewind(self, num_slots: int, step: int, sample_of: Callable[[int], int]) -> None:
        quarantined = self.quarantined()
        with self._transaction() as db:
            db.execute(acks.delete().where(acks.c.slot >= num_slots))
            db.execute(slots.delete().where(~sa.exists().where(acks.c.slot == slots.c.slot)))
            db.execute(acks.update().where(acks.c.step > step).values(step=step))
            missing: list[dict[str, int]] = []
            for slot in _gaps(db, num_slots):
                index = sample_of(slot)
                if index not in quarantined or slot < quarantined[index]:
                    missing.append({"slot": slot, "idx": index, "generation": 0})
            for start in range(0, len(missing), _CHUNK):
                chunk = missing[start : start + _CHUNK]
                db.execute(slots.insert(), chunk)
                db.execute(_ACK, [{"slot": row["slot"], "step": step} for row in chunk])
            db.execute(_FORGET_IN_FLIGHT)
            _set_durable_step(db, step)

    # Reading

    def sample(self, index: int) -> SampleRecord:
        with self._transaction() as db:
            row = db.execute(select(samples).where(samples.c.idx == index)).one_or_none()
            if row is None:
                raise unknown_sample(index, self.num_tasks())
            ref = None if row.ref is None else codec.loads(SampleRef, row.ref)
            return SampleRecord(SampleState(row.state), row.generation, row.num_failures, ref, row.reason)

    def slot_state(self, slot: int) -> SlotState:
        with self._transaction() as db:
            if db.scalar(select(slots.c.slot).where(slots.c.slot == slot)) is None:
                return SlotState.OPEN
            step = db.scalar(select(acks.c.step).where(acks.c.slot == slot))
            if step is None:
                return SlotState.DISPATCHED
            return SlotState.DURABLE if step <= _durable_step(db) else SlotState.TRAINED

    def slot_step(self, slot: int) -> int | None:
        with self._transaction() as db:
            return db.scalar(select(acks.c.step).where(acks.c.slot == slot))

    def counts(self) -> LedgerCounts:
        with self._transaction() as db:
            durable_step = _durable_step(db)
            in_flight = (SampleState.LEASED, SampleState.COMMITTED, SampleState.QUARANTINED)
            query = (
                select(samples.c.state, func.count()).where(samples.c.state.in_(in_flight)).group_by(samples.c.state)
            )
            by_state: Mapping[str, int] = {row[0]: row[1] for row in db.execute(query)}
            num_trained = _count(db, select(func.count()).select_from(acks))
            distinct = select(func.count(sa.distinct(slots.c.idx))).join(acks, acks.c.slot == slots.c.slot)
            return LedgerCounts(
                num_samples=self.num_tasks(),
                num_leased=by_state.get(SampleState.LEASED, 0),
                num_committed=by_state.get(SampleState.COMMITTED, 0),
                num_quarantined=by_state.get(SampleState.QUARANTINED, 0),
                num_slots_dispatched=_count(db, select(func.count()).select_from(slots)) - num_trained,
                num_slots_trained=num_trained,
                num_slots_durable=_count(db, select(func.count()).where(acks.c.step <= durable_step)),
                num_unique_samples_trained=_count(db, distinct),
                last_step=_count(db, select(func.coalesce(func.max(acks.c.step), 0))),
                durable_step=durable_step,
            )

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """One transaction; nested use joins the outer one. Refusals of the database become ours."""
        with self._lock:
            if self._connection.in_transaction():
                yield self._connection
                return
            try:
                with self._connection.begin():
                    yield self._connection
            except sa.exc.IntegrityError as error:
                raise InvalidTransition(f"the ledger refused: {error.orig}") from error
            except sa.exc.DBAPIError as error:
                raise ControlPlaneError(
                    f"the ledger {self._path} could not be used: {error.orig}; check free space and permissions, "
                    "then resume the run"
                ) from error


def ledger_summary(path: str | Path) -> dict[str, int]:
    """The counts of the ledger in ``path``, opened read-only; a live run is not disturbed."""
    store = SqlMetadataStore(path, read_only=True)
    try:
        return asdict(store.counts())
    finally:
        store.close()


def _open(path: Path, *, read_only: bool) -> tuple[sa.Engine, sa.Connection]:
    if read_only and not path.is_file():
        raise ConfigError(f"expected a ledger at {path}, got no such file; give the directory of a run")
    if not read_only:
        _make_private(path)
    mode = "ro" if read_only else "rw"
    url = sa.URL.create("sqlite", database=f"file:{path.absolute()}", query={"mode": mode, "uri": "true"})
    engine = sa.create_engine(url, poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
    sa.event.listen(engine, "connect", _configure_read_only if read_only else _configure)
    # Transactions are ours, not the driver's; IMMEDIATE takes the write lock before the first read of a transition.
    sa.event.listen(engine, "begin", lambda db: db.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE"))
    try:
        connection = engine.connect()
        try:
            with connection.begin():
                if not read_only and _is_new(connection):
                    schema.metadata.create_all(connection)
                    facts = {"schema_version": schema.SCHEMA_VERSION, "durable_step": 0}
                    connection.execute(run.insert(), [{"key": key, "value": str(v)} for key, v in facts.items()])
                else:
                    _check_version(connection, path)
        except BaseException:
            connection.close()
            raise
    except sa.exc.DatabaseError as error:
        engine.dispose()
        raise ConfigError(
            f"expected a ledger at {path}, got a file that cannot be used as one ({error.orig}); "
            "give the ledger of a run, or another path for a new one"
        ) from error
    except BaseException:
        engine.dispose()
        raise
    return engine, connection


def _make_private(path: Path) -> None:
    """Make the file 0600 if it is not there; what is no database is left as it is."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(
            f"the ledger {path} cannot be opened for writing ({error.strerror}); choose a writable directory"
        ) from error
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start not in (b"", _MAGIC):
        raise ConfigError(
            f"expected a ledger at {path}, got a file that cannot be used as one (it is no database); "
            "give the ledger of a run, or another path for a new one"
        )


def _is_new(db: sa.Connection) -> bool:
    """No table is there yet: the file was just made, or whoever made it was killed before its first transaction."""
    return not db.scalar(sa.text("SELECT count(*) FROM sqlite_master"))


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _configure_read_only(connection: Any, _record: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout=10000")


def _check_version(db: sa.Connection, path: Path) -> None:
    found = db.scalar(select(run.c.value).where(run.c.key == "schema_version"))
    if found != str(schema.SCHEMA_VERSION):
        raise ConfigError(
            f"the ledger {path} has schema version {found}, this build reads version {schema.SCHEMA_VERSION}; "
            "finish the run with the build that started it, or start a new run in an empty directory"
        )


def _guarded(db: sa.Connection, statement: Any, rows: Sequence[Mapping[str, Any]], refusal: str) -> None:
    """Execute ``statement`` once a row; unless every execution changed one row, refuse (and roll back)."""
    if rows and db.execute(statement, rows if len(rows) > 1 else rows[0]).rowcount != len(rows):
        raise InvalidTransition(f"the ledger refused: {refusal}")


def _attempts(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    return [{"at_idx": index, "at_generation": generation} for index, generation in attempts]


def _gaps(db: sa.Connection, num_slots: int) -> list[int]:
    """Slot numbers below ``num_slots`` without an ack."""
    missing: list[int] = []
    expected = 0
    for slot in db.scalars(select(acks.c.slot).where(acks.c.slot < num_slots).order_by(acks.c.slot)):
        missing.extend(range(expected, slot))
        expected = slot + 1
    missing.extend(range(expected, num_slots))
    return missing


def _count(db: sa.Connection, query: sa.Executable) -> int:
    return int(db.execute(query).scalar_one())


def _durable_step(db: sa.Connection) -> int:
    return int(db.execute(select(run.c.value).where(run.c.key == "durable_step")).scalar_one())


def _set_durable_step(db: sa.Connection, step: int) -> None:
    db.execute(run.update().where(run.c.key == "durable_step").values(value=str(step)))
