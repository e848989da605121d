"""Plain DFlash, Domino and DSpark: one dense mask over all context columns and all slots, whole logits of all slots.

Legend: T packed tokens, N blocks, b slots of a block, R = N * b slots, H hidden size, V vocabulary, r rank of the bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import target_logits
from specforge.algorithms.parts.blocks import Blocks, sample_blocks
from specforge.testing.plain.base import PlainInputs, PlainPath
from specforge.testing.plain.layers import attend, finish, queries_keys_values, rms_norm


class Slots(NamedTuple):
    """Of every slot [N, b]: the index of token ``a + k + shift`` (clamped to the document) and whether it has one."""

    tokens: Tensor
    inside: Tensor


def drawn_blocks(inputs: PlainInputs) -> Blocks:
    return sample_blocks(inputs.batch, inputs.context, inputs.config.block_size, inputs.options.num_anchors)


def slots_of(blocks: Blocks, shift: int) -> Slots:
    tokens = blocks.anchors[:, None] + torch.arange(blocks.block_size, device=blocks.anchors.device) + shift
    return Slots(tokens.clamp(max=blocks.ends[:, None] - 1), tokens < blocks.ends[:, None])


def block_mask(blocks: Blocks, num_tokens: int, window: int | None) -> Tensor:
    """bool [R, T + R]: context of the block's document before its anchor, then the block itself."""
    size, device = blocks.block_size, blocks.anchors.device
    anchors, starts = blocks.anchors.repeat_interleave(size)[:, None], blocks.starts.repeat_interleave(size)[:, None]
    slot = torch.arange(size, device=device).repeat(blocks.num_blocks)
    block = torch.arange(blocks.num_blocks, device=device).repeat_interleave(size)
    columns = torch.arange(num_tokens, device=device)
    context = (columns >= starts) & (columns < anchors)
    own = block[:, None] == block
    if window is not None:
        context &= columns >= anchors + slot[:, None] - (window - 1)
        own &= slot[None, :] <= slot[:, None]
    return torch.cat((context, own), dim=1)


def block_backbone(inputs: PlainInputs) -> list[Tensor]:
    """Normed states of the slots, one [R, H]."""
    weights, config, batch = inputs.weights, inputs.config, inputs.batch
    eps, blocks = config.rms_norm_eps, drawn_blocks(inputs)
    context = rms_norm(F.linear(batch.features["aux"], weights["fc.weight"]), weights["hidden_norm.weight"], eps)
    ids = torch.full((blocks.num_blocks, blocks.block_size), config.mask_token_id, device=batch.input_ids.device)
    ids[:, 0] = batch.input_ids[blocks.anchors]
    rows = inputs.tables.embed_tokens[ids.flatten()]
    offsets = torch.arange(blocks.block_size, device=ids.device)
    positions = (batch.position_ids[blocks.anchors][:, None] + offsets).flatten()
    joint_positions = torch.cat((batch.position_ids, positions))
    masks = {window: block_mask(blocks, len(context), window) for window in set(config.windows())}
    for index, window in enumerate(config.windows()):
        layer = f"layers.{index}"
        normed = rms_norm(rows, weights[f"{layer}.input_layernorm.weight"], eps)
        joint = torch.cat((context, normed))
        q, k, v = queries_keys_values(weights, f"{layer}.self_attn", joint, joint_positions, config)
        rows = finish(weights, layer, rows, attend(q[len(context) :], k, v, masks[window]), eps)
    return [rms_norm(rows, weights["norm.weight"], eps)]


def supervised(inputs: PlainInputs, slots: Slots) -> Tensor:
    """bool [N, b]."""
    return slots.inside & inputs.batch.loss_mask[slots.tokens]


def slot_entropy(inputs: PlainInputs, logits: Tensor, slots: Slots) -> Tensor:
    """Cross entropy [N, b] of whole logits [R, V]."""
    labels = inputs.batch.input_ids[slots.tokens]
    return F.cross_entropy(logits.float(), labels.flatten(), reduction="none").view_as(labels)


def slot_decay(inputs: PlainInputs, num_slots: int, device: torch.device) -> Tensor:
    return torch.tensor(inputs.options.slot_weights(num_slots), device=device)


def dflash_loss(inputs: PlainInputs, states: list[Tensor]) -> Tensor:
    """Slot k predicts the token at its own place, k from 1; D-PACE weighs by the block's own confidence."""
    options = inputs.options
    slots = slots_of(drawn_blocks(inputs), 0)
    entropy = slot_entropy(inputs, target_logits(inputs.tables, states[0]), slots)[:, 1:]
    valid = supervised(inputs, slots)[:, 1:]
    if options.loss_type == "dflash":
        return (entropy * valid * slot_decay(inputs, valid.shape[1], entropy.device)).sum()
    with torch.no_grad():
        smoothed = (1 - options.dpace_alpha) * torch.exp(-entropy) + options.dpace_alpha
        confidence = torch.where(valid, smoothed, 1.0).cumprod(1)
        value = (confidence * valid).flip(1).cumsum(1).flip(1)
        weights = {
            "dpace": value,
            "dpace-cumulative-confidence-only": confidence,
            "dpace-continuation-value-only": value / confidence,
        }[options.loss_type]
    return (entropy * valid * weights).sum()


def domino_loss(inputs: PlainInputs, states: list[Tensor]) -> Tensor:
    """The base's cross entropy and that of the base plus the GRU's correction."""
    weights, config, batch, context = inputs.weights, inputs.config, inputs.batch, inputs.context
    blocks, first = drawn_blocks(inputs), 0 if config.shift_label else 1
    slots = slots_of(blocks, 1 - first)
    gru = inputs.draft.get_submodule("prefix_gru")
    embedded = inputs.tables.embed_tokens[batch.input_ids[slots_of(blocks, 0).tokens]]
    state = F.pad(gru(embedded[:, : blocks.block_size - first])[0], (0, 0, first, 0)).flatten(0, 1)
    narrow = F.silu(F.linear(torch.cat((states[0], state), dim=-1), weights["embed_proj.0.weight"]))
    corrected = torch.arange(blocks.block_size, device=state.device) >= config.pure_draft_prefix_len + first
    narrow = narrow * corrected.repeat(blocks.num_blocks)[:, None]
    base = target_logits(inputs.tables, states[0])
    final = base + F.linear(narrow, weights["embed_proj.2.weight"])
    decay = F.pad(slot_decay(inputs, blocks.block_size - first, base.device), (first, 0))
    slot_weights = supervised(inputs, slots) * decay
    horizon = max(1, int(context.total_steps * inputs.options.lambda_decay_ratio))
    share = inputs.options.lambda_start * (1.0 - min(context.global_step / horizon, 1.0))
    share = min(max(share, 0.0), 1.0) if context.total_steps > 0 else 0.0
    entropy = (1 - share) * slot_entropy(inputs, final, slots) + share * slot_entropy(inputs, base, slots)
    return (entropy * slot_weights).sum()


def dspark_loss(inputs: PlainInputs, states: list[Tensor]) -> Tensor:
    """Cross entropy against the text, L1 to the teacher, and the confidence's own loss."""
    weights, options, batch = inputs.weights, inputs.options, inputs.batch
    blocks = drawn_blocks(inputs)
    previous, slots = slots_of(blocks, 0).tokens, slots_of(blocks, 1)
    embedded = weights["markov_head.markov_w1.weight"][batch.input_ids[previous]].flatten(0, 1)
    logits = target_logits(inputs.tables, states[0]) + F.linear(embedded, weights["markov_head.markov_w2.weight"])
    entropy = slot_entropy(inputs, logits, slots)
    with torch.no_grad():
        teacher = torch.softmax(target_logits(inputs.tables, batch.features["last"]), dim=-1)
    distance = (torch.softmax(logits.float(), dim=-1) - teacher[previous.flatten()]).abs().sum(-1).view_as(entropy)
    accepted = (1.0 - distance.detach() / 2).clamp(0.0, 1.0)
    read = torch.cat((states[0], embedded), dim=-1)
    confidence = F.linear(read, weights["confidence_head.proj.weight"], weights["confidence_head.proj.bias"])
    doubt = F.binary_cross_entropy_with_logits(confidence.view_as(entropy), accepted, reduction="none")
    running = supervised(inputs, slots).cumprod(1) * slot_decay(inputs, blocks.block_size, entropy.device)
    loss: Tensor = options.ce_weight * entropy + options.l1_weight * distance + options.confidence_weight * doubt
    return (loss * running).sum()


DFLASH = PlainPath(block_backbone, dflash_loss)
DOMINO = PlainPath(block_backbone, domino_loss)
DSPARK = PlainPath(block_backbone, dspark_loss)
"""With the published heads: a vanilla bias from the previous token and a confidence that reads it."""
