"""EAGLE-3: capture, draft, loss and proposer behind the contract of :mod:`specforge.algorithms.base`."""

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
from specforge.algorithms.draft_config import DraftConfig, checked_layers, pruned_size
from specforge.algorithms.eagle3.config import Eagle3DraftConfig, Eagle3Options
from specforge.algorithms.eagle3.features import plan_unroll, row_weights, share_plan
from specforge.algorithms.eagle3.loss import make_teacher, metric_names, row_loss, unroll, unroll_loss
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.eagle3.proposer import Eagle3Proposer
from specforge.algorithms.parts.alignment import supervised_rows
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import ConfigError

INIT_STD = 0.02


class Eagle3(Algorithm):
    """Training-time test: the draft is unrolled ``ttt_steps`` times on its own hidden states (arXiv 2503.01840).

    Loss of an optimizer step: ``sum over k of step_decay**k * (sum of the losses at step k) / N``. ``N``
    (:meth:`supervised_weight`) is the number of rows supervised at step 0, from masks alone. Later steps lose the last
    rows of an answer and stay divided by the same ``N``, so every (row, step) pair weighs ``step_decay**k / N``; other
    ``normalisation`` gives the rows other weights, whose sum at step 0 is ``N``.
    Rows whose teacher token is outside the draft vocabulary add nothing to the loss and count in ``N``.
    """

    name: ClassVar[str] = "eagle3"
    config_type: ClassVar[type[DraftConfig]] = Eagle3DraftConfig
    splits_sequences: ClassVar[bool] = True

    def __init__(self, options: Eagle3Options) -> None:
        self.options = options

    def draft_config(self, target: TargetInfo) -> Eagle3DraftConfig:
        options = self.options
        return Eagle3DraftConfig(
            **options.sizes(target),
            draft_vocab_size=pruned_size(options.draft_vocab_size, target),
            aux_layers=checked_layers(
                options.aux_layers, default_aux_layers(target.num_layers), target.num_layers, "EAGLE-3"
            ),
            fc_norm=options.fc_norm,
            norm_output=options.norm_output,
            norm_before_residual=options.norm_before_residual,
            norm_before_fc=options.norm_before_fc,
        )

    def capture_spec(self, config: Eagle3DraftConfig, dtype: str) -> CaptureSpec:
        return CaptureSpec(aux_layers=config.aux_layers, last_hidden=True, dtype=dtype)

    def build_draft(
        self, config: Eagle3DraftConfig, tables: TargetTables, seed: int, kept_ids: Tensor | None = None
    ) -> Eagle3Draft:
        """Matrices N(0, 0.02), norms 1, the head equal to the target's rows of the kept ids (fp32 copies)."""
        kept_size = config.vocab_size if kept_ids is None else kept_ids.numel()
        if kept_size != config.draft_vocab_size or tables.lm_head.shape[0] != config.vocab_size:
            raise ConfigError(
                f"expected kept ids for a draft vocabulary of {config.draft_vocab_size} out of {config.vocab_size}, "
                f"got {kept_size} out of {tables.lm_head.shape[0]}; count the training prompts and prune with kept_ids"
            )
        draft = Eagle3Draft(config, kept_ids)
        generator = torch.Generator().manual_seed(seed)
        for module in draft.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
        rows = tables.lm_head[target_ids(draft.d2t).to(tables.lm_head.device)]
        draft.lm_head.weight.data.copy_(rows.float() * tables.logit_scale)
        draft.lm_head.weight.requires_grad_(not self.options.freeze_lm_head)
        return draft.to(tables.lm_head.device)

    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        del context
        first = supervised_rows(batch, 1, self.options.mask_offset)[0]
        return row_weights(batch, first, self.options.normalisation)[1]

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        assert isinstance(draft, Eagle3Draft)
        num_steps = self.options.ttt_steps
        supervised = supervised_rows(batch, num_steps, self.options.mask_offset)
        if not supervised.any():
            return zero_output(draft, num_steps, metric_names(num_steps))
        plan, supervision = plan_unroll(batch, supervised)
        if context.sequence is not None:
            plan, supervision = share_plan(plan, supervision, context.sequence)
        teacher = make_teacher(draft, tables, batch, supervision)
        decay = torch.tensor([self.options.step_decay**k for k in range(num_steps)], device=supervised.device)
        shares, _ = row_weights(batch, supervised[0], self.options.normalisation)
        weights = decay.unsqueeze(-1) * shares[plan.context[plan.rows]]
        readouts = unroll(draft, tables, batch, plan)
        return unroll_loss(draft, readouts, supervision, teacher, weights, row_loss(self.options), plan.share)

    def proposer(self, draft: DraftModel, tables: TargetTables) -> Eagle3Proposer:
        assert isinstance(draft, Eagle3Draft)
        return Eagle3Proposer(draft, tables)


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """``[1, L // 2 - 1, L - 4]``, ids "output of layer i"."""
    return (1, num_layers // 2 - 1, num_layers - 4)
