"""CaptureServer: one live server behind one contract, whatever it speaks; and the check of what it answers.

Layer ids are outputs of 0-based decoder layers here; a dialect converts them. What goes wrong is one of three:

``ServerUnavailable``   no answer, none in time, a torn one, a 5xx: another server may serve the same samples
``ServerRefused``       it cannot serve this run at all
``PromptRefused``       the request's prompts cannot be captured by any server
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.capture_server import (
    PROTOCOL,
    CapturedItem,
    CaptureItem,
    CaptureReply,
    CaptureRequest,
    GenerateReply,
    GenerateRequest,
    InlineSink,
    ServerInfo,
    Sink,
)
from specforge.contracts.features import FeatureSpec
from specforge.errors import ServerRefused, ServerUnavailable


@dataclass(frozen=True, slots=True)
class Captured:
    """A server's reply. ``tensors`` of each item where the sink was inline, else ``None``, as for items that failed."""

    reply: CaptureReply
    tensors: tuple[dict[str, Tensor] | None, ...]


class CaptureServer(Protocol):
    """One server. Safe to call from several threads."""

    url: str

    def info(self, timeout_s: float) -> ServerInfo:
        """What it is. Raises ``ServerUnavailable`` where it does not say, ``ServerRefused`` for another protocol."""
        ...

    def capture(self, request: CaptureRequest, timeout_s: float) -> Captured:
        """Features of the requested samples, readable in the sink when this returns; see the errors above.

        An item that failed by itself says so in the reply. Not checked against the request: see :func:`verify_capture`.
        """
        ...

    def generate(self, request: GenerateRequest, timeout_s: float) -> GenerateReply:
        """Responses to prompts."""
        ...

    def close_sink(self, sink: Sink) -> None:
        """The run is over. Raises as :meth:`capture` does; a server that is gone has let go already."""
        ...

    def close(self) -> None:
        """Idempotent. Ends the requests in flight, which raise ``ServerUnavailable``; from any thread."""
        ...


def check_info(url: str, info: ServerInfo, target: TargetInfo, spec: CaptureSpec, sink: Sink) -> None:
    """Raise ``ServerRefused`` unless the server at ``url`` can write what ``spec`` wants of ``target`` to ``sink``."""

    def refuse(what: str) -> ServerRefused:
        return ServerRefused(f"the capture server {url} ({info.engine} {info.engine_version}) {what}")

    if info.protocol != PROTOCOL:
        raise refuse(f"speaks version {info.protocol} of the capture protocol, this specforge version {PROTOCOL}")
    if info.target_revision != target.revision:
        raise refuse(
            f"has another target: its revision is {info.target_revision:.16}, that of {target.path} is "
            f"{target.revision:.16}; start it with the weights that the run names"
        )
    for name in ("num_layers", "hidden_size", "vocab_size"):
        got, expected = getattr(info, name), getattr(target, name)
        if got != expected:
            raise refuse(f"has {name} = {got}, the target of the run {expected}; start it with the run's target")
    missing = [] if info.layers is None else [layer for layer in spec.aux_layers if layer not in info.layers]
    if missing:
        raise refuse(
            f"captures the outputs of layers {list(info.layers or ())}, the algorithm wants {list(spec.aux_layers)}; "
            f"start it with layers {list(spec.aux_layers)}"
        )
    if spec.last_hidden and not info.last_hidden:
        raise refuse("does not capture the last hidden state, which the algorithm wants; see its page in docs/howto")
    if sink.kind not in info.sinks:
        raise refuse(f"cannot write to {sink.kind}, only to {', '.join(info.sinks)}; choose one of these")


def verify_capture(url: str, request: CaptureRequest, captured: Captured, target: TargetInfo) -> None:
    """Raise unless the answer is what was asked for: samples, widths, layers, dtypes, token counts, target revision.

    ``ServerRefused`` for another target, ``ServerUnavailable`` for an answer that is none to this request.
    """
    reply = captured.reply
    if reply.target_revision != target.revision:
        raise ServerRefused(
            f"the capture server {url} answered with features of another target (revision "
            f"{reply.target_revision:.16}, the run's is {target.revision:.16}); start it with the run's target"
        )
    asked = [(item.sample_id, item.generation) for item in request.items]
    answered = [(item.sample_id, item.generation) for item in reply.items]
    if asked != answered:
        raise ServerUnavailable(
            f"the capture server {url} was asked for {asked!r:.200}, and answered {answered!r:.200}"
        )
    for item, got in zip(request.items, reply.items, strict=True):
        if got.failure is None:
            _verify_item(url, item, got, request, target)


def own_tensors(url: str, item: CaptureItem, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The features of ``item`` that came back in an answer. ``ServerUnavailable`` where they are of other tokens."""
    if tensors is None or tuple(tensors["input_ids"].tolist()) != item.input_ids:
        raise ServerUnavailable(
            f"the capture server {url} answered sample {item.sample_id!r} with features of other tokens"
        )
    return tensors


def verify_responses(url: str, request: GenerateRequest, reply: GenerateReply, target: TargetInfo) -> None:
    """Raise unless there is one response a prompt, of the run's target; errors as :func:`verify_capture` has them."""
    if reply.target_revision != target.revision:
        raise ServerRefused(
            f"the capture server {url} answered prompts with another target (revision {reply.target_revision:.16}, the "
            f"run's is {target.revision:.16}); start it with the run's target"
        )
    if len(reply.items) != len(request.prompts):
        raise ServerUnavailable(
            f"the capture server {url} answered {len(request.prompts)} prompts with {len(reply.items)} responses"
        )
    most = request.generate.max_new_tokens
    for item in reply.items:
        if len(item.token_ids) > most or not all(0 <= token < target.vocab_size for token in item.token_ids):
            raise ServerUnavailable(
                f"the capture server {url} answered a prompt with {len(item.token_ids)} tokens, of ids up to "
                f"{max(item.token_ids)}; expected at most {most}, of ids below {target.vocab_size}"
            )


def _verify_item(url: str, item: CaptureItem, got: CapturedItem, request: CaptureRequest, target: TargetInfo) -> None:
    num_tokens = len(item.input_ids)
    if got.num_tokens != num_tokens:
        raise ServerUnavailable(
            f"the capture server {url} captured {got.num_tokens} tokens of sample {item.sample_id!r}, which has "
            f"{num_tokens}: features would belong to other tokens"
        )
    features, num_bytes = request.spec.layout(target.hidden_size, num_tokens)
    if (got.features, got.num_bytes) != (features, num_bytes):
        raise ServerRefused(
            f"the capture server {url} gave {_shapes(got.features)} for sample {item.sample_id!r}; expected "
            f"{_shapes(features)}: it captures other layers, another width or another number format"
        )
    kind = request.sink.kind
    if got.store != kind:
        raise ServerRefused(f"the capture server {url} wrote to {got.store!r}, but was asked to write to {kind!r}")


def _shapes(features: Sequence[FeatureSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in features) or "nothing"


INLINE = InlineSink()
