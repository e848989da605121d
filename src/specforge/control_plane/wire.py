"""What travels between ``ControlPlaneClient`` and ``ControlPlaneServer``: requests, replies and errors.

Everything is strict: an unknown field, a value of another type or outside its bounds is a ``ContractError``. The
version of the protocol is in its paths (``/v1/...``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from specforge import errors
from specforge.contracts.codec import Form
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.control_plane.base import CommitReply, LeaseReply, Recorded

MAX_WAIT_S = 60.0
"""The longest that the server holds a long poll; a client that wants to wait longer asks again."""

MAX_BATCH = 10_000
"""Leases, or refs, of one request or reply."""

MAX_SLOTS = 1_000_000
"""Slots of one ack."""

MAX_RESPONSE_TOKENS = 1 << 20

MAX_REASON_CHARS = 10_000

KEY_HEADER = "Idempotency-Key"
MAX_KEY_CHARS = 200

_MAX_INT = 2**63 - 1
_MAX_NAME_CHARS = 1000


def _valid_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("expected text without NUL characters")
    return text


def _valid_slots(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    for slot in slots:
        if not (0 <= slot.epoch < 2**31 and 0 <= slot.position < 2**31):
            raise ValueError("expected epoch and position from 0 to 2147483647")
    return slots


def _valid_refs(refs: tuple[SampleRef, ...]) -> tuple[SampleRef, ...]:
    for ref in refs:
        numbers = (ref.num_tokens, ref.num_bytes, ref.draft_weight_version)
        if not (1 <= ref.generation <= _MAX_INT and min(numbers) >= 0 and max(numbers) <= _MAX_INT):
            raise ValueError(f"expected numbers from 0, a generation from 1, to {_MAX_INT}")
        if not 1 <= len(ref.sample_id) <= _MAX_NAME_CHARS or len(ref.worker_id) > _MAX_NAME_CHARS:
            raise ValueError(f"expected sample and worker ids of at most {_MAX_NAME_CHARS} characters")
        _valid_text(ref.sample_id + ref.worker_id)
    return refs


_Name = Annotated[str, Field(min_length=1, max_length=_MAX_NAME_CHARS), AfterValidator(_valid_text)]
_Reason = Annotated[str, Field(max_length=MAX_REASON_CHARS), AfterValidator(_valid_text)]
_Count = Annotated[int, Field(ge=0, le=_MAX_INT)]
_Number = Annotated[int, Field(ge=1, le=_MAX_INT)]
_Wait = Annotated[float, Field(ge=0.0, le=MAX_WAIT_S)]
_TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
_BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH)]


@dataclass(frozen=True, slots=True)
class LeaseBody:
    worker_id: _Name
    max_tasks: _BatchSize
    timeout_s: _Wait


@dataclass(frozen=True, slots=True)
class CommitBody:
    refs: Annotated[tuple[SampleRef, ...], Field(max_length=MAX_BATCH), AfterValidator(_valid_refs)]


@dataclass(frozen=True, slots=True)
class RecordBody:
    worker_id: _Name
    sample_id: _Name
    generation: _Number
    response_ids: Annotated[tuple[_TokenId, ...], Field(max_length=MAX_RESPONSE_TOKENS)]


@dataclass(frozen=True, slots=True)
class FailBody:
    worker_id: _Name
    sample_id: _Name
    generation: _Number
    reason: _Reason


@dataclass(frozen=True, slots=True)
class HeartbeatBody:
    worker_id: _Name


@dataclass(frozen=True, slots=True)
class LeaveBody:
    """``reason`` null: in good order."""

    worker_id: _Name
    reason: _Reason | None


@dataclass(frozen=True, slots=True)
class AckBody:
    slots: Annotated[tuple[Slot, ...], Field(max_length=MAX_SLOTS), AfterValidator(_valid_slots)]
    step: _Number


@dataclass(frozen=True, slots=True)
class CheckpointedBody:
    step: _Count


@dataclass(frozen=True, slots=True)
class PollBody:
    """``stream_id`` and ``cursor`` null: whatever stream there is, from what the consumer has not consumed yet."""

    consumer: _Name
    stream_id: _Name | None
    cursor: _Count | None
    max_refs: _BatchSize
    timeout_s: _Wait


@dataclass(frozen=True, slots=True)
class ConsumedBody:
    """``num_refs``: consumed by this consumer since the start of the stream."""

    consumer: _Name
    stream_id: _Name
    num_refs: _Count


@dataclass(frozen=True, slots=True)
class RefPage:
    """``refs`` are those numbered ``cursor`` and up in the stream; ``ended``: none will ever come after them."""

    stream_id: str
    cursor: int
    refs: tuple[SlotRef, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Done:
    """The call was carried out, now or when it came first."""


@dataclass(frozen=True, slots=True)
class Health:
    status: str


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """``type`` names an exception of ``specforge.errors``."""

    type: str
    message: str


Summary = dict[str, int | float | str | None]

LEASE = Form(LeaseBody), Form(LeaseReply)
COMMIT = Form(CommitBody), Form(CommitReply)
RECORD = Form(RecordBody), Form(Recorded)
FAIL = Form(FailBody), Form(Done)
HEARTBEAT = Form(HeartbeatBody), Form(Done)
LEAVE = Form(LeaveBody), Form(Done)
ACK = Form(AckBody), Form(Done)
CHECKPOINTED = Form(CheckpointedBody), Form(Done)
POLL = Form(PollBody), Form(RefPage)
CONSUMED = Form(ConsumedBody), Form(Done)
"""Request and reply of every call."""

SUMMARY: Form[Summary] = Form(Summary, "Summary")
HEALTH = Form(Health)
ERROR = Form(ErrorReply)


def plain_reason(reason: str) -> str:
    """``reason`` as it may travel: bounded, without NUL characters and half surrogates."""
    return reason[:MAX_REASON_CHARS].replace("\0", "").encode(errors="replace").decode()


_ERRORS: dict[str, type[errors.SpecForgeError]] = {
    error.__name__: error
    for error in (
        errors.SpecForgeError,
        errors.UserError,
        errors.ConfigError,
        errors.DataError,
        errors.ContractError,
        errors.ControlPlaneError,
        errors.InvalidTransition,
        errors.StaleGeneration,
        errors.ChannelClosed,
        errors.ProducerFailed,
        errors.FeatureStoreError,
        errors.RunFailed,
    )
}


def error_to_json(error: Exception) -> bytes:
    """The ``ErrorReply``; what is not an exception of ours travels as a ControlPlaneError."""
    name = type(error).__name__
    known = name in _ERRORS
    message = str(error) if known else f"{name}: {error}"
    text = message.encode(errors="replace").decode()
    return ERROR.write(ErrorReply(name if known else "ControlPlaneError", text))


def error_from_json(status: int, data: bytes) -> errors.SpecForgeError:
    """The exception that ``error_to_json`` wrote."""
    try:
        reply = ERROR.read(data)
    except errors.ContractError:
        return errors.ControlPlaneError(f"the control-plane server answered {status} {data!r:.200}")
    return _ERRORS.get(reply.type, errors.ControlPlaneError)(reply.message)
