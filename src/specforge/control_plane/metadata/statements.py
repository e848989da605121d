"""Every transition of the ledger as SQL, built once. A guard names the state that the transition needs."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import bindparam, func, literal_column, select

from specforge.control_plane.metadata.base import SampleState
from specforge.control_plane.metadata.schema import (
    SlotNumber,
    acks,
    live,
    quarantines,
    responses,
    run,
    samples,
    slots,
    tasks,
)

CHUNK = 1000
"""Rows a statement where a call has no natural bound."""

_AT: sa.BindParameter[int] = bindparam("at_idx")
_INDICES: sa.BindParameter[int] = bindparam("indices", expanding=True)
_ZERO, _ONE = literal_column("0", sa.Integer), literal_column("1", sa.Integer)
_PENDING, _LEASED, _COMMITTED, _RELEASED, _QUARANTINED = (
    literal_column(f"'{state}'", sa.String)
    for state in (
        SampleState.PENDING,
        SampleState.LEASED,
        SampleState.COMMITTED,
        SampleState.RELEASED,
        SampleState.QUARANTINED,
    )
)
_LIVE_ATTEMPT = (live.c.idx == _AT, live.c.generation == bindparam("at_generation"))
_IS_LEASED = live.c.state == _LEASED
_IS_COMMITTED = live.c.state == _COMMITTED

# Transitions. Executed once a row of parameters; the number of rows that changed says whether the guard held for all.
# Constants are literals, so that the driver gets text and rows and nothing has to be bound in between.

LEASE = (
    samples.update()
    .where(samples.c.idx == _AT, samples.c.state != _QUARANTINED)
    .values(state=_RELEASED, generation=samples.c.generation + _ONE)
)
"""The trigger ``live_rests`` refuses a sample that has a live attempt."""
GO_LIVE = live.insert().from_select(
    ["idx", "generation", "state", "worker_id"],
    select(samples.c.idx, samples.c.generation, _LEASED, sa.cast(bindparam("to_worker"), sa.String)).where(
        samples.c.idx == _AT
    ),
)
COMMIT = (
    live.update()
    .where(*_LIVE_ATTEMPT, _IS_LEASED)
    .values(state=_COMMITTED, worker_id=sa.null(), ref=bindparam("to_ref"))
)
END_LEASED = live.delete().where(*_LIVE_ATTEMPT, _IS_LEASED)
END_COMMITTED = live.delete().where(*_LIVE_ATTEMPT, _IS_COMMITTED)
# Follow END_LEASED or END_COMMITTED, which held the guard.
PUT_BACK = samples.update().where(samples.c.idx == _AT).values(state=_PENDING)
PUT_BACK_CRASHED = PUT_BACK.values(num_crashes=samples.c.num_crashes + _ONE)
PUT_BACK_FAILED = PUT_BACK.values(num_failures=samples.c.num_failures + _ONE, reason=bindparam("to_reason"))

_FROM_SLOT = bindparam("at_from_slot", type_=SlotNumber)
FORGET_QUARANTINE = quarantines.delete().where(quarantines.c.idx == _AT, quarantines.c.from_slot == _FROM_SLOT)
ENTER_QUARANTINE = quarantines.insert().values(
    idx=_AT, from_slot=_FROM_SLOT, to_slot=bindparam("at_to_slot"), reason=bindparam("to_reason")
)
QUARANTINE = (
    samples.update()
    .where(samples.c.idx == _AT, samples.c.state == _PENDING)
    .values(state=_QUARANTINED, quarantined_from=_FROM_SLOT, reason=bindparam("to_reason"))
)
RETRY = (
    samples.update()
    .where(samples.c.idx == _AT, samples.c.state == _QUARANTINED)
    .values(state=_PENDING, quarantined_from=sa.null(), num_failures=_ZERO, num_crashes=_ZERO)
)
SET_ASIDE_AGAIN = (
    samples.update()
    .where(samples.c.idx == _AT, samples.c.state == _PENDING)
    .values(
        state=_QUARANTINED,
        quarantined_from=select(quarantines.c.from_slot)
        .where(quarantines.c.idx == _AT, quarantines.c.to_slot.is_(None))
        .scalar_subquery(),
    )
)
FORGET_OPEN_QUARANTINE = quarantines.delete().where(quarantines.c.idx == _AT, quarantines.c.to_slot.is_(None))
ACQUIT = samples.update().where(samples.c.idx == _AT).values(num_crashes=_ZERO)
RESTORE = (
    samples.update()
    .where(samples.c.state == _QUARANTINED, samples.c.quarantined_from > bindparam("last_slot", type_=SlotNumber))
    .values(state=_PENDING, quarantined_from=sa.null())
)
_TO_SLOT = sa.cast(bindparam("at_to_slot"), SlotNumber)
END_QUARANTINE = (
    quarantines.update()
    .where(quarantines.c.idx == _AT, quarantines.c.to_slot.is_(None))
    .values(to_slot=sa.case((quarantines.c.from_slot > _TO_SLOT, quarantines.c.from_slot), else_=_TO_SLOT))
)

# The SELECT gives no row, and so nothing is inserted, unless the sample is committed with that generation.
DISPATCH = slots.insert().from_select(
    ["slot", "idx", "generation"],
    select(sa.cast(bindparam("at_slot"), SlotNumber), live.c.idx, live.c.generation).where(
        *_LIVE_ATTEMPT, _IS_COMMITTED
    ),
)
ENTER_SLOT = slots.insert().values(slot=bindparam("at_slot"), idx=_AT, generation=_ZERO)
ACK = acks.insert().values(slot=bindparam("at_slot"), step=bindparam("at_step"))
_DURABLE_STEP = literal_column("'durable_step'", sa.String)
CHECKPOINTED = (
    run.update()
    .where(run.c.key == _DURABLE_STEP, sa.cast(run.c.value, sa.Integer) < sa.cast(bindparam("to_step"), sa.Integer))
    .values(value=sa.cast(sa.cast(bindparam("to_step"), sa.Integer), sa.String))
)
SET_DURABLE_STEP = run.update().where(run.c.key == _DURABLE_STEP).values(value=bindparam("to_value"))
SET_FACT = run.insert().values(key=bindparam("at_key"), value=bindparam("to_value"))
SIGN = run.update().where(run.c.key == literal_column("'last_transaction'")).values(value=bindparam("to_value"))

ENTER_TASK = tasks.insert().values(idx=_AT, sample_id=bindparam("at_sample_id"), body=bindparam("to_body"))
# The SELECT gives no row where there is a response already.
RECORD = responses.insert().from_select(
    ["idx", "num_tokens", "body"],
    select(tasks.c.idx, sa.cast(bindparam("to_num_tokens"), sa.Integer), sa.cast(bindparam("to_body"), sa.Text)).where(
        tasks.c.idx == _AT, ~sa.exists().where(responses.c.idx == tasks.c.idx)
    ),
)
ENTER_SAMPLE = samples.insert().values(idx=_AT, state=_PENDING)

# Rewind

DROP_ACKS_FROM = acks.delete().where(acks.c.slot >= bindparam("from_slot"))
DROP_ACKS_AFTER = acks.delete().where(acks.c.step > bindparam("last_step"))
LOWER_STEPS = acks.update().where(acks.c.step > bindparam("last_step")).values(step=bindparam("last_step"))
DROP_NOT_ACKED = slots.delete().where(~sa.exists().where(acks.c.slot == slots.c.slot))
STOP = live.delete().where(live.c.idx == _AT)

# Reading

TASKS_FROM = select(tasks.c.body).where(tasks.c.idx >= bindparam("first")).order_by(tasks.c.idx).limit(CHUNK)
TASKS_AT = select(tasks.c.idx, tasks.c.body).where(tasks.c.idx.in_(_INDICES))
RESPONSES_AT = select(responses.c.idx, responses.c.body).where(responses.c.idx.in_(_INDICES))
RESPONSE_LENGTHS = (
    select(responses.c.idx, responses.c.num_tokens)
    .where(responses.c.idx >= bindparam("first"))
    .order_by(responses.c.idx)
    .limit(CHUNK)
)
NUM_TASKS = select(func.coalesce(func.max(tasks.c.idx), -1) + 1)
FIND = select(tasks.c.idx).where(tasks.c.sample_id == bindparam("sample_id"))
FACT = select(run.c.value).where(run.c.key == bindparam("key"))
SAMPLE = select(samples, live.c.state.label("live_state"), live.c.ref).outerjoin(live).where(samples.c.idx == _AT)
LIVE_AT = select(live.c.idx, live.c.generation, live.c.state).where(live.c.idx.in_(_INDICES))
AT_REST = select(samples.c.idx, samples.c.generation, samples.c.state, samples.c.num_crashes).where(
    samples.c.idx.in_(_INDICES)
)
# "> 0" is spelled out, because that is what the partial index is made of.
CRASHED = select(samples.c.idx, samples.c.num_crashes).where(
    samples.c.num_crashes > _ZERO,
    samples.c.num_crashes >= bindparam("at_least"),
    samples.c.state != _QUARANTINED,
)
IN_FLIGHT = select(live).order_by(live.c.idx)
QUARANTINES = select(quarantines).order_by(quarantines.c.from_slot, quarantines.c.idx)
IS_DISPATCHED = select(slots.c.slot).where(slots.c.slot == bindparam("slot"))
STEP_OF = select(acks.c.step).where(acks.c.slot == bindparam("slot"))
TRAINED_FROM = select(acks.c.slot).where(acks.c.slot >= bindparam("first")).order_by(acks.c.slot)
TRAINED_WITHIN = TRAINED_FROM.where(acks.c.slot < bindparam("end"))
LAST_TRAINED = select(func.coalesce(func.max(acks.c.slot), -1))
NUM_LIVE = select(live.c.state, func.count()).group_by(live.c.state)
NUM_OPEN_QUARANTINES = select(func.count()).select_from(quarantines).where(quarantines.c.to_slot.is_(None))
NUM_SLOTS = select(func.count()).select_from(slots)
NUM_TRAINED = select(func.count()).select_from(acks)
NUM_DURABLE = NUM_TRAINED.where(acks.c.step <= bindparam("durable_step"))
NUM_UNIQUE = select(func.count(sa.distinct(slots.c.idx))).join(acks, acks.c.slot == slots.c.slot)
LAST_STEP = select(func.coalesce(func.max(acks.c.step), 0))
