"""Slot, SampleRef and SlotRef: a few hundred bytes that name captured features and the place they are trained in."""

from __future__ import annotations

from dataclasses import dataclass

from specforge.contracts.features import FeatureSpec


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """The ledger's unit: position ``position`` of epoch ``epoch``. Dispatched, trained and acked exactly once."""

    epoch: int
    position: int


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Names the features of one sample. Written by the rollout worker at commit, read by the trainer's loader.

    ``generation`` is the attempt that produced the features; a stale generation can never be read. ``store`` names
    the feature store, ``key`` is that store's own address of the buffer. ``draft_weight_version`` is provenance only.
    """

    sample_id: str
    generation: int
    num_tokens: int
    loss_spans: tuple[tuple[int, int], ...]
    store: str
    key: str
    num_bytes: int
    features: tuple[FeatureSpec, ...]
    target_revision: str
    capture_fingerprint: str
    worker_id: str
    draft_weight_version: int = 0


@dataclass(frozen=True, slots=True)
class SlotRef:
    """A slot dispatched to the trainer together with the features that serve it."""

    slot: Slot
    ref: SampleRef
