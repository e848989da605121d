"""The tables of the ledger. Constraints hold the invariants, whatever the code above them does.

| invariant                                    | held by                                                         |
|----------------------------------------------|-----------------------------------------------------------------|
| a slot is dispatched once                    | primary key of ``slots``                                        |
| one ack a slot                               | primary key of ``acks``                                         |
| an ack only of a dispatched slot             | foreign key ``acks.slot -> slots.slot``                         |
| a step on every ack                          | ``NOT NULL`` and ``CHECK (step >= 1)``                          |
| one live attempt a sample                    | primary key of ``live``                                         |
| a live attempt has the sample's generation   | triggers ``live_is_the_last``, ``live_is_fixed``, ``live_rests``|
| a ref while COMMITTED, a worker while LEASED | ``CHECK``s of ``live``                                          |
| attempts only grow, failures end by a retry  | trigger ``attempts_only_grow``                                  |
| one open quarantine a sample                 | unique index ``quarantines_open``                               |
| QUARANTINED has an open quarantine           | ``CHECK`` and foreign key of ``samples.quarantined_from``,      |
|                                              | triggers ``quarantine_is_open``, ``quarantine_stays_open``      |
| a sample id once                             | ``UNIQUE (sample_id)``                                          |
| a response once, as it was recorded          | primary key of ``responses``, trigger ``responses_stay``        |

What moves with every sample is in ``live``, which is as small as the run's window. Rows of ``samples``, which
lie all over the file in the order of a shuffled run, are changed once a lease.
"""

from __future__ import annotations

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    event,
    literal_column,
)

from specforge.control_plane.metadata.base import SampleState

SCHEMA_VERSION = 3

SlotNumber = BigInteger().with_variant(Integer, "sqlite")
"""SQLite's INTEGER has 64 bits and, as a primary key, is the row's own address."""


def _one_of(*states: SampleState) -> str:
    return "state IN ({})".format(", ".join(f"'{state}'" for state in states))


metadata = MetaData()

run = Table(
    "run",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)
"""``schema_version``, ``order_key``, ``durable_step``, and ``last_transaction`` (a token; PostgreSQL only)."""

tasks = Table(
    "tasks",
    metadata,
    Column("idx", Integer, primary_key=True, autoincrement=False),
    Column("sample_id", String, nullable=False, unique=True),
    Column("body", Text, nullable=False),
    CheckConstraint("idx >= 0", name="index_from_zero"),
)
"""``body`` is the codec's JSON of the PromptTask."""

responses = Table(
    "responses",
    metadata,
    Column("idx", Integer, ForeignKey("tasks.idx"), primary_key=True, autoincrement=False),
    Column("num_tokens", Integer, nullable=False),
    Column("body", Text, nullable=False),
    CheckConstraint("num_tokens >= 0", name="length_from_zero"),
)
"""What the target answered to a prompt. ``body`` is a JSON list of ``num_tokens`` token ids."""

quarantines = Table(
    "quarantines",
    metadata,
    Column("idx", Integer, ForeignKey("tasks.idx"), primary_key=True, autoincrement=False),
    Column("from_slot", SlotNumber, primary_key=True, autoincrement=False),
    Column("to_slot", SlotNumber),
    Column("reason", Text, nullable=False),
    CheckConstraint("from_slot >= 0 AND (to_slot IS NULL OR to_slot >= from_slot)", name="range_of_slots"),
)
"""The slots ``[from_slot, to_slot)`` of the sample are skipped; ``to_slot`` is NULL until the sample is retried."""
_OPEN = quarantines.c.to_slot.is_(None)
Index("quarantines_open", quarantines.c.idx, unique=True, sqlite_where=_OPEN, postgresql_where=_OPEN)

samples = Table(
    "samples",
    metadata,
    Column("idx", Integer, ForeignKey("tasks.idx"), primary_key=True, autoincrement=False),
    Column("state", String, nullable=False),
    Column("generation", Integer, nullable=False, server_default="0"),
    Column("num_failures", Integer, nullable=False, server_default="0"),
    Column("num_crashes", Integer, nullable=False, server_default="0"),
    Column("reason", Text),
    Column("quarantined_from", SlotNumber),
    ForeignKeyConstraint(["idx", "quarantined_from"], ["quarantines.idx", "quarantines.from_slot"]),
    CheckConstraint(
        _one_of(SampleState.PENDING, SampleState.RELEASED, SampleState.QUARANTINED), name="known_state_at_rest"
    ),
    CheckConstraint("generation >= 0 AND num_failures >= 0 AND num_crashes >= 0", name="counts_from_zero"),
    CheckConstraint("state <> 'released' OR generation >= 1", name="attempt_numbered"),
    CheckConstraint("(state = 'quarantined') = (quarantined_from IS NOT NULL)", name="quarantine_has_slot"),
)
"""``state`` is what the sample is while none of its attempts is live. A lease sets 'released', which is what the
sample becomes when its live row is just deleted; whatever else ends an attempt sets 'pending'.
"""
_CRASHED = samples.c.num_crashes > literal_column("0")
Index("samples_crashed", samples.c.num_crashes, sqlite_where=_CRASHED, postgresql_where=_CRASHED)

live = Table(
    "live",
    metadata,
    Column("idx", Integer, ForeignKey("samples.idx"), primary_key=True, autoincrement=False),
    Column("generation", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("worker_id", String),
    Column("ref", Text),
    CheckConstraint(_one_of(SampleState.LEASED, SampleState.COMMITTED), name="known_live_state"),
    CheckConstraint("generation >= 1", name="live_attempt_numbered"),
    CheckConstraint("(state = 'committed') = (ref IS NOT NULL)", name="ref_while_committed"),
    CheckConstraint("(state = 'leased') = (worker_id IS NOT NULL)", name="worker_while_leased"),
)
"""The attempts that are LEASED or COMMITTED. ``ref`` is the codec's JSON of the SampleRef."""

slots = Table(
    "slots",
    metadata,
    Column("slot", SlotNumber, primary_key=True, autoincrement=False),
    Column("idx", Integer, ForeignKey("samples.idx"), nullable=False),
    Column("generation", Integer, nullable=False),
    CheckConstraint("slot >= 0", name="slot_from_zero"),
)
"""A row from its dispatch on. ``generation`` 0: trained before this ledger heard of it."""

acks = Table(
    "acks",
    metadata,
    Column("slot", SlotNumber, ForeignKey("slots.slot"), primary_key=True, autoincrement=False),
    Column("step", Integer, nullable=False),
    CheckConstraint("step >= 1", name="step_from_one"),
)

_TRIGGERS: dict[str, tuple[str, str, str]] = {
    "attempts_only_grow": (
        "BEFORE UPDATE OF generation, num_failures, num_crashes ON samples",
        (
            "NEW.generation < OLD.generation"
            " OR (NEW.num_crashes < OLD.num_crashes AND NEW.num_crashes <> 0)"
            " OR (NEW.num_failures < OLD.num_failures AND NOT (OLD.state = 'quarantined'"
            " AND NEW.state = 'pending' AND NEW.num_failures = 0))"
        ),
        "attempts only grow",
    ),
    "responses_stay": (
        "BEFORE UPDATE ON responses",
        "1 = 1",
        "a recorded response stays as it is",
    ),
    "live_is_the_last": (
        "BEFORE INSERT ON live",
        "NOT EXISTS (SELECT 1 FROM samples WHERE idx = NEW.idx AND generation = NEW.generation AND state = 'released')",
        "a live attempt is the last one of its sample",
    ),
    "live_is_fixed": (
        "BEFORE UPDATE OF idx, generation ON live",
        "NEW.idx <> OLD.idx OR NEW.generation <> OLD.generation",
        "a live attempt keeps its sample and generation",
    ),
    "live_rests": (
        "BEFORE UPDATE OF state, generation ON samples",
        (
            "(NEW.state <> OLD.state OR NEW.generation <> OLD.generation)"
            " AND EXISTS (SELECT 1 FROM live WHERE idx = NEW.idx)"
        ),
        "the sample has a live attempt",
    ),
    "quarantine_is_open": (
        "BEFORE UPDATE OF quarantined_from ON samples",
        (
            "NEW.quarantined_from IS NOT NULL AND NOT EXISTS (SELECT 1 FROM quarantines"
            " WHERE idx = NEW.idx AND from_slot = NEW.quarantined_from AND to_slot IS NULL)"
        ),
        "a quarantined sample has an open quarantine",
    ),
    "quarantine_stays_open": (
        "BEFORE UPDATE OF to_slot ON quarantines",
        (
            "NEW.to_slot IS NOT NULL AND EXISTS (SELECT 1 FROM samples"
            " WHERE idx = NEW.idx AND quarantined_from = NEW.from_slot)"
        ),
        "the sample is still quarantined",
    ),
}
"""Name -> (event, what must not be, message)."""


def _declare_triggers() -> None:
    for name, (when, broken, message) in _TRIGGERS.items():
        sqlite = f"CREATE TRIGGER {name} {when} WHEN {broken} BEGIN SELECT RAISE(ABORT, '{message}'); END"
        # A WHEN of PostgreSQL cannot look into other tables, the body of a function can.
        function = (
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {broken} THEN "
            f"RAISE EXCEPTION '{message}' USING ERRCODE = 'integrity_constraint_violation'; "
            "END IF; RETURN NEW; END $$"
        )
        trigger = f"CREATE TRIGGER {name} {when} FOR EACH ROW EXECUTE FUNCTION {name}()"
        for dialect, statement in (("sqlite", sqlite), ("postgresql", function), ("postgresql", trigger)):
            ddl = DDL(statement)  # type: ignore[no-untyped-call]
            event.listen(metadata, "after_create", ddl.execute_if(dialect=dialect))


_declare_triggers()
