"""What our own decoder does on the prompts that an engine decoded, counted in the engine's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specforge.evaluation.speculative import NEAR_TIE_GAP, SpeculativeDecoder, first_mismatch
from specforge.inference.huggingface import HFTargetEngine

Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Rounds:
    """Rounds of drafting, and how many of them accepted at least ``i + 1`` proposals."""

    num_drafts: int
    accepted_per_position: tuple[int, ...]

    @property
    def accepted_length(self) -> float:
        return 1.0 + sum(self.accepted_per_position) / self.num_drafts


def our_rounds(decoder: SpeculativeDecoder, prompts: Tokens, max_new_tokens: int, num_proposals: int) -> Rounds:
    """Rounds as vLLM counts them.

    vLLM proposes and verifies ``num_proposals`` tokens in every round, also where only some of them still fit, and
    counts what was accepted before it cuts the output. So we decode past the end by the length of a round and count
    every round that begins before it.
    """
    accepted = []
    with torch.inference_mode():
        for prompt in prompts:
            decoded = decoder.speculative(prompt, max_new_tokens + num_proposals + 1)
            end = len(prompt) + max_new_tokens
            accepted += [len(a_round.accepted) for a_round in decoded.rounds if a_round.start + 1 < end]
    per_position = tuple(sum(count > position for count in accepted) for position in range(num_proposals))
    return Rounds(len(accepted), per_position)


def near_ties(engine: HFTargetEngine, prompts: Tokens, plain: Tokens, speculative: Tokens) -> int:
    """The number of prompts whose outputs part at a near-tie; any other difference is an AssertionError."""
    found = 0
    for prompt, expected, got in zip(prompts, plain, speculative, strict=True):
        index = first_mismatch(expected, got)
        if index is None:
            continue
        assert index < min(len(expected), len(got)), f"outputs of {len(expected)} and {len(got)} tokens"
        logits = engine.reference_logits([*prompt, *expected[:index]])
        gaps = logits.max() - logits[[expected[index], got[index]]]
        assert bool((gaps < NEAR_TIE_GAP).all()), f"token {index} differs, the fp64 logits by {gaps.tolist()}"
        found += 1
    return found
