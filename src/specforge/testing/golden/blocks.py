"""What the golden vectors of all block drafts share: inputs and recorded blocks as the product's records.

Legend: B samples, S padded length, T packed tokens, A anchor slots of a sample, N blocks that are kept, b slots of a
block, R = N * b slots, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import TargetTables
from specforge.algorithms.parts.block_attention import block_layout
from specforge.algorithms.parts.block_backbone import BlockBackbone
from specforge.algorithms.parts.block_config import FULL, SLIDING
from specforge.algorithms.parts.blocks import Blocks, slot_embeddings
from specforge.contracts.batches import TrainBatch
from specforge.contracts.refs import Slot
from specforge.testing.block_reference import block_mask
from specforge.testing.golden.report import Comparison, Kind
from specforge.testing.golden.vectors import Vector


@dataclass(frozen=True, slots=True)
class BlockCase:
    """A vector's inputs. ``keep`` bool [B * A] says which recorded anchor slots are blocks of ``blocks``, in order.

    Features of ``batch``: ``aux``, and ``last`` (after the final norm) where the vector has it.
    """

    tables: TargetTables
    batch: TrainBatch[Tensor]
    blocks: Blocks
    keep: Tensor

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.batch.lengths)

    def kept(self, recorded: Tensor) -> Tensor:
        """[N, b, ..] of what is recorded for all anchor slots: [B, A, b, ..] or [B, A*b, ..]."""
        return _by_anchor(recorded, self.keep.numel(), self.blocks.block_size)[self.keep]

    def states(self, draft: BlockBackbone) -> Tensor:
        """The draft's normed states, [N, b, H]."""
        tokens = self.batch.input_ids[self.blocks.anchors]
        size, mask = self.blocks.block_size, draft.config.mask_token_id
        slots = slot_embeddings(self.tables.embed_tokens, tokens, size, mask)
        states = draft(slots, self.batch.features["aux"], block_layout(self.blocks, self.batch))
        grouped: Tensor = states.unflatten(0, (-1, size))
        return grouped


def padded_case(vector: Vector, block_size: int) -> BlockCase:
    """SpecForge's and DeepSpec's inputs: padded samples [B, S], each a document of S tokens, and recorded anchors."""
    inputs = vector.group("in")
    size, length = inputs["input_ids"].shape
    features = {"aux": inputs["hidden_states"].flatten(0, 1)}
    if "target_last_hidden" in inputs:
        features["last"] = inputs["target_last_hidden"].flatten(0, 1)
    batch = _batch(inputs, features, (length,) * size)
    keep = vector.tensors["mid.keep"].flatten() != 0
    anchors = (vector.tensors["mid.anchors"] + length * torch.arange(size)[:, None]).flatten()[keep]
    return BlockCase(_tables(inputs), batch, Blocks.at(anchors, batch, block_size), keep)


def packed_case(vector: Vector, block_size: int) -> BlockCase:
    """speculators' inputs: one packed row whose documents are runs of ``document_ids``; padding is one more document.

    Its ``in.verifier_last_hidden`` is before the final norm, whose weight is 1 unless the vector has one.
    """
    inputs = vector.group("in")
    _, lengths = torch.unique_consecutive(inputs["document_ids"].flatten(), return_counts=True)
    features = {"aux": inputs["hidden_states"][0]}
    if "verifier_last_hidden" in inputs:
        weight = vector.tensors.get("w.verifier_norm.weight")
        last = inputs["verifier_last_hidden"][0]
        features["last"] = F.rms_norm(last, last.shape[-1:], weight, vector.facts["config"]["rms_eps"])
    batch = _batch(inputs, features, tuple(lengths.tolist()))
    keep = inputs["anchor_valid"] != 0
    return BlockCase(_tables(inputs), batch, Blocks.at(inputs["anchors"][keep], batch, block_size), keep)


def block_fields(facts: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ``BlockDraftConfig`` from a vector's json (``config``, and attention beside it)."""
    config = facts["config"]
    layer_types = facts.get("layer_types") or [FULL] * config["layers"]
    aux_layers = tuple(config.get("target_layer_ids") or facts["target_layer_ids"])
    return {
        "hidden_size": config["hidden_size"],
        "target_hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config["kv_heads"],
        "head_dim": config["head_dim"],
        "rms_norm_eps": config["rms_eps"],
        "rope_theta": config["rope_theta"],
        "rope_scaling": None,
        "max_position_embeddings": 2048,
        "vocab_size": config["vocab"],
        "draft_vocab_size": config["vocab"],
        "aux_layers": aux_layers,
        "target_num_layers": max(aux_layers) + 3,
        "num_layers": config["layers"],
        "block_size": config.get("block_size") or facts["block_size"],
        "mask_token_id": config["mask_token_id"] if "mask_token_id" in config else facts["mask_token_id"],
        "layer_types": tuple(layer_types),
        "sliding_window": facts.get("sliding_window") if SLIDING in layer_types else None,
    }


def check_backbone(vector: Vector, result: Comparison, case: BlockCase, draft: BlockBackbone) -> None:
    """What the vector records on the way: embeddings, positions, masks and states of the kept blocks."""
    tensors, size = vector.tensors, case.blocks.block_size
    layout = block_layout(case.blocks, case.batch)
    if "mid.position_ids" in tensors:
        positions = tensors["mid.position_ids"][:, case.batch.lengths[0] :]
        result.check(Kind.METRICS, "mid.position_ids", layout.slot_positions, case.kept(positions).flatten())
    if "mid.noise_embedding" in tensors:
        tokens = case.batch.input_ids[case.blocks.anchors]
        slots = slot_embeddings(case.tables.embed_tokens, tokens, size, draft.config.mask_token_id)
        expected = case.kept(tensors["mid.noise_embedding"]).flatten(0, 1)
        result.check(Kind.LOGITS, "mid.noise_embedding", slots, expected)
    if "mid.draft_hidden" in tensors:
        with torch.no_grad():
            result.check(Kind.LOGITS, "mid.draft_hidden", case.states(draft), case.kept(tensors["mid.draft_hidden"]))
    windows = {"mid.mask": None, "mid.mask_full": None, "mid.mask_sliding": draft.config.sliding_window}
    for name, window in windows.items():
        if name in tensors:
            mine = block_mask(case.blocks, case.batch.input_ids.numel(), window)
            result.check(Kind.METRICS, name, mine.long(), _kept_mask(case, tensors[name][:, 0]).long())


def check_loss(vector: Vector, result: Comparison, loss: Tensor) -> None:
    result.check(Kind.LOSSES, "loss", loss, vector.facts["loss"])
    if "out.loss" in vector.tensors:
        result.check(Kind.LOSSES, "out.loss", loss, vector.tensors["out.loss"])


def recorded_mask(vector: Vector, case: BlockCase) -> Tensor:
    """``mid.loss_mask`` of speculators' vectors, bool [N, b]."""
    return case.kept(vector.tensors["mid.loss_mask"]) != 0


def _kept_mask(case: BlockCase, recorded: Tensor) -> Tensor:
    """bool [R, T + R] of masks [B, A*b, S + A*b]: samples on the diagonal, rows and columns of kept blocks."""
    length, num_slots = case.batch.lengths[0], recorded.shape[1]
    context = torch.block_diag(*recorded[:, :, :length].float())
    own = torch.block_diag(*recorded[:, :, length:].float())
    keep = case.keep.repeat_interleave(num_slots * len(recorded) // case.keep.numel())
    return torch.cat((context[keep], own[keep][:, keep]), dim=1) != 0


def _by_anchor(recorded: Tensor, num_anchors: int, block_size: int) -> Tensor:
    """[B*A, b, ..] of [B, A, b, ..], [B, A*b, ..] or (one packed row) [1, A*b, ..]."""
    leading = 2 if recorded.shape[0] * recorded.shape[1] == num_anchors * block_size else 3
    return recorded.reshape(num_anchors, block_size, *recorded.shape[leading:])


def _tables(inputs: dict[str, Tensor]) -> TargetTables:
    return TargetTables(inputs["target_embed.weight"], inputs["target_lm_head.weight"])


def _batch(inputs: dict[str, Tensor], features: dict[str, Tensor], lengths: tuple[int, ...]) -> TrainBatch[Tensor]:
    return TrainBatch(
        input_ids=inputs["input_ids"].flatten(),
        loss_mask=inputs["loss_mask"].flatten() != 0,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        document_ids=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        features=features,
        lengths=lengths,
        sample_ids=tuple(str(i) for i in range(len(lengths))),
        slots=tuple(Slot(0, i) for i in range(len(lengths))),
    )


def all_logits(case: BlockCase, states: Tensor) -> Tensor:
    """Logits of the target's head, [.., V], of ``states`` [.., H]."""
    return F.linear(states, case.tables.lm_head)
