"""From the features of single samples to the packed batch that is trained or evaluated.

Legend: T packed tokens, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import FLOAT8, SCALE_SUFFIX
from specforge.contracts.refs import SampleRef, SlotRef
from specforge.data_plane.encoding import DECODED, decode
from specforge.data_plane.tensors import DTYPES
from specforge.errors import ContractError

IDS_FEATURE = "input_ids"

FeatureWidths = dict[str, tuple[str, int]]
"""name -> (dtype, D) of every feature besides the token ids, as stored."""


def assemble(
    items: Sequence[SlotRef],
    samples: Sequence[dict[str, torch.Tensor]],
    widths: FeatureWidths,
    device: torch.device,
) -> TrainBatch[torch.Tensor]:
    """``samples``, the features of ``items``, one after the other on ``device``: one copy of every feature.

    Features keep their dtype of ``widths``; float8 ones are decoded, and their scales left out. No item is an empty
    batch, with features [0, D].
    """
    num_tokens = sum(item.ref.num_tokens for item in items)
    features = {}
    for name, (dtype, width) in _without_scales(widths).items():
        staged = _staging(device, DTYPES[DECODED if dtype == FLOAT8 else dtype], num_tokens, width)
        fill = _decode_into if dtype == FLOAT8 else _fill
        features[name] = _moved(fill(staged, samples, name), device)
    ids = _fill(_staging(device, torch.int64, num_tokens), samples, IDS_FEATURE)
    return _framed(items, ids, features, device)


def outline(items: Sequence[SlotRef]) -> TrainBatch[torch.Tensor]:
    """What is known of a batch before a feature is read, on the CPU: no features, and token ids that are zeros."""
    num_tokens = sum(item.ref.num_tokens for item in items)
    return _framed(items, torch.zeros(num_tokens, dtype=torch.int64), {}, torch.device("cpu"))


def _framed(
    items: Sequence[SlotRef], ids: torch.Tensor, features: dict[str, torch.Tensor], device: torch.device
) -> TrainBatch[torch.Tensor]:
    """The batch of ``items`` with ``ids`` [T] and ``features`` [T, D]: its masks and positions are made here."""
    lengths = tuple(item.ref.num_tokens for item in items)
    loss_mask = _staging(device, torch.bool, sum(lengths)).zero_()
    position_ids, document_ids = (_staging(device, torch.int64, sum(lengths)) for _ in range(2))
    start = 0
    for document, item in enumerate(items):
        end = start + lengths[document]
        torch.arange(lengths[document], out=position_ids[start:end])
        document_ids[start:end] = document
        for first, last in item.ref.loss_spans:
            loss_mask[start + first : start + last] = True
        start = end
    return TrainBatch(
        input_ids=_moved(ids, device),
        loss_mask=_moved(loss_mask, device),
        position_ids=_moved(position_ids, device),
        document_ids=_moved(document_ids, device),
        features=features,
        lengths=lengths,
        sample_ids=tuple(item.ref.sample_id for item in items),
        slots=tuple(item.slot for item in items),
    )


def _staging(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """An empty host tensor; pinned where it goes on to a GPU, so that the copy there can overlap.

    It may be dropped while that copy runs: PyTorch's host allocator gives pinned memory out again only after the
    copies from it that were under way.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device. The copy is on the stream that computes (each thread's default one), hence before its use."""
    return tensor.to(device, non_blocking=True)


def feature_widths(ref: SampleRef) -> FeatureWidths:
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
