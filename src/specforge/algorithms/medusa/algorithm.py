"""Medusa: capture, draft, loss and proposer behind the contract of :mod:`specforge.algorithms.base`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from specforge.algorithms.base import (
    Algorithm,
    DraftModel,
    StepContext,
    StepOutput,
    TargetTables,
    zero_output,
)
from specforge.algorithms.draft_config import DraftConfig, SizeOptions
from specforge.algorithms.medusa.config import MedusaDraftConfig, MedusaOptions
from specforge.algorithms.medusa.features import supervise
from specforge.algorithms.medusa.loss import heads_loss, make_teacher, metric_names
from specforge.algorithms.medusa.model import MedusaDraft
from specforge.algorithms.medusa.proposer import MedusaProposer
from specforge.algorithms.parts.alignment import supervised_rows
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import ConfigError


class Medusa(Algorithm):
    """Heads on the target's last hidden state, each one token further than the one before (arXiv 2401.10774).

    Loss of an optimizer step: ``sum over heads k of head_decay**k * (sum of CE of head k) / N``, ``N``
    (:meth:`supervised_weight`) being the number of rows that train head 0, from masks alone.
    """

    name: ClassVar[str] = "medusa"
    config_type: ClassVar[type[DraftConfig]] = MedusaDraftConfig

    def __init__(self, options: MedusaOptions) -> None:
        self.options = options

    def draft_config(self, target: TargetInfo) -> MedusaDraftConfig:
        options = self.options
        return MedusaDraftConfig(
            **SizeOptions().sizes(target),
            draft_vocab_size=target.vocab_size,
            aux_layers=(),
            num_heads=options.num_heads,
            num_blocks=options.num_blocks,
            shared_head=options.shared_head,
        )

    def capture_spec(self, config: MedusaDraftConfig, dtype: str) -> CaptureSpec:
        return CaptureSpec(aux_layers=config.aux_layers, last_hidden=True, dtype=dtype)

    def build_draft(
        self, config: MedusaDraftConfig, tables: TargetTables, seed: int, kept_ids: Tensor | None = None
    ) -> MedusaDraft:
        """Blocks zero and output matrices the target's head: every head starts as the target's own. Draws nothing."""
        del seed
        if kept_ids is not None or tables.lm_head.shape != (config.vocab_size, config.hidden_size):
            raise ConfigError(
                f"Medusa heads have the target's whole vocabulary: expected no kept ids and a target head of "
                f"[{config.vocab_size}, {config.hidden_size}], got {list(tables.lm_head.shape)}; check the target"
            )
        draft = MedusaDraft(config)
        for module in draft.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not config.shared_head:
            with torch.no_grad():
                for head in range(config.num_heads):
                    draft.head_weight(head).copy_(tables.lm_head.float() * tables.logit_scale)
        return draft.to(tables.lm_head.device)

    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        del context
        return float(supervised_rows(batch, 1).sum())

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        del context  # nothing is drawn and nothing is scheduled
        assert isinstance(draft, MedusaDraft)
        num_heads, soft = draft.config.num_heads, self.options.loss == "soft"
        supervision = supervise(batch, num_heads)
        if not supervision.mask.any():
            nothing = batch.features["last"][:0]
            states = torch.cat([draft(head, nothing) for head in range(num_heads)])
            return zero_output(draft, num_heads, metric_names(num_heads, soft=soft), states)
        teacher = make_teacher(tables, batch, supervision) if soft else None
        return heads_loss(draft, tables, batch, supervision, teacher=teacher, decay=self.options.head_decay)

    def proposer(self, draft: DraftModel, tables: TargetTables) -> MedusaProposer:
        assert isinstance(draft, MedusaDraft)
        return MedusaProposer(draft, tables)
