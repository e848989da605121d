"""A target that is only tables, random samples of it, and packed batches: what tests of algorithms train on.

Legend: T packed tokens, S tokens of a sample, D width of a feature, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specforge.algorithms.base import TargetTables
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.refs import Slot

SMALL_TARGET = TargetInfo(
    path="",
    architecture="LlamaForCausalLM",
    model_type="llama",
    revision="0",
    num_layers=8,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=40,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    eos_token_ids=(1,),
)


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """One sample, unshifted: ``ids`` int64 [S], ``mask`` bool [S], ``features`` name -> [S, D]."""

    name: str
    ids: Tensor
    mask: Tensor
    features: dict[str, Tensor]
    slot: Slot = field(default_factory=lambda: Slot(0, 0))

    def __len__(self) -> int:
        return len(self.ids)

    def masked(self, *spans: tuple[int, int]) -> Sample:
        """The same sample with supervision in the half-open ``spans`` alone."""
        mask = torch.zeros_like(self.mask)
        for start, end in spans:
            mask[start:end] = True
        return replace(self, mask=mask)

    def padded(self, num_tokens: int) -> Sample:
        """``num_tokens`` more tokens at the end: id 0, no supervision, features of zero."""

        def longer(tensor: Tensor) -> Tensor:
            return torch.cat((tensor, tensor.new_zeros(num_tokens, *tensor.shape[1:])))

        features = {name: longer(tensor) for name, tensor in self.features.items()}
        return replace(self, ids=longer(self.ids), mask=longer(self.mask), features=features)

    def head(self, num_tokens: int) -> Sample:
        """The first ``num_tokens`` tokens."""
        features = {name: tensor[:num_tokens] for name, tensor in self.features.items()}
        return replace(self, ids=self.ids[:num_tokens], mask=self.mask[:num_tokens], features=features)


def random_tables(target: TargetInfo, generator: torch.Generator) -> TargetTables:
    """Independent embedding and head, both N(0, 1)."""
    shape = (target.vocab_size, target.hidden_size)
    return TargetTables(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def random_sample(name: str, length: int, target: TargetInfo, spec: CaptureSpec, generator: torch.Generator) -> Sample:
    """Random ids and features; the answer starts at the third token."""
    ids = torch.randint(0, target.vocab_size, (length,), generator=generator)
    features = {
        feature: torch.randn(length, width, generator=generator)
        for feature, _, width in spec.widths(target.hidden_size)
    }
    return Sample(name, ids, torch.arange(length) >= 2, features)


def pack(samples: Sequence[Sample]) -> TrainBatch[Tensor]:
    """One micro-batch of ``samples`` (at least one), in order."""

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)

    return TrainBatch(
        input_ids=joined([sample.ids for sample in samples]),
        loss_mask=joined([sample.mask for sample in samples]),
        position_ids=joined([torch.arange(len(sample)) for sample in samples]),
        document_ids=joined([torch.full((len(sample),), i) for i, sample in enumerate(samples)]),
        features={name: joined([sample.features[name] for sample in samples]) for name in samples[0].features},
        lengths=tuple(len(sample) for sample in samples),
        sample_ids=tuple(sample.name for sample in samples),
        slots=tuple(sample.slot for sample in samples),
    )


def empty_batch(target: TargetInfo, spec: CaptureSpec) -> TrainBatch[Tensor]:
    """A micro-batch without a sample, as a rank gets one that has fewer than the others."""
    ids = torch.zeros(0, dtype=torch.int64)
    features = {name: torch.zeros(0, width) for name, _, width in spec.widths(target.hidden_size)}
    return TrainBatch(ids, ids.bool(), ids.clone(), ids.clone(), features, (), (), ())
