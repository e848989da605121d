"""The tables of the ledger. Constraints hold the invariants, whatever the code above them does.

| invariant                          | held by                                                        |
|------------------------------------|----------------------------------------------------------------|
| a slot is dispatched once          | primary key of ``slots``                                       |
| one ack a slot                     | primary key of ``acks``                                        |
| an ack only of a dispatched slot   | foreign key ``acks.slot -> slots.slot``                        |
| a step on every ack                | ``NOT NULL`` and ``CHECK (step >= 1)``                         |
| one live generation a sample       | one row a sample, ``CHECK`` ties the ref to COMMITTED          |
| attempts only grow                 | trigger ``attempts_only_grow``                                 |
| a sample id once                   | ``UNIQUE (sample_id)``                                         |
"""

from __future__ import annotations

from sqlalchemy import DDL, CheckConstraint, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text, event

from specforge.control_plane.metadata.base import SampleState

SCHEMA_VERSION = 1

metadata = MetaData()

run = Table(
    "run",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)
"""``schema_version``, ``order_key`` and ``durable_step``."""

tasks = Table(
    "tasks",
    metadata,
    Column("idx", Integer, primary_key=True, autoincrement=False),
    Column("sample_id", String, nullable=False, unique=True),
    Column("body", Text, nullable=False),
    CheckConstraint("idx >= 0", name="index_from_zero"),
)
"""``body`` is the codec's JSON of the PromptTask."""

samples = Table(
    "samples",
    metadata,
    Column("idx", Integer, ForeignKey("tasks.idx"), primary_key=True, autoincrement=False),
    Column("state", String, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("num_failures", Integer, nullable=False),
    Column("worker_id", String),
    Column("ref", Text),
    Column("reason", Text),
    Column("quarantined_from", Integer),
    CheckConstraint("state IN ({})".format(", ".join(f"'{state}'" for state in SampleState)), name="known_state"),
    CheckConstraint("generation >= 0 AND num_failures >= 0", name="counts_from_zero"),
    CheckConstraint("state NOT IN ('leased', 'committed', 'released') OR generation >= 1", name="attempt_numbered"),
    CheckConstraint("(state = 'committed') = (ref IS NOT NULL)", name="ref_while_committed"),
    CheckConstraint("(state = 'leased') = (worker_id IS NOT NULL)", name="worker_while_leased"),
    CheckConstraint("(state = 'quarantined') = (quarantined_from IS NOT NULL)", name="quarantine_has_slot"),
)
Index("samples_in_flight", samples.c.state, sqlite_where=samples.c.state.in_(("leased", "committed", "quarantined")))

slots = Table(
    "slots",
    metadata,
    Column("slot", Integer, primary_key=True, autoincrement=False),
    Column("idx", Integer, ForeignKey("samples.idx"), nullable=False),
    Column("generation", Integer, nullable=False),
    CheckConstraint("slot >= 0", name="slot_from_zero"),
)
"""A row from its dispatch on. ``generation`` 0: trained before this ledger heard of it."""

acks = Table(
    "acks",
    metadata,
    Column("slot", Integer, ForeignKey("slots.slot"), primary_key=True, autoincrement=False),
    Column("step", Integer, nullable=False),
    CheckConstraint("step >= 1", name="step_from_one"),
)
Index("acks_by_step", acks.c.step)

event.listen(
    metadata,
    "after_create",
    DDL(  # type: ignore[no-untyped-call]
        "CREATE TRIGGER attempts_only_grow BEFORE UPDATE OF generation, num_failures ON samples "
        "WHEN NEW.generation < OLD.generation OR NEW.num_failures < OLD.num_failures "
        "BEGIN SELECT RAISE(ABORT, 'attempts only grow'); END"
    ).execute_if(dialect="sqlite"),
)
