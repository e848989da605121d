"""FeatureDataLoader: where refs and tensors meet. Dispatched slots in, one rank's packed micro-batches out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specforge.contracts.batches import StepBatches, TrainBatch
from specforge.contracts.refs import SlotRef
from specforge.data_plane.assembly import FeatureWidths, assemble, feature_widths
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.packing import plan_rank
from specforge.errors import ContractError, FeatureNotFound


def step_bytes(step: StepBatches[torch.Tensor]) -> int:
    """Bytes of all tensors of one rank's share of a step."""
    return sum(
        tensor.nbytes
        for batch in step.micro_batches
        for tensor in (
            batch.input_ids,
            batch.loss_mask,
            batch.position_ids,
            batch.document_ids,
            *batch.features.values(),
        )
    )


class RefSource(Protocol):
    """Where slots come from, in training order."""

    def get(self, max_slots: int) -> list[SlotRef]:
        """The next ``max_slots`` slots; blocks until they are there. Fewer only at the end, ``[]`` is the end."""
        ...


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """``global_batch_size``: slots an optimizer step, over all ranks. ``max_tokens``: tokens a micro-batch.
    ``num_samples``: slots an epoch.

    ``capture_fingerprint`` and ``target_revision``, where given, must be those of every sample. ``start_slot`` is the
    position with which the source begins: 0, or that of the checkpoint that a ledger was reconciled to. ``in_order``:
    the source gives slots in strict order, else in the order of arrival.
    """

    global_batch_size: int
    max_tokens: int
    num_samples: int
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    capture_fingerprint: str | None = None
    target_revision: str | None = None
    start_slot: int = 0
    in_order: bool = True


class FeatureDataLoader:
    """Iterator of ``StepBatches``, one an optimizer step; the last step may have fewer slots.

    Every rank draws the same slots, and takes its share by position. Features keep their stored dtype, but float8 ones
    come out as bfloat16 and without their scales. Raises ``FeatureNotFound`` where the features of a dispatched slot
    are gone, ``ContractError`` where a sample is not what the run trains on, both naming the sample; ``ContractError``
    where a source in strict order goes back.

    A position (``num_slots``) is the number of the first slot that is not covered; in arrival order, which has no such
    slot, it is how many slots were drawn.
    """

    def __init__(self, refs: RefSource, store: FeatureStore, settings: LoaderSettings) -> None:
        self._refs = refs
        self._store = store
        self._settings = settings
        self._device = torch.device(settings.device)
        self._num_slots = settings.start_slot
        self._drawn_early: list[SlotRef] = []

    def __iter__(self) -> Iterator[StepBatches[torch.Tensor]]:
        return self

    def __next__(self) -> StepBatches[torch.Tensor]:
        settings = self._settings
        window = self._draw(settings.global_batch_size)
        if not window:
            raise StopIteration
        widths = self._check_window(window)
        lengths = [item.ref.num_tokens for item in window]
        bins = plan_rank(lengths, settings.max_tokens, settings.rank, settings.world_size)
        batches = tuple(self._pack([window[position] for position in positions], widths) for positions in bins)
        self._advance(window)
        return StepBatches(batches, tuple(item.slot for item in window), self._num_slots)

    def seek(self, num_slots: int) -> None:
        """Go to position ``num_slots`` of the run: draws the slots in between and fetches no features."""
        while self._num_slots < num_slots:
            drawn = self._draw(min(self._settings.global_batch_size, num_slots - self._num_slots))
            if not drawn:
                raise ContractError(f"cannot seek to slot {num_slots}: the source ends at slot {self._num_slots}")
            if self._settings.in_order and self._linear(drawn[-1]) >= num_slots:
                # Slots before it are skipped in this run: what lies beyond is for the next step.
                self._drawn_early = [item for item in drawn if self._linear(item) >= num_slots]
                self._num_slots = num_slots
            else:
                self._advance(drawn)
        if self._num_slots > num_slots:
            raise ContractError(f"cannot seek back from slot {self._num_slots} to {num_slots}: make a new loader")

    def state_dict(self) -> dict[str, int]:
        """``num_slots``: the position after what was handed out, of which a prefetcher may hold a part."""
        return {"num_slots": self._num_slots}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if set(state) != {"num_slots"}:
            raise ContractError(f"the state of a loader has the key 'num_slots' alone, got {sorted(state)}")
        self.seek(state["num_slots"])

    def _draw(self, max_slots: int) -> list[SlotRef]:
        """The next slots; fewer only at the end."""
        early, self._drawn_early = self._drawn_early, []
        missing = max_slots - len(early)
        return early + self._refs.get(missing) if missing else early

    def _linear(self, item: SlotRef) -> int:
        return item.slot.epoch * self._settings.num_samples + item.slot.position

    def _advance(self, drawn: Sequence[SlotRef]) -> None:
        """Cover ``drawn``."""
        if not self._settings.in_order:
            self._num_slots += len(drawn)
            return
        for item in drawn:
            if self._linear(item) < self._num_slots:
                raise ContractError(
                    f"expected slot number {self._num_slots} or a later one, got {self._linear(item)} ({item.slot}): "
                    "the source is not in strict order, or repeats what was trained"
                )
            self._num_slots = self._linear(item) + 1

    def _check_window(self, window: Sequence[SlotRef]) -> FeatureWidths:
        """Features of the window's samples, which must all be alike."""
        widths = feature_widths(window[0].ref)
        for item in window:
            ref = item.ref
            for what, expected, got in (
                ("capture fingerprint", self._settings.capture_fingerprint, ref.capture_fingerprint),
                ("target revision", self._settings.target_revision, ref.target_revision),
                ("set of features (dtype, width)", widths, feature_widths(ref)),
            ):
                if expected is not None and got != expected:
                    raise ContractError(
                        f"sample {ref.sample_id!r}: this run trains on the {what} {expected!r}, "
                        f"the sample was captured with {got!r}: capture it again for this run"
                    )
        return widths

    def _pack(self, items: Sequence[SlotRef], widths: FeatureWidths) -> TrainBatch[torch.Tensor]:
        """One copy of every feature, from the store's buffers into the batch (a decoding one of float8); the claims end
        with it.
        """
        try:
            lent = self._store.get([item.ref for item in items])
        except FeatureNotFound as error:
            slots = ", ".join(
                f"{item.ref.sample_id!r} (epoch {item.slot.epoch}, {item.slot.position})" for item in items
            )
            raise FeatureNotFound(
                f"{error}. A slot was dispatched whose features are gone, in the micro-batch of {slots}: "
                "its sample must be captured again"
            ) from error
        try:
            return assemble(items, [tensors for tensors, _ in lent], widths, self._device)
        finally:
            self._store.release([handle for _, handle in lent])
