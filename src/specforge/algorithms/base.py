"""The contract between a draft algorithm and everything that drives it (trainer, decoder, export).

Legend: T tokens of a packed micro-batch, H hidden size of the draft, Ht of the target, V target vocabulary, W draft
vocabulary, K number of positions that a draft proposes in training (TTT steps, depths, block slots, heads), l proposals
of a round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specforge.algorithms.draft_config import DraftConfig
from specforge.algorithms.parts.sequence import SequenceShare
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo


@dataclass(frozen=True, slots=True)
class TargetTables:
    """The frozen parts of a target that a draft shares: embedding [V, Ht] and output head [V, Ht].

    ``logit_softcap`` and ``logit_scale`` repeat what the target does after its head, so that teacher logits are
    ``target_logits(tables, last)``. ``lm_head_bias`` [V] is ``None`` for almost every target. ``directory`` is where
    the target's other weights can be read, for a draft that starts from some of them.
    """

    embed_tokens: Tensor
    lm_head: Tensor
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    lm_head_bias: Tensor | None = None
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where training is: completed optimizer steps, the horizon, and the seed of keyed randomness.

    ``exhaustive``: every position is supervised and nothing is drawn, as an evaluation wants it. ``sequence``: the
    batch is that of a sequence group, and :meth:`Algorithm.forward_loss` gives the sums of this rank's share of its
    rows; ``None``: of all rows.
    """

    global_step: int
    total_steps: int
    seed: int
    exhaustive: bool = False
    sequence: SequenceShare | None = None


@dataclass(frozen=True, slots=True)
class Runs:
    """The rounds of drafting that the supervised rows of a batch stand for.

    * ``anchors`` int64 [R]: packed index of the last committed token of each
    * ``lengths`` int64 [R]: the leading run of correct positions, up to the last supervised one
    """

    anchors: Tensor
    lengths: Tensor

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sum over the rows of 1 + their runs, and their number."""
        return (1 + self.lengths).sum(), torch.tensor(self.lengths.numel(), device=self.lengths.device)


@dataclass(slots=True)
class StepOutput:
    """What one micro-batch contributes. Everything is a sum; the trainer divides by sums over the whole step.

    * ``loss_sum`` scalar: weighted sum over supervised positions, *not* divided
    * ``correct``, ``count`` [K]: per-position acceptance of the draft's greedy proposal
    * ``runs``: of every supervised row, the leading run of correct positions
    * ``metrics``: name -> (sum, count), scalars
    """

    loss_sum: Tensor
    correct: Tensor
    count: Tensor
    runs: Runs
    metrics: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn from logits: softmax at ``temperature`` (> 0) over the ``top_k`` largest logits, of them the
    smallest set with probability ``top_p``. ``generator`` is on the CPU; draws are made there.
    """

    temperature: float
    generator: torch.Generator
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True)
class TreeShape:
    """A tree of drafted tokens: ``top_k`` children a node and nodes a level, ``depth`` levels below the first,
    ``num_nodes`` nodes in all, the root (the last committed token) included (EAGLE-2, arXiv 2406.16858).
    """

    top_k: int
    depth: int
    num_nodes: int


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What a round asks for: at most ``num_proposals`` tokens in a chain, or a ``tree``.

    ``sampling`` ``None`` is greedy. A tree is made without drawing, whatever the sampling is.
    """

    num_proposals: int
    sampling: Sampling | None = None
    tree: TreeShape | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Proposed tokens (target ids) of one round. May be empty.

    * a chain: ``tokens`` in order; ``probabilities`` fp32 [l, V] are the distributions that they were drawn from,
      exactly (zeros outside a pruned vocabulary), ``None`` for tokens that were not drawn (point masses)
    * a tree: ``parents`` [l] is the index in ``tokens`` of each one's parent, -1 for a child of the last committed
      token; a parent comes before its children, and no two children of a node are equal
    """

    tokens: tuple[int, ...]
    probabilities: Tensor | None = None
    parents: tuple[int, ...] | None = None


class Proposer(ABC):
    """Drafting for one sequence. Keeps its own cache; the decoder owns the target's.

    At every call the committed tokens are x_0..x_n, where x_n was emitted but not yet processed by the target, and
    features exist for positions 0..n-1. How many tokens a round proposes depends on earlier tokens alone.
    """

    drafts_trees: ClassVar[bool] = False

    @abstractmethod
    def reset(self) -> None:
        """Forget the sequence, and read the draft's weights again."""

    @abstractmethod
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        """Continue ``tokens`` (all committed ids x_0..x_n).

        ``features`` hold only the positions that are new since the last call (all of 0..n-1 at the first), each
        [new positions, D]. Everything speculative of the last call is dropped first. A request for a tree is only made
        where ``drafts_trees`` is true.
        """


class DraftModel(nn.Module):
    """A draft: trainable parameters and buffers under their served names; frozen target tables are not in it.

    ``blocks_run_once``: whether ``forward_loss`` calls each of :meth:`training_blocks` exactly once, also for a batch
    without supervision. Then a block's parameters are read inside that block's ``forward`` alone, so that they can be
    sharded by block. ``False`` where one forward calls a block several times: such a block can be checkpointed and
    compiled, but its gradient is complete only after the whole backward.
    """

    blocks_run_once: ClassVar[bool] = True

    def training_blocks(self) -> Sequence[nn.Module]:
        """The repeated layers, in the order of the forward. Training calls each as a module, ``block(..)``, with all
        tensors that need gradients among its arguments; drafting may use their parts. None where nothing repeats.
        """
        return ()

    def served_state(self) -> dict[str, Tensor]:
        """Tensors by served checkpoint name (weights and vocabulary maps), detached, as they are."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def vocabulary_tables(self) -> frozenset[str]:
        """Names of the matrices with a row for every id: lookups and heads, which no optimizer may orthogonalise."""
        endings = ("lm_head.weight", "embed_tokens.weight")
        return frozenset(name for name, _ in self.named_parameters() if name.endswith(endings))


@dataclass(frozen=True, slots=True)
class Pace:
    """How an algorithm is trained where a run does not say: peak rate, share of warm-up steps, bound of gradients."""

    lr: float = 1e-4
    warmup_ratio: float = 0.015
    max_grad_norm: float = 0.5


class Algorithm(ABC):
    """One way to train and use a draft. Stateless: everything that learns is in the draft.

    ``splits_sequences``: whether ``forward_loss`` knows ``context.sequence``. Then outputs of the ranks of a group add
    up to the output for the whole batch; ``supervised_weight`` is that of the whole batch on each of them.
    """

    name: ClassVar[str]
    config_type: ClassVar[type[DraftConfig]]
    recommended: ClassVar[Pace] = Pace()
    splits_sequences: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, options: Any) -> None:
        """``options``: the algorithm's own record, as the catalog names it."""

    @abstractmethod
    def draft_config(self, target: TargetInfo) -> Any:
        """The draft's architecture for ``target``, a ``config_type``.

        A shallow target for which the default layer ids collide is a :class:`ConfigError`.
        """

    @abstractmethod
    def capture_spec(self, config: Any, dtype: str) -> CaptureSpec:
        """What a draft of this ``config`` (and its training) needs captured of the target."""

    @abstractmethod
    def build_draft(self, config: Any, tables: TargetTables, seed: int, kept_ids: Tensor | None = None) -> DraftModel:
        """A fresh draft, initialised from ``seed`` alone (own generator) and the target's tables.

        ``kept_ids`` [W] int64 ascending: the pruned draft vocabulary, ``None`` for the full one.
        """

    @abstractmethod
    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        """What the loss is divided by, this batch's part of it: the number of supervised positions, or the sum of their
        weights where the loss is a weighted mean. From masks and keyed draws alone: known before any forward.
        """

    @abstractmethod
    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        """Loss sum and metric sums of one micro-batch (an empty batch gives zeros that still reach every parameter)."""

    @abstractmethod
    def proposer(self, draft: DraftModel, tables: TargetTables) -> Proposer:
        """The inference side of the same draft."""


def zero_output(
    draft: DraftModel, num_positions: int, metrics: tuple[str, ...] = (), states: Tensor | None = None
) -> StepOutput:
    """What an empty batch contributes: zeros that reach every trainable parameter, whatever their values are.

    ``states`` [0, ..] is what the blocks make of no rows. It is needed where they run once: it alone reaches their
    parameters, and a rank with an empty batch takes part in the same collectives as the others.
    """
    inside = {p for block in draft.training_blocks() for p in block.parameters()} if draft.blocks_run_once else set()
    assert not inside or states is not None, f"{type(draft).__name__}: call the blocks on no rows and pass their states"
    reached: list[Tensor] = [p for p in draft.parameters() if p.requires_grad and p not in inside]
    reached += [] if states is None else [states]
    loss = torch.stack([tensor.flatten()[:0].sum().float() for tensor in reached]).sum()
    none = torch.zeros(num_positions, dtype=torch.int64, device=loss.device)
    zero = none.new_zeros(())
    return StepOutput(loss, none, none.clone(), Runs(none[:0], none[:0]), dict.fromkeys(metrics, (zero, zero)))


def target_logits(tables: TargetTables, last: Tensor) -> Tensor:
    """Teacher logits [.., V] in fp32 from the last hidden state after the final norm [.., Ht]."""
    logits = torch.nn.functional.linear(last.to(tables.lm_head.dtype), tables.lm_head, tables.lm_head_bias).float()
    logits = logits if tables.logit_scale == 1.0 else logits * tables.logit_scale
    if tables.logit_softcap is not None:
        logits = torch.tanh(logits / tables.logit_softcap) * tables.logit_softcap
    return logits
