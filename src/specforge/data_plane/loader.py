"""FeatureDataLoader: where refs and tensors meet. Dispatched slots in, one rank's packed micro-batches out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specforge.contracts.batches import StepBatches, TrainBatch
from specforge.contracts.capture import FLOAT8, SCALE_SUFFIX
from specforge.contracts.refs import SampleRef, SlotRef
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.encoding import DECODED, decode
from specforge.data_plane.packing import plan_rank
from specforge.data_plane.tensors import DTYPES
from specforge.errors import ContractError, FeatureNotFound

IDS_FEATURE = "input_ids"

FeatureWidths = dict[str, tuple[str, int]]
"""name -> (dtype, D) of every feature besides the token ids, as stored."""


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
        widths = _feature_widths(window[0].ref)
        for item in window:
            ref = item.ref
            for what, expected, got in (
                ("capture fingerprint", self._settings.capture_fingerprint, ref.capture_fingerprint),
                ("target revision", self._settings.target_revision, ref.target_revision),
                ("set of features (dtype, width)", widths, _feature_widths(ref)),
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
            return self._assemble(items, [tensors for tensors, _ in lent], widths)
        finally:
            self._store.release([handle for _, handle in lent])

    def _assemble(
        self, items: Sequence[SlotRef], samples: Sequence[dict[str, torch.Tensor]], widths: FeatureWidths
    ) -> TrainBatch[torch.Tensor]:
        lengths = tuple(item.ref.num_tokens for item in items)
        loss_mask = self._staging(torch.bool, sum(lengths)).zero_()
        position_ids, document_ids = (self._staging(torch.int64, sum(lengths)) for _ in range(2))
        start = 0
        for document, item in enumerate(items):
            end = start + lengths[document]
            torch.arange(lengths[document], out=position_ids[start:end])
            document_ids[start:end] = document
            for first, last in item.ref.loss_spans:
                loss_mask[start + first : start + last] = True
            start = end
        features = {}
        for name, (dtype, width) in _without_scales(widths).items():
            staged = self._staging(DTYPES[DECODED if dtype == FLOAT8 else dtype], sum(lengths), width)
            fill = _decode_into if dtype == FLOAT8 else _fill
            features[name] = self._moved(fill(staged, samples, name))
        ids = _fill(self._staging(torch.int64, sum(lengths)), samples, IDS_FEATURE)
        return TrainBatch(
            input_ids=self._moved(ids),
            loss_mask=self._moved(loss_mask),
            position_ids=self._moved(position_ids),
            document_ids=self._moved(document_ids),
            features=features,
            lengths=lengths,
            sample_ids=tuple(item.ref.sample_id for item in items),
            slots=tuple(item.slot for item in items),
        )

    def _staging(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """An empty host tensor; pinned where it goes on to a GPU, so that the copy there can overlap.

        It may be dropped while that copy runs: PyTorch's host allocator gives pinned memory out again only after the
        copies from it that were under way.
        """
        return torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device. The copy is on the stream that computes (each thread's default one), hence before its use."""
        return tensor.to(self._device, non_blocking=True)


def _feature_widths(ref: SampleRef) -> FeatureWidths:
    """Checks the specs of ``ref`` against its token count and spans, and float8 features against their scales."""
    specs = {spec.name: spec for spec in ref.features}
    ids = specs.pop(IDS_FEATURE, None)
    if ids is None or (ids.dtype, ids.shape) != ("int32", (ref.num_tokens,)):
        raise ContractError(
            f"sample {ref.sample_id!r}: expected the feature {IDS_FEATURE!r} as int32 [{ref.num_tokens}], got {ids}"
        )
    for spec in specs.values():
        if len(spec.shape) != 2 or spec.shape[0] != ref.num_tokens:
            raise ContractError(
                f"sample {ref.sample_id!r}: feature {spec.name!r} must be [{ref.num_tokens} tokens, width], "
                f"got {list(spec.shape)}"
            )
    position = 0
    for start, end in ref.loss_spans:
        if not position <= start <= end <= ref.num_tokens:
            raise ContractError(
                f"sample {ref.sample_id!r}: loss spans must ascend inside [0, {ref.num_tokens}), got {ref.loss_spans}"
            )
        position = end
    widths = {spec.name: (spec.dtype, spec.shape[1]) for spec in specs.values()}
    for name, (dtype, width) in widths.items():
        if dtype == FLOAT8:
            scales = widths.get(name + SCALE_SUFFIX)
            if scales is None or scales[0] != "float32" or not scales[1] or width % scales[1]:
                raise ContractError(
                    f"sample {ref.sample_id!r}: feature {name!r} is {FLOAT8} [tokens, {width}] and needs the feature "
                    f"{name + SCALE_SUFFIX!r} as float32 [tokens, a divisor of {width}], got {scales}"
                )
    return widths


def _without_scales(widths: FeatureWidths) -> FeatureWidths:
    scales = {name + SCALE_SUFFIX for name, (dtype, _) in widths.items() if dtype == FLOAT8}
    return {name: width for name, width in widths.items() if name not in scales}


def _fill(target: torch.Tensor, samples: Sequence[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    """Copy the feature ``name`` of ``samples`` into ``target`` one after the other (casting to its dtype)."""
    start = 0
    for sample in samples:
        end = start + len(sample[name])
        target[start:end].copy_(sample[name])
        start = end
    return target


def _decode_into(target: torch.Tensor, samples: Sequence[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    """The same for a float8 feature."""
    start = 0
    for sample in samples:
        end = start + len(sample[name])
        decode(sample[name], sample[name + SCALE_SUFFIX], target[start:end])
        start = end
    return target
