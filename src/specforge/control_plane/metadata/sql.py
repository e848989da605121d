"""SqlMetadataStore: the ledger in a database. Every transition is one guarded statement a table, in one transaction.

The SQL is in ``statements``, the invariants are in ``schema``; ``database`` is the connection, which ``sqlite`` and
``postgres`` open.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa

from specforge.contracts import codec
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata import statements as sql
from specforge.control_plane.metadata.base import (
    Attempt,
    Dispatch,
    LedgerCounts,
    LiveAttempt,
    Position,
    Quarantine,
    SampleRecord,
    SampleState,
    SlotState,
)
from specforge.control_plane.metadata.checks import (
    Skips,
    check_order_key,
    check_position,
    check_same_task,
    check_step,
    missing_quarantines,
    task_gap,
    unknown_sample,
)
from specforge.control_plane.metadata.database import Database
from specforge.control_plane.metadata.postgres import PostgresDatabase
from specforge.control_plane.metadata.sqlite import SqliteDatabase
from specforge.errors import DataError, InvalidTransition

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

Rows = Sequence[Mapping[str, Any]]

_SLOTS_READ = 20_000
"""How many slots are looked at together where every one of a run is."""


def _transaction(
    *, writes: bool
) -> Callable[
    [Callable[Concatenate[SqlMetadataStore, ParamsT], ResultT]],
    Callable[Concatenate[SqlMetadataStore, ParamsT], ResultT],
]:
    """The method is one transaction, or a part of the one around it."""

    def wrap(
        method: Callable[Concatenate[SqlMetadataStore, ParamsT], ResultT],
    ) -> Callable[Concatenate[SqlMetadataStore, ParamsT], ResultT]:
        @functools.wraps(method)
        def joined(store: SqlMetadataStore, /, *args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
            return store.database.transact(lambda: method(store, *args, **kwargs), writes=writes)

        return joined

    return wrap


_reads = _transaction(writes=False)
_writes = _transaction(writes=True)


class SqlMetadataStore:
    """The ledger of one run: in the SQLite file ``where``, or in the schema ``name`` of the PostgreSQL database
    ``where`` (``postgresql://user@host:port/database``). It is made if it is not there.

    A ledger of another schema version, one that is in use, or what is no ledger is a ``ConfigError``. A database that
    cannot be written (disk full, read-only) or stays away for more than ``retry_s`` (PostgreSQL only) is a
    ``ControlPlaneError``, and the transaction has changed nothing.
    """

    durable = True
    keeps_history = True

    def __init__(
        self, where: str | Path, *, name: str = "specforge", read_only: bool = False, retry_s: float = 60.0
    ) -> None:
        self.database: Database
        if isinstance(where, str) and where.startswith("postgresql://"):
            self.database = PostgresDatabase(where, name, read_only=read_only, retry_s=retry_s)
        else:
            self.database = SqliteDatabase(Path(where), read_only=read_only)

    def transact(self, work: Callable[[], ResultT]) -> ResultT:
        return self.database.transact(work, writes=False)

    def close(self) -> None:
        self.database.close()

    # The run

    @_writes
    def register(self, new_tasks: Sequence[PromptTask]) -> None:
        num_known = self.num_tasks()
        for start in range(0, len(new_tasks), sql.CHUNK):
            num_known += self._register(new_tasks[start : start + sql.CHUNK], num_known)

    def _register(self, chunk: Sequence[PromptTask], num_known: int) -> int:
        """How many of them the ledger had not known."""
        recorded = self._bodies([task.index for task in chunk if task.index < num_known])
        fresh: list[dict[str, Any]] = []
        for task in chunk:
            body = codec.dumps(task)
            if task.index in recorded:
                check_same_task(recorded[task.index] == body, task)
                continue
            if task.index != num_known + len(fresh):
                raise task_gap(num_known + len(fresh), task)
            fresh.append({"at_idx": task.index, "at_sample_id": task.sample_id, "to_body": body})
        try:
            self._execute(sql.ENTER_TASK, fresh)
        except sa.exc.IntegrityError:
            raise DataError(
                f"a sample id among prompts {chunk[0].index} to {chunk[-1].index} is used twice; "
                "sample ids are unique in a run"
            ) from None
        self._execute(sql.ENTER_SAMPLE, [{"at_idx": row["at_idx"]} for row in fresh])
        return len(fresh)

    @_writes
    def bind(self, order_key: str) -> None:
        bound: str | None = self._scalar(sql.FACT, key="order_key")
        check_order_key(bound, order_key)
        if bound is None:
            self._execute(sql.SET_FACT, [{"at_key": "order_key", "to_value": order_key}])

    @_reads
    def num_tasks(self) -> int:
        return self._number(sql.NUM_TASKS)

    def tasks(self) -> Iterator[PromptTask]:
        first = 0
        while bodies := self._bodies_from(first):
            yield from (codec.loads(PromptTask, body) for body in bodies)
            first += len(bodies)

    @_reads
    def _bodies_from(self, first: int) -> list[str]:
        return list(self._connection.scalars(sql.TASKS_FROM, {"first": first}))

    @_reads
    def tasks_at(self, indices: Sequence[int]) -> list[PromptTask]:
        bodies = self._bodies(indices)
        for index in indices:
            if index not in bodies:
                raise unknown_sample(index, self.num_tasks())
        return [codec.loads(PromptTask, bodies[index]) for index in indices]

    def _bodies(self, indices: Sequence[int]) -> dict[int, str]:
        return {row.idx: row.body for row in self._at(sql.TASKS_AT, indices)}

    @_reads
    def find(self, sample_id: str) -> int | None:
        found: int | None = self._scalar(sql.FIND, sample_id=sample_id)
        return found

    # Responses

    @_writes
    def record(self, index: int, response: Sequence[int]) -> tuple[int, ...]:
        body = json.dumps(list(response), separators=(",", ":"))
        self._execute(sql.RECORD, [{"at_idx": index, "to_num_tokens": len(response), "to_body": body}])
        found = self.responses_at([index])
        if index not in found:
            raise unknown_sample(index, self.num_tasks())
        return found[index]

    @_reads
    def responses_at(self, indices: Sequence[int]) -> dict[int, tuple[int, ...]]:
        return {row.idx: tuple(json.loads(row.body)) for row in self._at(sql.RESPONSES_AT, indices)}

    def response_lengths(self) -> Iterator[tuple[int, int]]:
        first = 0
        while found := self._lengths_from(first):
            yield from found
            first = found[-1][0] + 1

    @_reads
    def _lengths_from(self, first: int) -> list[tuple[int, int]]:
        rows = self._connection.execute(sql.RESPONSE_LENGTHS, {"first": first})
        return [(row.idx, row.num_tokens) for row in rows]

    # Samples

    @_writes
    def lease(self, indices: Sequence[int], worker_id: str) -> list[int]:
        if len(set(indices)) != len(indices):
            raise InvalidTransition(f"a sample is leased twice in one call: {list(indices)}")
        self._guarded(sql.LEASE, [{"at_idx": index} for index in indices], "lease: not every sample can be leased")
        rows = [{"at_idx": index, "to_worker": worker_id} for index in indices]
        self._guarded(sql.GO_LIVE, rows, "lease: not every sample can be leased")
        generations = {row.idx: row.generation for row in self._at(sql.LIVE_AT, indices)}
        return [generations[index] for index in indices]

    @_writes
    def requeue(self, attempts: Sequence[Attempt]) -> None:
        self._guarded(sql.END_LEASED, _attempts(attempts), "requeue: not every attempt is leased")
        self._put_back(sql.PUT_BACK, attempts)

    @_writes
    def crash(self, attempts: Sequence[Attempt]) -> list[int]:
        self._guarded(sql.END_LEASED, _attempts(attempts), "crash: not every attempt is leased")
        self._put_back(sql.PUT_BACK_CRASHED, attempts)
        indices = [attempt.sample for attempt in attempts]
        num_crashes = {row.idx: row.num_crashes for row in self._at(sql.AT_REST, indices)}
        return [num_crashes[index] for index in indices]

    @_reads
    def crashed(self, at_least: int) -> dict[int, int]:
        return {row.idx: row.num_crashes for row in self._connection.execute(sql.CRASHED, {"at_least": at_least})}

    @_writes
    def acquit(self, indices: Sequence[int]) -> None:
        self._execute(sql.ACQUIT, [{"at_idx": index} for index in indices])

    @_writes
    def commit(self, refs: Sequence[tuple[int, SampleRef]]) -> list[bool]:
        known = {row.idx: row for row in self._at(sql.LIVE_AT, [index for index, _ in refs])}
        at_rest = [index for index, _ in refs if index not in known]
        known.update((row.idx, row) for row in self._at(sql.AT_REST, at_rest))
        accepted: list[bool] = []
        rows: dict[int, dict[str, Any]] = {}
        for index, ref in refs:
            if index not in known:
                raise unknown_sample(index, self.num_tasks())
            state, is_last = known[index].state, known[index].generation == ref.generation
            accepted.append(is_last and state in {SampleState.LEASED, SampleState.COMMITTED, SampleState.RELEASED})
            if is_last and state == SampleState.LEASED and index not in rows:
                rows[index] = {"at_idx": index, "at_generation": ref.generation, "to_ref": codec.dumps(ref)}
        self._guarded(sql.COMMIT, list(rows.values()), "commit: a sample changed meanwhile")
        return accepted

    @_writes
    def fail(self, attempt: Attempt, reason: str) -> int:
        refusal = f"fail: sample {attempt.sample} is not leased with generation {attempt.generation}"
        self._guarded(sql.END_LEASED, _attempts([attempt]), refusal)
        self._execute(sql.PUT_BACK_FAILED, [{"at_idx": attempt.sample, "to_reason": reason}])
        return self.sample(attempt.sample).num_failures

    @_writes
    def quarantine(self, index: int, from_slot: int, reason: str) -> None:
        self._execute(sql.FORGET_OPEN_QUARANTINE, [{"at_idx": index}])
        self._enter_quarantine(Quarantine(index, from_slot, None, reason))
        row = {"at_idx": index, "at_from_slot": from_slot, "to_reason": reason}
        self._guarded(sql.QUARANTINE, [row], f"quarantine: sample {index} is not pending")

    def _enter_quarantine(self, quarantine: Quarantine) -> None:
        """In the place of an ended one that began at the same slot, if there is one."""
        at = {"at_idx": quarantine.index, "at_from_slot": quarantine.from_slot}
        self._execute(sql.FORGET_QUARANTINE, [at])
        row = {**at, "at_to_slot": quarantine.to_slot, "to_reason": quarantine.reason}
        self._execute(sql.ENTER_QUARANTINE, [row])

    @_writes
    def retry(self, index: int, to_slot: int) -> None:
        self._execute(sql.SET_ASIDE_AGAIN, [{"at_idx": index}])
        self._guarded(sql.RETRY, [{"at_idx": index}], f"retry: sample {index} is not quarantined")
        self._guarded(sql.END_QUARANTINE, [{"at_idx": index, "at_to_slot": to_slot}], "retry: no open quarantine")

    @_reads
    def quarantines(self) -> list[Quarantine]:
        rows = self._connection.execute(sql.QUARANTINES)
        return [Quarantine(row.idx, row.from_slot, row.to_slot, row.reason) for row in rows]

    @_writes
    def release(self, attempts: Sequence[Attempt]) -> None:
        refusal = "release: not every sample is committed with that generation"
        self._guarded(sql.END_COMMITTED, _attempts(attempts), refusal)

    @_writes
    def lose(self, attempts: Sequence[Attempt]) -> None:
        refusal = "lose: not every sample is committed with that generation"
        self._guarded(sql.END_COMMITTED, _attempts(attempts), refusal)
        self._put_back(sql.PUT_BACK, attempts)

    @_reads
    def in_flight(self) -> list[LiveAttempt]:
        return [
            LiveAttempt(
                Attempt(row.idx, row.generation),
                row.worker_id,
                None if row.ref is None else codec.loads(SampleRef, row.ref),
            )
            for row in self._connection.execute(sql.IN_FLIGHT)
        ]

    # Slots

    @_writes
    def dispatch(self, entries: Sequence[Dispatch]) -> None:
        rows = [{"at_slot": slot, "at_idx": index, "at_generation": generation} for slot, index, generation in entries]
        self._guarded(sql.DISPATCH, rows, "dispatch: not every sample is committed with that generation")

    @_writes
    def ack(self, acked: Sequence[int], step: int) -> None:
        check_step(step)
        try:
            self._execute(sql.ACK, [{"at_slot": slot, "at_step": step} for slot in acked])
        except sa.exc.IntegrityError as error:
            raise InvalidTransition(
                f"the ledger refused: ack: only a dispatched slot can be acked, and once ({error.orig})"
            ) from error

    @_writes
    def checkpointed(self, step: int) -> None:
        self._execute(sql.CHECKPOINTED, [{"to_step": step}])

    @_writes
    def rewind(self, to: Position, sample_of: Callable[[int], int], quarantines: Sequence[Quarantine]) -> None:
        for quarantine in missing_quarantines(self.quarantines(), quarantines):
            self._enter_quarantine(quarantine)
            if quarantine.to_slot is None:
                at = {"at_idx": quarantine.index}
                self._execute(sql.STOP, [at])
                self._execute(sql.PUT_BACK, [at])
                row = {**at, "at_from_slot": quarantine.from_slot, "to_reason": quarantine.reason}
                self._guarded(sql.QUARANTINE, [row], f"rewind: sample {quarantine.index} is not pending")
        self._execute(sql.RESTORE, [{"last_slot": to.num_slots if to.prefix else 0}])
        if to.prefix:
            self._execute(sql.DROP_ACKS_FROM, [{"from_slot": to.num_slots}])
            self._execute(sql.LOWER_STEPS, [{"last_step": to.step}])
            self._execute(sql.DROP_NOT_ACKED, [{}])
            self._fill(to, sample_of)
        else:
            self._execute(sql.DROP_ACKS_AFTER, [{"last_step": to.step}])
            self._execute(sql.DROP_NOT_ACKED, [{}])
            check_position(self._number(sql.NUM_TRAINED), to)
        self._execute(sql.SET_DURABLE_STEP, [{"to_value": str(to.step)}])

    def _fill(self, to: Position, sample_of: Callable[[int], int]) -> None:
        """Enter the covered slots of whose training the ledger had not heard."""
        if self._number(sql.NUM_TRAINED) == to.num_slots:
            return
        skips = Skips(self.quarantines())
        for first in range(0, to.num_slots, _SLOTS_READ):
            end = min(to.num_slots, first + _SLOTS_READ)
            trained = self._trained_within(first, end)
            missing = ((slot, sample_of(slot)) for slot in range(first, end) if slot not in trained)
            rows = [(slot, index) for slot, index in missing if not skips.covers(index, slot)]
            self._execute(sql.ENTER_SLOT, [{"at_slot": slot, "at_idx": index} for slot, index in rows])
            self._execute(sql.ACK, [{"at_slot": slot, "at_step": to.step} for slot, _ in rows])

    # Reading

    @_reads
    def sample(self, index: int) -> SampleRecord:
        row = self._connection.execute(sql.SAMPLE, {"at_idx": index}).one_or_none()
        if row is None:
            raise unknown_sample(index, self.num_tasks())
        return SampleRecord(
            SampleState(row.live_state or row.state),
            row.generation,
            row.num_failures,
            row.num_crashes,
            None if row.ref is None else codec.loads(SampleRef, row.ref),
            row.reason,
        )

    @_reads
    def slot_state(self, slot: int) -> SlotState:
        if self._scalar(sql.IS_DISPATCHED, slot=slot) is None:
            return SlotState.OPEN
        step = self.slot_step(slot)
        if step is None:
            return SlotState.DISPATCHED
        return SlotState.DURABLE if step <= self._durable_step() else SlotState.TRAINED

    @_reads
    def slot_step(self, slot: int) -> int | None:
        step: int | None = self._scalar(sql.STEP_OF, slot=slot)
        return step

    @_reads
    def trained_from(self, slot: int) -> list[int]:
        return list(self._connection.scalars(sql.TRAINED_FROM, {"first": slot}))

    @_reads
    def first_untrained(self, sample_of: Callable[[int], int]) -> int:
        skips = Skips(self.quarantines())
        # With every sample quarantined the answer is the first slot of which nothing is said.
        end_of_all = max(self._number(sql.LAST_TRAINED), skips.last_edge) + 1
        num_tasks, end = self.num_tasks(), 0
        while True:
            first, end = end, end + _SLOTS_READ
            trained = self._trained_within(first, end)
            for slot in range(first, end):
                if slot >= end_of_all and skips.num_open >= num_tasks:
                    return slot
                if slot not in trained and not skips.covers(sample_of(slot), slot):
                    return slot

    @_reads
    def counts(self) -> LedgerCounts:
        durable_step = self._durable_step()
        by_state: Mapping[str, int] = {row[0]: row[1] for row in self._connection.execute(sql.NUM_LIVE)}
        num_trained = self._number(sql.NUM_TRAINED)
        return LedgerCounts(
            num_samples=self.num_tasks(),
            num_leased=by_state.get(SampleState.LEASED, 0),
            num_committed=by_state.get(SampleState.COMMITTED, 0),
            num_quarantined=self._number(sql.NUM_OPEN_QUARANTINES),
            num_slots_dispatched=self._number(sql.NUM_SLOTS) - num_trained,
            num_slots_trained=num_trained,
            num_slots_durable=self._number(sql.NUM_DURABLE, durable_step=durable_step),
            num_unique_samples_trained=self._number(sql.NUM_UNIQUE),
            last_step=self._number(sql.LAST_STEP),
            durable_step=durable_step,
        )

    # Inside a transaction

    @property
    def _connection(self) -> sa.Connection:
        return self.database.connection

    def _execute(self, statement: Any, rows: Rows) -> int:
        """Once a row; how many rows of the table that changed."""
        return self.database.execute(statement, rows) if rows else 0

    def _guarded(self, statement: Any, rows: Rows, refusal: str) -> None:
        """Execute ``statement`` once a row; unless every execution changed one row, refuse (and roll back)."""
        if self._execute(statement, rows) != len(rows):
            raise InvalidTransition(f"the ledger refused: {refusal}")

    def _put_back(self, statement: Any, attempts: Sequence[Attempt]) -> None:
        self._execute(statement, [{"at_idx": attempt.sample} for attempt in attempts])

    def _at(self, statement: Any, indices: Sequence[int]) -> Iterable[Any]:
        for start in range(0, len(indices), sql.CHUNK):
            yield from self._connection.execute(statement, {"indices": indices[start : start + sql.CHUNK]})

    def _scalar(self, statement: Any, **values: object) -> Any:
        return self._connection.scalar(statement, values)

    def _number(self, statement: Any, **values: object) -> int:
        return int(self._connection.scalar(statement, values) or 0)

    def _durable_step(self) -> int:
        return int(self._scalar(sql.FACT, key="durable_step"))

    def _trained_within(self, first: int, end: int) -> set[int]:
        return set(self._connection.scalars(sql.TRAINED_WITHIN, {"first": first, "end": end}))


def _attempts(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    return [{"at_idx": attempt.sample, "at_generation": attempt.generation} for attempt in attempts]
