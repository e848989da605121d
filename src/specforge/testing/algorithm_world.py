"""A draft of any algorithm with a random target: building it, and the gradient of an optimizer step.

Legend: W draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import Algorithm, DraftModel, StepContext, StepOutput, TargetTables
from specforge.algorithms.catalog import get_algorithm, options_of
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.refs import Slot
from specforge.testing.samples import SMALL_TARGET, Sample, empty_batch, pack, random_sample, random_tables

CONTEXT = StepContext(global_step=3, total_steps=10, seed=5)

BLOCK_DRAFT: dict[str, Any] = {"num_layers": 2, "block_size": 4, "num_anchors": 5, "aux_layers": (1, 3)}

SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 3, "draft_vocab_size": 24},
    "eagle3-norms": {"ttt_steps": 2, "fc_norm": True, "norm_output": True, "freeze_lm_head": True},
    "eagle3-sample_mean": {"ttt_steps": 3, "normalisation": "sample_mean", "loss": "lk_hybrid"},
    "eagle3-mla": {"ttt_steps": 2, "architecture": "mla"},
    "peagle": {"num_depths": 3, "num_layers": 2, "draft_vocab_size": 24},
    "dflash": {**BLOCK_DRAFT},
    "dflash-dpace": {**BLOCK_DRAFT, "loss_type": "dpace"},
    "dflash-sliding": {
        **BLOCK_DRAFT,
        "layer_types": ("full_attention", "sliding_attention"),
        "sliding_window": 5,
    },
    "domino": {**BLOCK_DRAFT, "emb_dim": 6, "gru_hidden_dim": 5},
    "dspark": {**BLOCK_DRAFT, "markov_rank": 5},
    "dspark-rnn": {**BLOCK_DRAFT, "markov_rank": 5, "markov_head_type": "rnn"},
    "mtp": {},
    "medusa": {"num_heads": 3},
    "medusa-shared": {"num_heads": 2, "num_blocks": 2, "shared_head": True, "loss": "soft"},
}
"""Options for :data:`SMALL_TARGET` by name of the algorithm, or the name, a dash and what is special."""


def small_algorithm(case: str) -> Algorithm:
    """The algorithm of an entry of :data:`SMALL_OPTIONS`, or another of the catalog with its defaults."""
    algorithm: Algorithm = get_algorithm(options_of({"name": case.partition("-")[0], **SMALL_OPTIONS.get(case, {})}))
    return algorithm


@dataclass(frozen=True, slots=True, repr=False)
class World:
    """A draft with random weights, large enough for every part to matter, and what it is trained on."""

    algorithm: Algorithm
    target: TargetInfo
    tables: TargetTables
    config: Any
    spec: CaptureSpec
    kept_ids: Tensor | None
    draft: DraftModel

    @property
    def empty(self) -> TrainBatch[Tensor]:
        return empty_batch(self.target, self.spec)

    def samples(self, lengths: Sequence[int], seed: int = 0, epoch: int = 0) -> list[Sample]:
        """Random samples of ``lengths``; the values of each depend on ``seed`` and its place alone."""
        found = []
        for place, length in enumerate(lengths):
            generator = torch.Generator().manual_seed(1000 * seed + place)
            sample = random_sample(f"sample-{place}", length, self.target, self.spec, generator)
            found.append(replace(sample, slot=Slot(epoch, place)))
        return found

    def fresh(self, seed: int) -> DraftModel:
        """Another draft of the same architecture as it is before training."""
        return self.algorithm.build_draft(self.config, self.tables, seed, self.kept_ids)

    def loss(self, batch: TrainBatch[Tensor], context: StepContext = CONTEXT) -> StepOutput:
        return self.algorithm.forward_loss(self.draft, self.tables, batch, context)

    def weight(self, batches: Sequence[TrainBatch[Tensor]], context: StepContext = CONTEXT) -> float:
        return sum(self.algorithm.supervised_weight(batch, context) for batch in batches)


def make_world(algorithm: Algorithm, target: TargetInfo = SMALL_TARGET, seed: int = 11) -> World:
    """A world whose every value depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    tables = random_tables(target, generator)
    config = algorithm.draft_config(target)
    kept_ids = None
    if config.draft_vocab_size < target.vocab_size:
        kept_ids = torch.randperm(target.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
    draft = algorithm.build_draft(config, tables, seed, kept_ids)
    randomise(draft, generator)
    return World(algorithm, target, tables, config, algorithm.capture_spec(config, "float32"), kept_ids, draft)


def randomise(draft: DraftModel, generator: torch.Generator) -> None:
    """Every trainable parameter N(0, 0.2), norms around 1: nothing is zero that training would change."""
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.requires_grad:
                centre = 1.0 if "norm" in name and parameter.dim() == 1 else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + centre)


def packed(groups: Sequence[Sequence[Sample]]) -> list[TrainBatch[Tensor]]:
    return [pack(group) for group in groups]


def accumulate(
    world: World, batches: Sequence[TrainBatch[Tensor]], weight: float, context: StepContext = CONTEXT
) -> list[StepOutput]:
    """Adds to the gradients what ``batches`` contribute to a step whose loss is divided by ``weight``."""
    outputs = []
    for batch in batches:
        output = world.loss(batch, context)
        (output.loss_sum / (weight or 1.0)).backward()
        outputs.append(output)
    return outputs


def gradients(world: World) -> dict[str, Tensor]:
    """Gradients of all trainable parameters; one that was not reached fails."""
    found = {}
    for name, parameter in world.draft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} was not reached by the backward"
            found[name] = parameter.grad.clone()
    return found


def step_gradients(
    world: World, batches: Sequence[TrainBatch[Tensor]], context: StepContext = CONTEXT
) -> dict[str, Tensor]:
    """The gradient of one optimizer step over ``batches``."""
    world.draft.zero_grad()
    accumulate(world, batches, world.weight(batches, context), context)
    return gradients(world)


def assert_same_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rounding: float = 1e-5) -> None:
    """Equal up to ``rounding`` of the largest entry of each tensor, or a hundredth of that of all of them."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 0.01 * largest)
        difference = float((found[name] - tensor).abs().max())
        assert difference <= rounding * scale, f"{name}: differs by {difference:.2e}, largest entry {scale:.2e}"
