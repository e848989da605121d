"""P-EAGLE: capture, draft, loss and proposer behind the contract of :mod:`specforge.algorithms.base`."""

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
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.algorithms.peagle.config import PEagleDraftConfig, PEagleOptions
from specforge.algorithms.peagle.features import (
    CodShares,
    draw_depths,
    plan_elements,
    supervised_positions,
)
from specforge.algorithms.peagle.loss import elements_loss, metric_names
from specforge.algorithms.peagle.model import PEagleDraft
from specforge.algorithms.peagle.proposer import PEagleProposer
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import ConfigError

INIT_STD = 0.02


class PEagle(Algorithm):
    """EAGLE with placeholders for the tokens that are not known yet, so that one pass drafts them all.

    Loss of an optimizer step: ``(sum of CE over supervised elements) / N``, ``N`` (:meth:`supervised_weight`) being
    their number, from masks and the keyed draw alone. Elements whose teacher token is outside the draft vocabulary add
    nothing to the loss and count in ``N``.
    """

    name: ClassVar[str] = "peagle"
    config_type: ClassVar[type[DraftConfig]] = PEagleDraftConfig

    def __init__(self, options: PEagleOptions) -> None:
        self.options = options
        self.shares = CodShares(options.num_depths, options.cod_ratio, options.cod_min_ratio)

    def draft_config(self, target: TargetInfo) -> PEagleDraftConfig:
        options = self.options
        mask_token_id = target.unused_token_id if options.mask_token_id is None else options.mask_token_id
        if mask_token_id >= target.vocab_size:
            raise ConfigError(
                f"mask_token_id must be an id of the target's vocabulary of {target.vocab_size}, got {mask_token_id}; "
                "lower it or leave it out"
            )
        default = (1, target.num_layers // 2 - 1, target.num_layers - 4)
        return PEagleDraftConfig(
            **options.sizes(target),
            draft_vocab_size=pruned_size(options.draft_vocab_size, target),
            aux_layers=checked_layers(options.aux_layers, default, target.num_layers, "P-EAGLE"),
            num_layers=options.num_layers,
            mask_token_id=mask_token_id,
        )

    def capture_spec(self, config: PEagleDraftConfig, dtype: str) -> CaptureSpec:
        return CaptureSpec(aux_layers=config.aux_layers, last_hidden=True, dtype=dtype)

    def build_draft(
        self, config: PEagleDraftConfig, tables: TargetTables, seed: int, kept_ids: Tensor | None = None
    ) -> PEagleDraft:
        """Matrices N(0, 0.02), norms 1, ``mask_hidden`` N(0, 1); embedding and head copies of the target's rows."""
        kept_size = config.vocab_size if kept_ids is None else kept_ids.numel()
        expected = (config.vocab_size, config.hidden_size)
        if kept_size != config.draft_vocab_size or tables.embed_tokens.shape != expected:
            raise ConfigError(
                f"expected kept ids for a draft vocabulary of {config.draft_vocab_size} and a target embedding of "
                f"{list(expected)}, got {kept_size} and {list(tables.embed_tokens.shape)}; count the training prompts "
                "and prune with kept_ids, or check the target"
            )
        draft = PEagleDraft(config, kept_ids)
        generator = torch.Generator().manual_seed(seed)
        for module in draft.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
        with torch.no_grad():
            draft.mask_hidden.normal_(generator=generator)
            draft.embed_tokens.weight.copy_(tables.embed_tokens)
            rows = tables.lm_head[target_ids(draft.d2t).to(tables.lm_head.device)]
            draft.lm_head.weight.copy_(rows.float() * tables.logit_scale)
        draft.lm_head.weight.requires_grad_(not self.options.freeze_lm_head)
        return draft.to(tables.lm_head.device)

    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        valid = supervised_positions(batch, self.options.mask_offset)
        drawn = draw_depths(batch, valid, self.shares, context)
        return float(valid.sum()) + sum(anchors.numel() for anchors in drawn)

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        assert isinstance(draft, PEagleDraft)
        num_depths = self.options.num_depths
        valid = supervised_positions(batch, self.options.mask_offset)
        plan = plan_elements(batch, valid, draw_depths(batch, valid, self.shares, context))
        readouts = draft(batch.features["aux"], plan)
        if not valid.any():
            return zero_output(draft, num_depths, metric_names(num_depths), torch.cat(readouts))
        return elements_loss(draft, tables, batch.features["last"], readouts, plan, num_depths)

    def proposer(self, draft: DraftModel, tables: TargetTables) -> PEagleProposer:
        del tables  # the draft has its own
        assert isinstance(draft, PEagleDraft)
        return PEagleProposer(draft)
