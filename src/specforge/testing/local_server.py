"""A capture server in this process: the right answers that others are compared with."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import Tensor

import specforge
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import (
    PROTOCOL,
    CapturedItem,
    CaptureItem,
    CaptureReply,
    CaptureRequest,
    GeneratedItem,
    GenerateReply,
    GenerateRequest,
    ItemFailure,
    ServerInfo,
    Sink,
)
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.base import FeatureStore, PutRequest
from specforge.data_plane.encoding import not_finite
from specforge.data_plane.inline import INLINE
from specforge.data_plane.tensors import Source, materialised, specs_of
from specforge.errors import DataError, ServerRefused
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.servers.base import Captured

MAX_IN_FLIGHT = 8


class LocalCaptureServer:
    """Implements ``CaptureServer`` with ``engine``, one prompt at a time, whichever thread asks.

    Features go into the answer, or to ``store``, whose name is then the kind of sink that is asked for.
    """

    url = "local"

    def __init__(self, engine: HFTargetEngine, store: FeatureStore | None = None) -> None:
        self._engine, self._store = engine, store
        self._lock = threading.Lock()

    def info(self, timeout_s: float) -> ServerInfo:  # noqa: ARG002
        target = self._engine.info
        return ServerInfo(
            protocol=PROTOCOL,
            engine="local",
            engine_version=specforge.__version__,
            target_revision=target.revision,
            num_layers=target.num_layers,
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            dtype=str(self._engine.dtype).removeprefix("torch."),
            layers=None,
            last_hidden=True,
            sinks=(INLINE, *([self._store.name] if self._store is not None else [])),
            strict=True,
            max_tokens=target.max_position_embeddings,
            max_in_flight=MAX_IN_FLIGHT,
        )

    def capture(self, request: CaptureRequest, timeout_s: float) -> Captured:  # noqa: ARG002
        revision = self._engine.info.revision
        if request.target_revision not in {None, revision}:
            raise ServerRefused(f"{self.url} has the target {revision:.16}, not {request.target_revision:.16}")
        kind = request.sink.kind
        if kind != INLINE and (self._store is None or self._store.name != kind):
            raise ServerRefused(f"{self.url} cannot write to {kind}")
        items: list[CapturedItem] = []
        tensors: list[dict[str, Tensor] | None] = []
        for item in request.items:
            found = self._features(item, request.spec)
            if isinstance(found, ItemFailure):
                items.append(CapturedItem(item.sample_id, item.generation, len(item.input_ids), failure=found))
                tensors.append(None)
            elif kind == INLINE:
                tensors.append({name: materialised(source).cpu() for name, source in found.items()})
                items.append(inline_item(item, tensors[-1] or {}))
            else:
                items.append(self._stored(item, found))
                tensors.append(None)
        return Captured(CaptureReply(revision, tuple(items)), tuple(tensors))

    def generate(self, request: GenerateRequest, timeout_s: float) -> GenerateReply:  # noqa: ARG002
        items = []
        for prompt in request.prompts:
            with self._lock:
                (response,) = self._engine.generate([prompt], request.generate)
            items.append(GeneratedItem(response.token_ids, response.stopped))
        return GenerateReply(self._engine.info.revision, tuple(items))

    def close_sink(self, sink: Sink) -> None:
        pass

    def close(self) -> None:
        pass

    def _features(self, item: CaptureItem, spec: CaptureSpec) -> dict[str, Source] | ItemFailure:
        try:
            with self._lock:
                (sample,) = self._engine.capture([PromptTask(item.sample_id, 0, item.input_ids, ())], spec)
        except DataError as error:
            return ItemFailure("prompt", str(error))
        damaged = not_finite(sample.tensors)
        return sample.tensors if damaged is None else ItemFailure("prompt", f"NaN or infinite values in {damaged}")

    def _stored(self, item: CaptureItem, features: dict[str, Source]) -> CapturedItem:
        assert self._store is not None
        (stored,) = self._store.put([PutRequest(item.sample_id, item.generation, features)])
        return CapturedItem(
            sample_id=item.sample_id,
            generation=item.generation,
            num_tokens=len(item.input_ids),
            store=stored.store,
            key=stored.key,
            num_bytes=stored.num_bytes,
            features=stored.features,
        )


def inline_item(item: CaptureItem, tensors: Mapping[str, Tensor]) -> CapturedItem:
    """What an answer that holds ``tensors`` says of ``item``."""
    specs, num_bytes = specs_of(tensors)
    return CapturedItem(item.sample_id, item.generation, len(item.input_ids), INLINE, "0", num_bytes, specs)
