"""The contract between a draft algorithm and everything that drives it (trainer, decoder, export).

Legend: T tokens of a packed micro-batch, H hidden size of the draft, V target vocabulary, W draft vocabulary,
K number of positions that a draft proposes in training (TTT steps, block slots, heads).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo


@dataclass(frozen=True, slots=True)
class TargetTables:
    """The frozen parts of a target that a draft shares: embedding [V, Ht] and output head [V, Ht].

    ``logit_softcap`` and ``logit_scale`` repeat what the target does after its head, so that teacher logits are
    ``target_logits(tables, last)``. ``lm_head_bias`` [V] is ``None`` for almost every target.
    """

    embed_tokens: Tensor
    lm_head: Tensor
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    lm_head_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where training is: completed optimizer steps, the horizon, and the seed of keyed randomness."""

    global_step: int
    total_steps: int
    seed: int


@dataclass(slots=True)
class StepOutput:
    """What one micro-batch contributes. Everything is a sum; the trainer divides by sums over the whole step.

    * ``loss_sum`` scalar: weighted sum over supervised positions, *not* divided
    * ``correct``, ``count`` [K]: per-position acceptance of the draft's greedy proposal
    * ``run_length`` (sum, count): over supervised rows, 1 + the leading run of correct positions
    * ``metrics``: name -> (sum, count), scalars
    """

    loss_sum: Tensor
    correct: Tensor
    count: Tensor
    run_length: tuple[Tensor, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Proposed tokens (target ids) of one round, in order. May be empty."""

    tokens: tuple[int, ...]


class Proposer(ABC):
    """Chain drafting for one sequence. Keeps its own cache; the decoder owns the target's.

    At every call the committed tokens are x_0..x_n, where x_n was emitted but not yet processed by the target, and
    features exist for positions 0..n-1.
    """

    @abstractmethod
    def reset(self) -> None:
        """Forget the sequence."""

    @abstractmethod
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], num_proposals: int) -> Proposal:
        """Continue ``tokens`` (all committed ids x_0..x_n).

        ``features`` hold only the positions that are new since the last call (all of 0..n-1 at the first), each
        [new positions, D]. Everything speculative of the last call is dropped first.
        """


class DraftModel(nn.Module):
    """A draft: trainable parameters and buffers under their served names; frozen target tables are not in it."""

    def served_state(self) -> dict[str, Tensor]:
        """Tensors by served checkpoint name (weights and vocabulary maps), detached, as they are."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}


class Algorithm(ABC):
    """One way to train and use a draft. Stateless: everything that learns is in the draft."""

    name: ClassVar[str]

    @abstractmethod
    def capture_spec(self, target: TargetInfo, dtype: str) -> CaptureSpec:
        """What to capture from ``target``; a shallow target for which the default ids collide is a ConfigError."""

    @abstractmethod
    def draft_config(self, target: TargetInfo) -> Any:
        """The draft's architecture for ``target``: a frozen dataclass with ``to_dict`` / ``from_dict``."""

    @abstractmethod
    def build_draft(self, config: Any, tables: TargetTables, seed: int, kept_ids: Tensor | None = None) -> DraftModel:
        """A fresh draft, initialised from ``seed`` alone (own generator) and the target's tables.

        ``kept_ids`` [W] int64 ascending: the pruned draft vocabulary, ``None`` for the full one.
        """

    @abstractmethod
    def num_supervised(self, batch: TrainBatch[Tensor]) -> int:
        """Number of supervised positions, from masks alone: known before any forward."""

    @abstractmethod
    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        """Loss sum and metric sums of one micro-batch (an empty batch gives zeros that still reach every parameter)."""

    @abstractmethod
    def proposer(self, draft: DraftModel, tables: TargetTables) -> Proposer:
        """The inference side of the same draft."""


def target_logits(tables: TargetTables, last: Tensor) -> Tensor:
    """Teacher logits [.., V] in fp32 from the last hidden state after the final norm [.., Ht]."""
    logits = torch.nn.functional.linear(last.to(tables.lm_head.dtype), tables.lm_head, tables.lm_head_bias).float()
    logits = logits if tables.logit_scale == 1.0 else logits * tables.logit_scale
    if tables.logit_softcap is not None:
        logits = torch.tanh(logits / tables.logit_softcap) * tables.logit_softcap
    return logits
