"""The JSON of ``contracts.capture_server``, read strictly and within bounds; and the errors of a capture server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from specforge.contracts import capture_server as server
from specforge.contracts.capture import CaptureDtype
from specforge.contracts.codec import Form
from specforge.errors import ContractError

MAX_ID_BYTES = 255
MAX_TOKENS = 4 << 20
"""Tokens of one request."""
MAX_BODY_BYTES = 64 << 20
_MAX_INT32 = 2**31 - 1

What = Literal["request", "model", "token", "busy", "engine"]
"""Of a refusal: the ``request`` breaks the contract; the server has another ``model`` than was meant; the ``token`` is
missing or wrong; the server is ``busy`` or about to stop, and may take the same request later; its ``engine`` failed.
"""
STATUS: dict[What, int] = {"request": 422, "model": 409, "token": 401, "busy": 503, "engine": 500}
"""HTTP status of each."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The body of every answer that is not 200."""

    what: What
    reason: str


CAPTURE = Form(server.CaptureRequest), Form(server.CaptureReply)
GENERATE = Form(server.GenerateRequest), Form(server.GenerateReply)
CLOSE_SINK = Form(server.CloseSink)
INFO = Form(server.ServerInfo)
REFUSAL = Form(Refusal)
SINK: Form[server.Sink] = Form(server.Sink, "Sink")  # type: ignore[arg-type]


def read_capture(data: bytes) -> server.CaptureRequest:
    """The request in ``data``; a :class:`ContractError` for one that a server may not act upon."""
    request = CAPTURE[0].read(data)
    _check_number("items", len(request.items), 1, server.MAX_ITEMS)
    for item in request.items:
        if not 1 <= len(item.sample_id.encode(errors="replace")) <= MAX_ID_BYTES or "\0" in item.sample_id:
            raise ContractError(f"expected sample ids of 1 to {MAX_ID_BYTES} bytes, got {item.sample_id!r:.80}")
        _check_number("generation", item.generation, 1, 2**63 - 1)
    names = [(item.sample_id, item.generation) for item in request.items]
    if len(set(names)) < len(names):
        raise ContractError("a request names one sample twice; ask for each once")
    _check_tokens([item.input_ids for item in request.items])
    spec = request.spec
    if len(set(spec.aux_layers)) < len(spec.aux_layers) or min(spec.aux_layers, default=0) < 0:
        raise ContractError(f"expected distinct layer ids from 0, got {list(spec.aux_layers)}")
    if spec.dtype not in get_args(CaptureDtype):
        raise ContractError(f"expected a dtype of {list(get_args(CaptureDtype))}, got {spec.dtype!r:.40}")
    if not spec.aux_layers and not spec.last_hidden:
        raise ContractError("the request asks for no hidden state: give aux_layers, last_hidden or both")
    return request


def read_generate(data: bytes) -> server.GenerateRequest:
    """The request in ``data``; a :class:`ContractError` for one that a server may not act upon."""
    request = GENERATE[0].read(data)
    _check_number("prompts", len(request.prompts), 1, server.MAX_ITEMS)
    _check_tokens(request.prompts)
    options = request.generate
    _check_number("max_new_tokens", options.max_new_tokens, 1, MAX_TOKENS)
    _check_number("top_k", options.top_k, 0, _MAX_INT32)
    _check_number("seed", options.seed, 0, 2**63 - 1)
    if not (0.0 <= options.temperature <= 100.0 and 0.0 < options.top_p <= 1.0):
        raise ContractError(
            f"expected temperature from 0 to 100 and top_p above 0 up to 1, got {options.temperature} and "
            f"{options.top_p}"
        )
    return request


def _check_number(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ContractError(f"expected {name} from {least} to {most}, got {value}")


def _check_tokens(rows: Sequence[tuple[int, ...]]) -> None:
    if sum(map(len, rows)) > MAX_TOKENS:
        raise ContractError(f"a request has more than {MAX_TOKENS} tokens; send fewer samples at a time")
    for row in rows:
        if row and not 0 <= min(row) <= max(row) <= _MAX_INT32:
            raise ContractError(f"expected token ids from 0 to {_MAX_INT32}, got {min(row)} to {max(row)}")
