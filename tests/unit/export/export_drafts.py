"""Drafts of every algorithm at sizes for tests, and what is exported of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specforge.algorithms.base import DraftModel, TargetTables
from specforge.algorithms.catalog import options_of
from specforge.contracts.capture import TargetInfo
from specforge.export.draft import FORMATS, TrainedDraft, write_export

VOCAB = 40
TARGET = TargetInfo(
    path="/somewhere/on/this/machine/tiny-target",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    revision="abc123",
    num_layers=8,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=VOCAB,
    rms_norm_eps=1e-6,
    rope_theta=500_000.0,
    rope_scaling=None,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    eos_token_ids=(0,),
)
BLOCKS = {"block_size": 4, "num_layers": 2, "num_anchors": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "eagle3": {"aux_layers": (1, 3, 4)},
    "peagle": {"num_layers": 2, "aux_layers": (1, 3, 4)},
    "dflash": BLOCKS,
    "domino": BLOCKS | {"emb_dim": 6, "gru_hidden_dim": 5},
    "dspark": BLOCKS | {"markov_rank": 6},
    "mtp": {"init_from_target": False},
    "medusa": {"num_heads": 2},
}


def tables() -> TargetTables:
    embedding = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(5))
    return TargetTables(embedding, embedding)


def trained(algorithm: str, target: TargetInfo = TARGET, seed: int = 3, **options: Any) -> TrainedDraft:
    """A draft with random weights, its norms included."""
    record = options_of({"name": algorithm, **OPTIONS[algorithm], **options})
    fresh = TrainedDraft(record.model_dump(mode="json"), None, {}, "float32", target.revision)  # type: ignore[arg-type]
    config = fresh.algorithm().draft_config(target)
    pruned = config.draft_vocab_size != config.vocab_size
    kept = torch.arange(config.draft_vocab_size) * 3 + 2 if pruned else None
    draft = fresh.algorithm().build_draft(config, tables(), seed, kept)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return replace(fresh, config=config, state=draft.served_state())


def draft_of(record: TrainedDraft) -> DraftModel:
    return record.build(tables())


def exported(
    record: TrainedDraft, out: Path, to: str = "sglang", dtype: str | None = None, target: TargetInfo = TARGET
) -> dict[str, Any]:
    """Export ``record`` to ``out``; its ``config.json``."""
    write_export(record, target, FORMATS[to], out, dtype)
    return dict(json.loads((out / "config.json").read_text()))
