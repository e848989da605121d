"""MTP: capture, draft, loss and proposer behind the contract of :mod:`specforge.algorithms.base`."""

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
from specforge.algorithms.draft_config import DraftConfig
from specforge.algorithms.mtp.config import QK_NORM_MODEL_TYPES, MtpDraftConfig, MtpOptions
from specforge.algorithms.mtp.features import plan_steps
from specforge.algorithms.mtp.loss import metric_names, step_weights, steps_loss
from specforge.algorithms.mtp.model import MtpDraft, step_embeddings
from specforge.algorithms.mtp.proposer import MtpProposer
from specforge.algorithms.parts.alignment import supervised_rows
from specforge.algorithms.parts.target_layers import TargetLayer, last_layer
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import ConfigError, DraftError

INIT_STD = 0.02
HIDDEN_SCALE = 0.1
"""What passes of the normed hidden state at the start: measured, docs/algorithms/mtp.md."""


class Mtp(Algorithm):
    """One layer of the target's kind, applied ``num_steps`` times to its own output.

    Loss of an optimizer step: ``sum over k of w_k * (sum of CE at step k) / N``, ``w_k`` proportional to
    ``step_decay**k`` with a sum of 1, ``N`` (:meth:`supervised_weight`) the number of rows supervised at step 0, from
    masks alone.
    """

    name: ClassVar[str] = "mtp"
    config_type: ClassVar[type[DraftConfig]] = MtpDraftConfig

    def __init__(self, options: MtpOptions) -> None:
        self.options = options

    def draft_config(self, target: TargetInfo) -> MtpDraftConfig:
        chosen = self.options.qk_norm
        return MtpDraftConfig(
            **self.options.sizes(target),
            draft_vocab_size=target.vocab_size,
            aux_layers=(),
            qk_norm=target.model_type in QK_NORM_MODEL_TYPES if chosen is None else chosen,
        )

    def capture_spec(self, config: MtpDraftConfig, dtype: str) -> CaptureSpec:
        return CaptureSpec(aux_layers=config.aux_layers, last_hidden=True, dtype=dtype)

    def build_draft(
        self, config: MtpDraftConfig, tables: TargetTables, seed: int, kept_ids: Tensor | None = None
    ) -> MtpDraft:
        """Layer and final norm the target's last ones where ``tables.directory`` is known, else N(0, 0.02) and 1.

        ``fc`` passes a tenth of the normed hidden state and adds N(0, 0.02) of the token; the other norms are 1.
        """
        if kept_ids is not None or tables.lm_head.shape != (config.vocab_size, config.hidden_size):
            raise ConfigError(
                f"an MTP draft reads out through the target's own head: expected no kept ids and a head of "
                f"[{config.vocab_size}, {config.hidden_size}], got {list(tables.lm_head.shape)}; check the target"
            )
        draft = MtpDraft(config)
        generator = torch.Generator().manual_seed(seed)
        for module in draft.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
        with torch.no_grad():
            draft.mtp.fc.weight[:, config.hidden_size :] = HIDDEN_SCALE * torch.eye(config.hidden_size)
        if tables.directory is not None and self.options.init_from_target:
            _start_from(draft, last_layer(tables.directory))
        return draft.to(tables.lm_head.device)

    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        del context
        return float(supervised_rows(batch, 1).sum())

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        del context  # nothing is drawn and nothing is scheduled
        assert isinstance(draft, MtpDraft)
        num_steps = self.options.num_steps
        plan, supervision = plan_steps(batch, num_steps)
        if not supervision.mask.any():
            return zero_output(draft, num_steps, metric_names(num_steps))
        readouts = draft(batch.features["last"], step_embeddings(batch.input_ids, tables.embed_tokens), plan)
        weights = step_weights(num_steps, self.options.step_decay)
        return steps_loss(tables, batch.input_ids, readouts, supervision, weights)

    def proposer(self, draft: DraftModel, tables: TargetTables) -> MtpProposer:
        assert isinstance(draft, MtpDraft)
        return MtpProposer(draft, tables)


def _start_from(draft: MtpDraft, source: TargetLayer) -> None:
    """Copy the target's layer and final norm into the draft."""
    layer = draft.mtp.layer
    own, given = layer.state_dict(), source.weights
    different = [name for name in {**own, **given} if name not in own or name not in given]
    different += [name for name in own if name in given and own[name].shape != given[name].shape]
    if different:
        name = different[0]
        shapes = [list(state[name].shape) if name in state else "nothing" for state in (own, given)]
        raise DraftError(
            f"the draft's layer and the target's last one differ: {name} is {shapes[0]} here and {shapes[1]} there; "
            "leave the sizes and qk_norm of the draft at the target's, or set init_from_target: false"
        )
    layer.load_state_dict(given)
    with torch.no_grad():
        draft.mtp.norm.weight.copy_(source.norm)
