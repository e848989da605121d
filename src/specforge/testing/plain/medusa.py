"""Plain Medusa: every head over every row.

Legend: T packed tokens, K heads, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import target_logits
from specforge.testing.plain.base import PlainInputs, PlainPath
from specforge.testing.plain.layers import ahead, labelled


def medusa_backbone(inputs: PlainInputs) -> list[Tensor]:
    """What the output matrices read, K of [T, H]."""
    weights, found = inputs.weights, []
    for head in range(inputs.config.num_heads):
        state = inputs.batch.features["last"]
        for block in range(inputs.config.num_blocks):
            name = f"blocks.{head}.layers.{block}"
            state = state + F.silu(F.linear(state, weights[f"{name}.weight"], weights[f"{name}.bias"]))
        found.append(state)
    return found


def medusa_loss(inputs: PlainInputs, states: list[Tensor]) -> Tensor:
    """Cross entropy on whole logits [T, V] a head, against the text or the teacher's distribution."""
    batch, options, teacher = inputs.batch, inputs.options, None
    if options.loss == "soft":
        with torch.no_grad():
            teacher = torch.softmax(target_logits(inputs.tables, batch.features["last"]), dim=-1)
    losses = []
    for head, state in enumerate(states):
        shared = inputs.config.shared_head
        name = f"lm_heads.{head}.weight"
        logits = target_logits(inputs.tables, state) if shared else F.linear(state, inputs.weights[name]).float()
        labels, supervised = labelled(batch, 2 + head)
        expected = labels if teacher is None else teacher[ahead(batch, 1 + head)[0]]
        entropy = F.cross_entropy(logits, expected, reduction="none")
        losses.append(options.head_decay**head * (entropy * supervised).sum())
    return torch.stack(losses).sum()


MEDUSA = PlainPath(medusa_backbone, medusa_loss)
