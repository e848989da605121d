"""What travels between ``ControlPlaneClient`` and ``ControlPlaneServer``: request bodies and errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from specforge import errors
from specforge.contracts import codec
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.base import Lease, LeaseReply

MAX_WAIT_S = 60.0
"""The longest that the server holds a long poll; a client that wants to wait longer asks again."""

_NAME = Field(min_length=1, max_length=200)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LeaseBody(_Body):
    """``call_id`` names the call: a retry of it gets the same leases."""

    worker_id: str = _NAME
    call_id: str = _NAME
    max_tasks: int = Field(ge=1, le=10_000)
    timeout_s: float = Field(ge=0.0, le=MAX_WAIT_S)


class CommitBody(_Body):
    """``refs``: SampleRefs as the codec writes them."""

    refs: list[dict[str, Any]] = Field(max_length=10_000)


class FailBody(_Body):
    worker_id: str = _NAME
    sample_id: str = Field(min_length=1, max_length=1000)
    generation: int = Field(ge=1)
    reason: str


class HeartbeatBody(_Body):
    worker_id: str = _NAME


class AbandonBody(_Body):
    worker_id: str = _NAME
    reason: str


def lease_reply_to_json(reply: LeaseReply) -> dict[str, Any]:
    leases = [
        {"task": codec.to_json(lease.task), "generation": lease.generation, "duration_s": lease.duration_s}
        for lease in reply.leases
    ]
    return {"leases": leases, "finished": reply.finished}


def lease_reply_from_json(payload: dict[str, Any]) -> LeaseReply:
    leases = tuple(
        Lease(codec.from_json(PromptTask, lease["task"]), lease["generation"], lease["duration_s"])
        for lease in payload["leases"]
    )
    return LeaseReply(leases, payload["finished"])


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
        errors.RunFailed,
    )
}


def error_to_json(error: Exception) -> dict[str, str]:
    """``{"type", "message"}``; what is not an exception of ours travels as a ControlPlaneError."""
    name = type(error).__name__
    if name in _ERRORS:
        return {"type": name, "message": str(error)}
    return {"type": "ControlPlaneError", "message": f"{name}: {error}"}


def error_from_json(payload: Any) -> errors.SpecForgeError:
    """The exception that ``error_to_json`` wrote."""
    kind = _ERRORS.get(str(payload.get("type"))) if isinstance(payload, dict) else None
    if kind is None:
        return errors.ControlPlaneError(f"the control-plane server answered {payload!r:.200}")
    return kind(str(payload.get("message")))
