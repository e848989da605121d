"""What the demo trains: sizes that are the same for every algorithm, and what each algorithm's draft is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class DemoRecipe:
    """The demo's fixed sizes. Counts, never the clock, decide what is trained.

    ``eval_new_tokens`` and ``num_proposals`` are of the evaluation.
    """

    num_responses: int = 2560
    prompt_tokens: int = 48
    response_tokens: int = 64
    generation_batch_size: int = 64
    num_epochs: int = 1
    global_batch_size: int = 8
    micro_batch_tokens: int = 1024
    warmup_ratio: float = 0.015
    max_grad_norm: float = 0.5
    checkpoint_every: int = 32
    num_eval_prompts: int = 32
    num_untrained_eval_prompts: int = 8
    eval_new_tokens: int = 64
    num_proposals: int = 5


@dataclass(frozen=True, slots=True)
class DraftRecipe:
    """Options of one algorithm and how fast it learns; every other option is the default."""

    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = 1e-2


_BLOCKS = {"block_size": 8, "num_layers": 2, "num_anchors": 32}
"""Blocks of the size that the responses have room for, and a draft about as large as EAGLE-3's."""

DRAFTS: dict[str, DraftRecipe] = {
    # the norms of EAGLE-3.1: the small draft learns faster with them (decision record 4)
    "eagle3": DraftRecipe({"fc_norm": True, "norm_output": True}),
    "peagle": DraftRecipe({"num_layers": 2, "num_depths": 5}),
    "dflash": DraftRecipe(_BLOCKS),
    "domino": DraftRecipe(_BLOCKS | {"emb_dim": 64, "gru_hidden_dim": 128}),
    "dspark": DraftRecipe(_BLOCKS | {"markov_rank": 64}),
    "mtp": DraftRecipe({"num_steps": 5}),
    "medusa": DraftRecipe(),
}
