"""A capture server that misbehaves as public trainers and plug-ins have: each fault breaks one convention silently.

Legend: S tokens, H hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import (
    CaptureRequest,
    GenerateReply,
    GenerateRequest,
    InlineSink,
    ServerInfo,
    Sink,
)
from specforge.data_plane.encoding import encoded
from specforge.data_plane.tensors import materialised
from specforge.inference.self_test.features import LAST, Features, layer_name, split
from specforge.inference.servers.base import Captured, CaptureServer
from specforge.testing.local_server import inline_item

Fault = Literal[
    "nan",
    "zeros",
    "zero_rows",
    "constant",
    "token_ids",
    "previous_request",
    "fixed_prompt",
    "not_repeatable",
    "swapped_items",
    "batch",
    "row_late",
    "row_early",
    "bidirectional",
    "same_layer",
    "neighbour_layer",
    "layer_order",
    "norm_missing",
    "norm_twice",
    "earlier_last",
    "other_numerics",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
NOISE = 0.2
"""Of a row, relative to its size."""

Layers = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Situation:
    """``features`` of every layer that are right, those captured ``before``, the names of the layers that are
    ``asked`` for, the ``neighbours`` in flight, and how many prompts were captured.
    """

    features: Features
    before: Features
    asked: list[str]
    num_layers: int
    neighbours: int
    number: int
    norm: Callable[[Tensor], Tensor] | None

    def every(self, change: Callable[[Tensor], Tensor]) -> Layers:
        return {name: change(states) for name, states in self.features.layers.items()}

    def noisy(self, seed: int) -> Layers:
        draw = torch.Generator().manual_seed(seed)
        return self.every(lambda states: states + NOISE * _size(states) * torch.randn(states.shape, generator=draw))


def _nothing(_at: _Situation) -> Layers:
    return {}


def _nan(at: _Situation) -> Layers:
    states = at.features.layers[at.asked[0]].clone()
    states[-1, 0] = torch.nan
    return {at.asked[0]: states}


def _without_cached_rows(at: _Situation) -> Layers:
    return at.every(lambda states: states * (torch.arange(len(states)) >= len(states) // 2)[:, None])


def _others(at: _Situation) -> Layers:
    return _cut_to(at.before, at.features).layers


def _next_layers(at: _Situation) -> Layers:
    layers = at.features.layers
    return {layer_name(layer): layers[layer_name(layer + 1)] for layer in range(at.num_layers - 1)}


def _in_reverse(at: _Situation) -> Layers:
    return {name: at.features.layers[other] for name, other in zip(at.asked, at.asked[::-1], strict=True)}


def _normed(at: _Situation, name: str) -> Layers:
    assert at.norm is not None, "this fault needs the target's norm"
    return {LAST: at.norm(at.features.layers[name])}


SPOILT: dict[Fault, Callable[[_Situation], Layers]] = {
    "nan": _nan,
    "zeros": lambda at: at.every(torch.zeros_like),
    "zero_rows": _without_cached_rows,
    "constant": lambda at: at.every(lambda states: states[:1].expand_as(states)),
    "token_ids": _nothing,
    "previous_request": _others,
    "fixed_prompt": _others,
    "not_repeatable": lambda at: at.noisy(at.number),
    "swapped_items": _nothing,
    "batch": lambda at: at.noisy(at.neighbours) if at.neighbours else {},
    "row_late": lambda at: at.every(lambda states: torch.cat([states[:1], states[:-1]])),
    "row_early": lambda at: at.every(lambda states: torch.cat([states[1:], states[-1:]])),
    "bidirectional": lambda at: at.every(lambda states: states + states.mean(dim=0)),
    "same_layer": lambda at: {at.asked[1]: at.features.layers[at.asked[0]]},
    "neighbour_layer": _next_layers,
    "layer_order": _in_reverse,
    "norm_missing": lambda at: {LAST: at.features.layers[layer_name(at.num_layers - 1)]},
    "norm_twice": lambda at: _normed(at, LAST),
    "earlier_last": lambda at: _normed(at, layer_name(at.num_layers // 2)),
    "other_numerics": lambda at: at.every(lambda states: states + NOISE * states.roll(1, dims=1)),
}
"""The layers that each fault changes."""


class FaultyServer:
    """Implements ``CaptureServer``: what ``inner`` answers, spoilt by ``fault``. Inline sinks only.

    ``norm``: the target's final norm, for the faults that concern it.
    """

    def __init__(self, inner: CaptureServer, fault: Fault, norm: Callable[[Tensor], Tensor] | None = None) -> None:
        self._inner, self._fault, self._norm = inner, fault, norm
        self.url = inner.url
        self._lock = threading.Lock()
        self._num_in_flight = 0
        self._num_captured = 0
        self._kept: Features | None = None

    def info(self, timeout_s: float) -> ServerInfo:
        info = self._inner.info(timeout_s)
        deterministic = self._fault not in {"batch", "not_repeatable"}
        return replace(info, sinks=("inline",), strict=info.strict and deterministic)

    def capture(self, request: CaptureRequest, timeout_s: float) -> Captured:
        with self._lock:
            self._num_in_flight += 1
            neighbours = max(self._num_in_flight, len(request.items)) - 1
        try:
            return self._spoilt(request, timeout_s, neighbours)
        finally:
            with self._lock:
                self._num_in_flight -= 1

    def generate(self, request: GenerateRequest, timeout_s: float) -> GenerateReply:
        return self._inner.generate(request, timeout_s)

    def close_sink(self, sink: Sink) -> None:
        self._inner.close_sink(sink)

    def close(self) -> None:
        self._inner.close()

    def _spoilt(self, request: CaptureRequest, timeout_s: float, neighbours: int) -> Captured:
        info = self._inner.info(timeout_s)
        every = CaptureSpec(tuple(range(info.num_layers)), last_hidden=True, dtype="float32")
        answer = self._inner.capture(replace(request, spec=every, sink=InlineSink()), timeout_s)
        found = [split(tensors, every, info.hidden_size) for tensors in answer.tensors if tensors is not None]
        assert len(found) == len(request.items), "the inner server has to capture every prompt"
        if self._fault == "swapped_items":
            found = [_cut_to(other, features) for features, other in zip(found, found[1:] + found[:1], strict=True)]
        spoilt = [self._spoil(features, request.spec, info.num_layers, neighbours) for features in found]
        tensors = [_tensors(features, request.spec) for features in spoilt]
        items = [inline_item(item, mine) for item, mine in zip(request.items, tensors, strict=True)]
        return Captured(replace(answer.reply, items=tuple(items)), tuple(tensors))

    def _spoil(self, features: Features, spec: CaptureSpec, num_layers: int, neighbours: int) -> Features:
        """``features`` of every layer; the answer keeps those of ``spec``."""
        asked = [layer_name(layer) for layer in spec.aux_layers]
        with self._lock:
            self._num_captured += 1
            before = self._kept or features
            self._kept = features if self._fault == "previous_request" else before
            at = _Situation(features, before, asked, num_layers, neighbours, self._num_captured, self._norm)
        ids = features.token_ids.roll(1) if self._fault == "token_ids" else features.token_ids
        layers = {**features.layers, **SPOILT[self._fault](at)}
        return Features(ids, {name: layers[name] for name in [*asked, *([LAST] if spec.last_hidden else [])]})


def _tensors(features: Features, spec: CaptureSpec) -> dict[str, Tensor]:
    """As a server writes them in the format of ``spec``."""
    aux = [states for name, states in features.layers.items() if name != LAST]
    sources = {"input_ids": features.token_ids.to(torch.int32)}
    if aux:
        sources |= {name: materialised(source) for name, source in encoded("aux", aux, spec.dtype).items()}
    if spec.last_hidden:
        last = encoded(LAST, [features.layers[LAST]], spec.dtype)
        sources |= {name: materialised(source) for name, source in last.items()}
    return sources


def _cut_to(other: Features, own: Features) -> Features:
    """The states of ``other`` under the token ids of ``own``, cut or lengthened to as many rows."""
    rows = torch.arange(len(own.token_ids)).clamp_max(len(other.token_ids) - 1)
    return Features(own.token_ids, {name: states[rows] for name, states in other.layers.items()})


def _size(states: Tensor) -> Tensor:
    """Root mean square of every row [S, 1]."""
    return states.square().mean(dim=1, keepdim=True).sqrt()
