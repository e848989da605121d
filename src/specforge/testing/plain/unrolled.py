"""Plain EAGLE-3, P-EAGLE and MTP: drafts with a row for every token.

Legend: T packed tokens, E elements of P-EAGLE, K steps, H hidden size, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import target_logits
from specforge.algorithms.peagle.algorithm import PEagle
from specforge.algorithms.peagle.features import draw_depths
from specforge.testing.plain.base import PlainInputs, PlainPath
from specforge.testing.plain.layers import (
    ahead,
    attend,
    causal_mask,
    decoder_layer,
    finish,
    labelled,
    queries_keys_values,
    rms_norm,
    tokens_ahead,
)


def _fused(inputs: PlainInputs, aux: Tensor) -> Tensor:
    """Hidden states of the captured features [T, num_aux * Ht]: the optional norms, then ``fc``."""
    weights, config = inputs.weights, inputs.config
    if "fc_norm.0.weight" in weights:
        blocks = aux.split(config.target_hidden_size, dim=-1)
        normed = [rms_norm(b, weights[f"fc_norm.{i}.weight"], config.rms_norm_eps) for i, b in enumerate(blocks)]
        aux = torch.cat(normed, dim=-1)
    if "input_norm.weight" in weights:
        aux = rms_norm(aux, weights["input_norm.weight"], config.rms_norm_eps)
    return F.linear(aux, weights["fc.weight"])


def eagle3_backbone(inputs: PlainInputs) -> list[Tensor]:
    """What the head reads after each step, K of [T, H]: all rows, over a cache that grows by T rows a step."""
    weights, config, batch = inputs.weights, inputs.config, inputs.batch
    eps, causal = config.rms_norm_eps, causal_mask(inputs.batch)
    diagonal = torch.eye(len(causal), dtype=torch.bool, device=causal.device)
    hidden = _fused(inputs, batch.features["aux"])
    keys: list[Tensor] = []
    values: list[Tensor] = []
    readouts = []
    for step in range(inputs.options.ttt_steps):
        embedded = inputs.tables.embed_tokens[tokens_ahead(batch, 1 + step)]
        token = rms_norm(embedded, weights["midlayer.input_layernorm.weight"], eps)
        normed = rms_norm(hidden, weights["midlayer.hidden_norm.weight"], eps)
        both = torch.cat((token, normed), dim=-1)
        q, k, v = queries_keys_values(weights, "midlayer.self_attn", both, batch.position_ids + step, config)
        keys.append(k)
        values.append(v)
        attended = attend(q, torch.cat(keys), torch.cat(values), torch.cat([causal] + [diagonal] * step, dim=1))
        residual = normed if config.norm_before_residual else hidden
        hidden = finish(weights, "midlayer", residual, attended, eps)
        readouts.append(rms_norm(hidden, weights["norm.weight"], eps))
        if config.norm_output:
            hidden = readouts[-1]
    return readouts


def eagle3_loss(inputs: PlainInputs, readouts: list[Tensor]) -> Tensor:
    """Soft cross entropy on whole logits [T, W] a step, against a teacher over all of [T, V]."""
    batch, weights, options = inputs.batch, inputs.weights, inputs.options
    with torch.no_grad():
        logits = target_logits(inputs.tables, batch.features["last"])
        known = weights["t2d"][logits.argmax(-1)]
        teacher = torch.softmax(logits[:, weights["t2d"]], dim=-1)
        teacher = F.pad(teacher, (0, 0, 0, len(readouts) + 1))
        del logits
    losses = []
    for step, readout in enumerate(readouts):
        index, inside = ahead(batch, 1 + step)
        _, supervised = labelled(batch, options.mask_offset + step)
        rows = supervised & inside & known[index]
        entropy = F.cross_entropy(
            F.linear(readout, weights["lm_head.weight"]).float(),
            teacher[1 + step : 1 + step + len(rows)],
            reduction="none",
        )
        losses.append(options.step_decay**step * (entropy * rows).sum())
    return torch.stack(losses).sum()


def mtp_backbone(inputs: PlainInputs) -> list[Tensor]:
    """What the head reads after each step, K of [T, H]."""
    weights, config, batch = inputs.weights, inputs.config, inputs.batch
    eps, mask = config.rms_norm_eps, causal_mask(inputs.batch)
    hidden, readouts = batch.features["last"], []
    for step in range(inputs.options.num_steps):
        embedded = inputs.tables.embed_tokens[tokens_ahead(batch, 1 + step)]
        token = rms_norm(embedded, weights["mtp.pre_fc_norm_embedding.weight"], eps)
        normed = rms_norm(hidden, weights["mtp.pre_fc_norm_hidden.weight"], eps)
        rows = F.linear(torch.cat((token, normed), dim=-1), weights["mtp.fc.weight"])
        rows = decoder_layer(weights, "mtp.layers.0", rows, batch.position_ids, mask, config)
        hidden = rms_norm(rows, weights["mtp.norm.weight"], eps)
        readouts.append(hidden)
    return readouts


def mtp_loss(inputs: PlainInputs, readouts: list[Tensor]) -> Tensor:
    """Hard cross entropy on whole logits [T, V] a step."""
    decay = [inputs.options.step_decay**step for step in range(len(readouts))]
    losses = []
    for step, readout in enumerate(readouts):
        labels, supervised = labelled(inputs.batch, 2 + step)
        entropy = F.cross_entropy(target_logits(inputs.tables, readout), labels, reduction="none")
        losses.append(decay[step] / sum(decay) * (entropy * supervised).sum())
    return torch.stack(losses).sum()


def peagle_elements(inputs: PlainInputs) -> tuple[Tensor, Tensor]:
    """(anchor, depth) of every element, int64 [E], depth-major: all tokens, then the product's keyed draw."""
    algorithm, batch = inputs.algorithm, inputs.batch
    assert isinstance(algorithm, PEagle)
    _, valid = labelled(batch, algorithm.options.mask_offset)
    everything = torch.arange(len(valid), device=valid.device)
    drawn = draw_depths(batch, valid & ahead(batch, 1)[1], algorithm.shares, inputs.context)
    anchors = [everything, *drawn]
    depths = [torch.full_like(found, depth) for depth, found in enumerate(anchors)]
    return torch.cat(anchors), torch.cat(depths)


def element_mask(documents: Tensor, anchors: Tensor, depths: Tensor) -> Tensor:
    """bool [E, E]: depth 0 up to the own anchor, and the own anchor's depths up to the own."""
    same = documents[anchors][:, None] == documents[anchors]
    context = (depths == 0) & (anchors <= anchors[:, None])
    chain = (anchors == anchors[:, None]) & (depths <= depths[:, None])
    return same & (context | chain)


def peagle_backbone(inputs: PlainInputs) -> list[Tensor]:
    """What the head reads of every element, one [E, H]."""
    weights, config, batch = inputs.weights, inputs.config, inputs.batch
    eps, (anchors, depths) = config.rms_norm_eps, peagle_elements(inputs)
    true, mask = depths == 0, element_mask(batch.document_ids, anchors, depths)
    ids = torch.where(true, tokens_ahead(batch, 1)[anchors], config.mask_token_id)
    token = F.embedding(ids, weights["embed_tokens.weight"])
    features = torch.where(true[:, None], batch.features["aux"][anchors], weights["mask_hidden"].flatten())
    hidden, positions = F.linear(features, weights["fc.weight"]), batch.position_ids[anchors] + depths
    normed = rms_norm(hidden, weights["layers.0.hidden_norm.weight"], eps)
    both = torch.cat((rms_norm(token, weights["layers.0.input_layernorm.weight"], eps), normed), dim=-1)
    heads = queries_keys_values(weights, "layers.0.self_attn", both, positions, config)
    hidden = finish(weights, "layers.0", hidden, attend(*heads, mask), eps)
    for layer in range(1, config.num_layers):
        hidden = decoder_layer(weights, f"layers.{layer}", hidden, positions, mask, config)
    return [rms_norm(hidden, weights["norm.weight"], eps)]


def peagle_loss(inputs: PlainInputs, readouts: list[Tensor]) -> Tensor:
    """Soft cross entropy on whole logits [E, W], against a teacher over all of [T, V]."""
    batch, weights = inputs.batch, inputs.weights
    anchors, depths = peagle_elements(inputs)
    _, supervised = labelled(batch, inputs.options.mask_offset)
    positions = anchors + depths
    index, inside = ahead(batch, 1)
    rows = torch.where(depths == 0, (supervised & inside)[positions], True)
    with torch.no_grad():
        logits = target_logits(inputs.tables, batch.features["last"])
        known = weights["t2d"][logits.argmax(-1)]
        teacher = torch.softmax(logits[:, weights["t2d"]], dim=-1)
        del logits
    logits = F.linear(readouts[0], weights["lm_head.weight"]).float()
    entropy = F.cross_entropy(logits, teacher[index[positions]], reduction="none")
    return (entropy * rows * known[index[positions]]).sum()


EAGLE3 = PlainPath(eagle3_backbone, eagle3_loss)
PEAGLE = PlainPath(peagle_backbone, peagle_loss)
MTP = PlainPath(mtp_backbone, mtp_loss)
