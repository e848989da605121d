"""EAGLE-3: capture, draft, loss and proposer behind the contract of :mod:`specforge.algorithms.base`."""

from __future__ import annotations

import itertools
from typing import ClassVar

import torch
from torch import Tensor, nn

from specforge.algorithms.base import Algorithm, DraftModel, StepContext, StepOutput, TargetTables
from specforge.algorithms.eagle3.config import Eagle3DraftConfig, Eagle3Options
from specforge.algorithms.eagle3.features import plan_unroll, supervised_rows
from specforge.algorithms.eagle3.loss import empty_output, make_teacher, unroll, unroll_loss
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.eagle3.proposer import Eagle3Proposer
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import ConfigError

INIT_STD = 0.02


class Eagle3(Algorithm):
    """Training-time test: the draft is unrolled ``ttt_steps`` times on its own hidden states (arXiv 2503.01840).

    Loss of an optimizer step: ``sum over k of step_decay**k * (sum of CE at step k) / N``. ``N``
    (:meth:`num_supervised`) is the number of rows supervised at step 0, from masks alone. Later steps lose the last
    rows of an answer and stay divided by the same ``N``, so every (row, step) pair weighs ``step_decay**k / N``.
    Rows whose teacher token is outside the draft vocabulary add nothing to the loss and count in ``N``.
    """

    name: ClassVar[str] = "eagle3"

    def __init__(self, options: Eagle3Options) -> None:
        self.options = options

    def capture_spec(self, target: TargetInfo, dtype: str) -> CaptureSpec:
        return CaptureSpec(
            aux_layers=aux_layers(self.options.aux_layers, target.num_layers), last_hidden=True, dtype=dtype
        )

    def draft_config(self, target: TargetInfo) -> Eagle3DraftConfig:
        options = self.options
        draft_vocab_size = options.draft_vocab_size or target.vocab_size
        if draft_vocab_size > target.vocab_size:
            raise ConfigError(
                f"draft_vocab_size must be at most the target's vocabulary of {target.vocab_size}, "
                f"got {draft_vocab_size}; lower it or leave it out"
            )
        return Eagle3DraftConfig(
            hidden_size=target.hidden_size,
            target_hidden_size=target.hidden_size,
            intermediate_size=options.intermediate_size or target.intermediate_size,
            num_attention_heads=options.num_attention_heads or target.num_attention_heads,
            num_key_value_heads=options.num_key_value_heads or target.num_key_value_heads,
            head_dim=options.head_dim or target.head_dim,
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=target.rope_theta,
            rope_scaling=target.rope_scaling,
            max_position_embeddings=target.max_position_embeddings,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            aux_layers=aux_layers(options.aux_layers, target.num_layers),
            target_num_layers=target.num_layers,
            fc_norm=options.fc_norm,
            norm_output=options.norm_output,
            norm_before_residual=options.norm_before_residual,
            norm_before_fc=options.norm_before_fc,
        )

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
        if tables.lm_head.shape[1] == config.hidden_size:
            rows = tables.lm_head[target_ids(draft.d2t).to(tables.lm_head.device)]
            draft.lm_head.weight.data.copy_(rows.float() * tables.logit_scale)
        draft.lm_head.weight.requires_grad_(not self.options.freeze_lm_head)
        return draft.to(tables.lm_head.device)

    def num_supervised(self, batch: TrainBatch[Tensor]) -> int:
        return int(supervised_rows(batch, 1, self.options.mask_offset).sum())

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        del context  # nothing is drawn and nothing is scheduled
        assert isinstance(draft, Eagle3Draft)
        num_steps = self.options.ttt_steps
        supervised = supervised_rows(batch, num_steps, self.options.mask_offset)
        if not supervised.any():
            return empty_output(draft, num_steps)
        plan, supervision = plan_unroll(batch, supervised)
        teacher = make_teacher(draft, tables, batch, supervision)
        decay = torch.tensor([self.options.step_decay**k for k in range(num_steps)])
        return unroll_loss(draft, unroll(draft, tables, batch, plan), supervision, teacher, decay)

    def proposer(self, draft: DraftModel, tables: TargetTables) -> Eagle3Proposer:
        assert isinstance(draft, Eagle3Draft)
        return Eagle3Proposer(draft, tables)


def aux_layers(chosen: tuple[int, ...] | None, num_layers: int) -> tuple[int, ...]:
    """The captured layers, default ``[1, L // 2 - 1, L - 4]``, ids "output of layer i".

    Raises :class:`ConfigError` unless they are distinct, ascending and at most ``L - 2``.
    """
    layers = (1, num_layers // 2 - 1, num_layers - 4) if chosen is None else chosen
    ascending = all(a < b for a, b in itertools.pairwise(layers))
    if not layers or not ascending or layers[0] < 0 or layers[-1] > num_layers - 2:
        origin = "the default of EAGLE-3" if chosen is None else "the option aux_layers"
        raise ConfigError(
            f"expected distinct ascending layer ids between 0 and {num_layers - 2} for a target of {num_layers} "
            f"layers, got {list(layers)} from {origin}; set aux_layers, for example to {_example(num_layers)}"
        )
    return layers


def _example(num_layers: int) -> list[int]:
    last = max(num_layers - 2, 0)
    return sorted({0, last // 2, last})
