"""Linear hop: the target's last hidden state hops from token to token through one matrix.

``h <- h + W [h; norm(E[token])]``, and the target's own head reads the next token out of every ``h``.

Legend: T packed tokens, R supervised rows, K hops, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.algorithms.base import (
    Algorithm,
    DraftModel,
    DraftRequest,
    Proposal,
    Proposer,
    Runs,
    StepContext,
    StepOutput,
    TargetTables,
    target_logits,
    zero_output,
)
from specforge.algorithms.draft_config import DraftConfig, SizeOptions
from specforge.algorithms.parts.alignment import supervised_rows
from specforge.algorithms.parts.losses import HardLabels, fused_loss, target_head
from specforge.algorithms.parts.sampling import distribution, draw
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge_linear_hop.config import LinearHopDraftConfig, LinearHopOptions


class LinearHopDraft(DraftModel):
    def __init__(self, config: LinearHopDraftConfig) -> None:
        super().__init__()
        self.hop = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """[R, H] and the embeddings of the next tokens [R, H] -> the states that predict the tokens after them."""
        hidden = hidden.to(self.hop.weight.dtype)
        embedded = F.rms_norm(embedded.to(hidden), embedded.shape[-1:])
        return hidden + self.hop(torch.cat((hidden, embedded), dim=-1))


class LinearHopProposer(Proposer):
    def __init__(self, draft: LinearHopDraft, tables: TargetTables) -> None:
        self._draft, self._tables = draft, tables
        self.reset()

    def reset(self) -> None:
        self._last: Tensor | None = None

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        if len(features["last"]):
            self._last = features["last"][-1:]
        assert self._last is not None, "the first call brings the features of the prompt"
        hidden, token, chosen, rows = self._last, tokens[-1], [], []
        for _ in range(request.num_proposals):
            hidden = self._draft(hidden, self._tables.embed_tokens[token].unsqueeze(0))
            logits = target_logits(self._tables, hidden)[0]
            if request.sampling is None:
                token = int(logits.argmax())
            else:
                rows.append(distribution(logits, request.sampling))
                token = draw(rows[-1], request.sampling.generator)
            chosen.append(token)
        return Proposal(tuple(chosen), torch.stack(rows) if rows else None)


class LinearHop(Algorithm):
    """Loss of a step: the mean over rows that hop at least once of the sum of their hops' cross entropies."""

    name: ClassVar[str] = "linear-hop"
    config_type: ClassVar[type[DraftConfig]] = LinearHopDraftConfig

    def __init__(self, options: LinearHopOptions) -> None:
        self.options = options

    def draft_config(self, target: TargetInfo) -> LinearHopDraftConfig:
        return LinearHopDraftConfig(**SizeOptions().sizes(target), draft_vocab_size=target.vocab_size, aux_layers=())

    def capture_spec(self, config: LinearHopDraftConfig, dtype: str) -> CaptureSpec:
        return CaptureSpec(aux_layers=config.aux_layers, last_hidden=True, dtype=dtype)

    def build_draft(
        self, config: LinearHopDraftConfig, tables: TargetTables, seed: int, kept_ids: Tensor | None = None
    ) -> LinearHopDraft:
        del kept_ids  # the head is the target's own
        draft = LinearHopDraft(config)
        nn.init.normal_(draft.hop.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        return draft.to(tables.lm_head.device)

    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        del context  # nothing is drawn and nothing is scheduled
        return float(supervised_rows(batch, 1).sum())

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        del context
        assert isinstance(draft, LinearHopDraft)
        supervised = supervised_rows(batch, self.options.num_hops)
        rows = supervised.any(0).nonzero().squeeze(-1)
        if not rows.numel():
            return zero_output(draft, self.options.num_hops)
        mask, last_token = supervised[:, rows], batch.input_ids.numel() - 1
        hidden, losses, correct = batch.features["last"][rows], [], torch.zeros_like(mask)
        for hop in range(self.options.num_hops):
            tokens = batch.input_ids[(rows + 1 + hop).clamp(max=last_token)]
            hidden = draft(hidden, tables.embed_tokens[tokens])
            places = mask[hop].nonzero().squeeze(-1)
            labels = batch.input_ids[rows[places] + 2 + hop]
            objective = HardLabels(labels, torch.ones_like(labels, dtype=torch.float32))
            losses.append(fused_loss([target_head(tables, hidden[places])], objective))
            correct[hop, places] = objective.proposal == labels
        first = mask[0]
        return StepOutput(
            loss_sum=torch.stack(losses).sum(),
            correct=correct.sum(1),
            count=mask.sum(1),
            runs=Runs(anchors=rows[first] + 1, lengths=correct.cumprod(0).sum(0)[first]),
            metrics={},
        )

    def proposer(self, draft: DraftModel, tables: TargetTables) -> LinearHopProposer:
        assert isinstance(draft, LinearHopDraft)
        return LinearHopProposer(draft, tables)
