"""Reading what a server captured: from its answer, or from the store that it wrote to.

Legend: S tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge.contracts.capture import FLOAT8, SCALE_SUFFIX, CaptureSpec
from specforge.contracts.capture_server import CaptureRequest
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import FeatureStore
from specforge.inference.servers.base import Captured

LAST = "last"


@dataclass(frozen=True, slots=True)
class Features:
    """Of one prompt: ``token_ids`` int64 [S] as captured; ``layers``: name -> fp32 [S, H], the layers of ``aux`` by
    :func:`layer_name` in the order of the spec, then ``last``.
    """

    token_ids: Tensor
    layers: dict[str, Tensor]


class FeatureReader(Protocol):
    """Gives the tensors of a server's answer, and forgets them."""

    def read(self, request: CaptureRequest, captured: Captured) -> list[Mapping[str, Tensor]]:
        """Features of every item, which stay valid whatever happens to the store. No item may have failed."""
        ...

    def free(self, samples: Sequence[tuple[str, int]]) -> None:
        """Nobody wants the features of these (sample_id, generation) any more, captured or not."""
        ...


class InlineReader:
    """``FeatureReader`` of features that are in the answer."""

    def read(self, request: CaptureRequest, captured: Captured) -> list[Mapping[str, Tensor]]:  # noqa: ARG002
        return [tensors for tensors in captured.tensors if tensors is not None]

    def free(self, samples: Sequence[tuple[str, int]]) -> None:
        pass


class StoreReader:
    """``FeatureReader`` of features in ``store``, which the server wrote to."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def read(self, request: CaptureRequest, captured: Captured) -> list[Mapping[str, Tensor]]:
        refs = [
            SampleRef(
                sample_id=item.sample_id,
                generation=item.generation,
                num_tokens=item.num_tokens,
                loss_spans=(),
                store=item.store,
                key=item.key,
                num_bytes=item.num_bytes,
                features=item.features,
                target_revision=captured.reply.target_revision,
                capture_fingerprint=request.spec.fingerprint,
                worker_id="self-test",
            )
            for item in captured.reply.items
        ]
        found = self._store.get(refs)
        copies = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors, _ in found]
        self._store.release([handle for _, handle in found])
        return list(copies)

    def free(self, samples: Sequence[tuple[str, int]]) -> None:
        self._store.abort(samples)


def layer_name(layer: int) -> str:
    return f"layer {layer}"


def split(tensors: Mapping[str, Tensor], spec: CaptureSpec, hidden_size: int) -> Features:
    """The layers in ``tensors``, which are laid out as ``spec`` says."""
    layers: dict[str, Tensor] = {}
    if spec.aux_layers:
        whole = _decoded(tensors, "aux", spec)
        parts = whole.split(hidden_size, dim=1)
        layers |= {layer_name(layer): part for layer, part in zip(spec.aux_layers, parts, strict=True)}
    if spec.last_hidden:
        layers[LAST] = _decoded(tensors, LAST, spec)
    return Features(tensors["input_ids"].long(), layers)


def _decoded(tensors: Mapping[str, Tensor], name: str, spec: CaptureSpec) -> Tensor:
    """fp32. A float8 value that is NaN, or has a scale that is none, becomes NaN."""
    values = tensors[name]
    if spec.dtype != FLOAT8:
        return values.float()
    scales = tensors[name + SCALE_SUFFIX]
    layers = torch.unflatten(values.float(), 1, (scales.shape[1], -1))
    return (layers * scales[:, :, None]).flatten(1)


def distances(got: Tensor, wanted: Tensor) -> Tensor:
    """Of every row [S]: the norm of the difference, relative to that of ``wanted``. Both [S, H].

    Rows are compared one by one: the first tokens of many targets have states hundreds of times larger than the rest.
    """
    norms = torch.linalg.vector_norm(wanted, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    found: Tensor = torch.linalg.vector_norm(got - wanted, dim=1) / norms
    return found
