"""What our side and a plug-in inside an engine say to each other, in a JSON field that the engine passes through.

Towards the engine, beside the tokens of an ordinary request for a completion:

    {"specforge": {"capture": {...}}}   a ``CaptureRequest`` for one sample, whose ``input_ids`` are left empty
    {"specforge": {"close": {...}}}     a ``CloseSink``
    {"specforge": {}}                   who are you?

and with the answer, always, ``{"specforge": {...}}``: a :class:`Receipt`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from specforge.contracts.capture_server import CapturedItem, CaptureRequest, CloseSink, ServerInfo
from specforge.contracts.capture_wire import CAPTURE, CLOSE_SINK, Refusal, read_capture
from specforge.contracts.codec import Form
from specforge.errors import ContractError, SpecForgeError, TargetError, UserError

FIELD = "specforge"
NUM_HOLD_TOKENS = 4
"""Tokens to ask for with an order. A step of the engine gives one or two: the first step writes the hidden states, the
next one reports what was put, and the request may end with the one after that.
"""
NUM_SPARE_TOKENS = NUM_HOLD_TOKENS + 4
"""Positions of the longest sequence that a captured prompt leaves free."""


@dataclass(frozen=True, slots=True)
class Order:
    """At most one of the two."""

    capture: CaptureRequest | None = None
    close: CloseSink | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """``item``: of a capture that was tried. ``refusal``: why it was not, or why a sink was not closed. ``data``: of an
    inline item its buffer in base64.
    """

    info: ServerInfo
    item: CapturedItem | None = None
    refusal: Refusal | None = None
    data: str = ""


RECEIPT = Form(Receipt)


def write_order(order: Order) -> dict[str, Any]:
    """The value of ``FIELD``."""
    if order.capture is not None:
        return {"capture": json.loads(CAPTURE[0].write(order.capture))}
    if order.close is not None:
        return {"close": json.loads(CLOSE_SINK.write(order.close))}
    return {}


def read_order(value: Any) -> Order:
    """The order in the value of ``FIELD``; a :class:`ContractError` for one that may not be acted upon."""
    if not isinstance(value, dict) or value.keys() - {"capture", "close"} or len(value) > 1:
        raise ContractError(f"expected an object with 'capture', with 'close' or without a key, got {value!r:.80}")
    if "close" in value:
        return Order(close=CLOSE_SINK.read(_text(value["close"])))
    if "capture" not in value:
        return Order()
    request = read_capture(_text(value["capture"]).encode())
    if len(request.items) != 1 or request.items[0].input_ids:
        raise ContractError("expected one sample without its tokens: they are those of the completion's prompt")
    return Order(capture=request)


def check_capture(request: CaptureRequest, info: ServerInfo, more_layers: str) -> None:
    """Raise ``TargetError`` or ``ContractError`` for a capture that the engine of ``info`` cannot do.

    ``more_layers``: how the engine is started so that it has the layers that are missing.
    """
    if request.target_revision not in (None, info.target_revision):
        raise TargetError(
            f"this server has another target: revision {info.target_revision:.16}, asked for was "
            f"{request.target_revision:.16}"
        )
    missing = [layer for layer in request.spec.aux_layers if layer not in (info.layers or ())]
    if missing:
        raise ContractError(f"layers {missing} are not captured here, only {list(info.layers or ())}; {more_layers}")
    if request.sink.kind not in info.sinks:
        raise ContractError(f"this server does not write to {request.sink.kind}, only to {', '.join(info.sinks)}")


def refusal_of(error: Exception) -> Refusal:
    """What an order that led to ``error`` is answered with."""
    if isinstance(error, TargetError):
        return Refusal("model", str(error))
    if isinstance(error, UserError | ContractError):
        return Refusal("request", str(error))
    return Refusal("engine", str(error) if isinstance(error, SpecForgeError) else f"{type(error).__name__}: {error}")


def _text(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractError(f"not made of what JSON can carry: {error}") from None
