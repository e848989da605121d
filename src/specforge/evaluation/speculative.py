"""SpeculativeDecoder: greedy speculative decoding in process, checked token by token against plain decoding.

The definitions of the figures are in docs/glossary.md.

Legend: n processed positions, l proposals of a round, r accepted ones, m positions of one forward, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge.algorithms.base import Proposer
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import DataError
from specforge.evaluation.report import DecodedPrompt, SpeculativeReport, summarise
from specforge.inference.engine import TargetSession

NEAR_TIE_GAP = 1e-5
"""A fp64 logit gap below this excuses a mismatch between plain and speculative output."""

WARM_UP_TOKENS = 4


class DecodingEngine(Protocol):
    """What the decoder asks of a target. ``HFTargetEngine`` implements it."""

    info: TargetInfo
    dtype: torch.dtype

    def session(self, spec: CaptureSpec) -> TargetSession:
        """A new session of one sequence."""
        ...

    def reference_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits [V] float64 of the token after ``token_ids``."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decoding. ``accepted`` has one entry a round that counts: proposals accepted by the target.

    ``seconds`` is decode time: from the end of the target's prefill, which gave the first of ``tokens``, to the end.
    """

    tokens: tuple[int, ...]
    seconds: float
    accepted: tuple[int, ...] = ()


class SpeculativeDecoder:
    """Decodes prompts greedily, one sequence at a time, with chains of ``num_proposals`` tokens.

    ``spec`` is what the proposer's algorithm captures. Ties go to the lowest id.
    """

    def __init__(self, engine: DecodingEngine, proposer: Proposer, spec: CaptureSpec, num_proposals: int) -> None:
        if num_proposals < 1:
            raise ValueError(f"num_proposals must be at least 1, got {num_proposals}")
        self._engine = engine
        self._proposer = proposer
        self._spec = spec
        self._num_proposals = num_proposals
        self._stops = frozenset(engine.info.eos_token_ids)

    def plain(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """Greedy decoding with a KV cache, one token a forward."""
        session = self._engine.session(self._plain_spec)
        logits, _ = session.forward(prompt)
        tokens = [_greedy(logits)[-1]]
        start = time.perf_counter()
        while len(tokens) < max_new_tokens and tokens[-1] not in self._stops:
            logits, _ = session.forward(tokens[-1:])
            tokens.append(_greedy(logits)[-1])
        return Decoded(tuple(tokens), time.perf_counter() - start)

    def speculative(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """Greedy speculative decoding. A stop token ends the output, also in the middle of an accepted run.

        A round that starts with room for fewer than ``num_proposals + 1`` tokens proposes fewer and does not count.
        The draft's own prefill is part of its decode time.
        """
        session = self._engine.session(self._spec)
        self._proposer.reset()
        logits, features = session.forward(prompt)
        committed = [*prompt, _greedy(logits)[-1]]
        end = len(prompt) + max_new_tokens
        accepted: list[int] = []
        start = time.perf_counter()
        while len(committed) < end and committed[-1] not in self._stops:
            room = end - len(committed)
            limit = min(self._num_proposals, room - 1)
            proposals = self._proposer.propose(committed, features, limit).tokens[:limit] if limit else ()
            logits, features = session.forward([committed[-1], *proposals])
            greedy = _greedy(logits)
            num_accepted = count_accepted(proposals, greedy)
            new = [*proposals[:num_accepted], greedy[num_accepted]]
            session.crop(len(committed) + num_accepted)
            features = {name: rows[: num_accepted + 1] for name, rows in features.items()}
            committed += _until_stop(new, self._stops)
            if room > self._num_proposals:
                accepted.append(num_accepted)
        return Decoded(tuple(committed[len(prompt) :]), time.perf_counter() - start, tuple(accepted))

    def evaluate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        on_prompt: Callable[[int], None] = lambda _done: None,
    ) -> SpeculativeReport:
        """Decode every prompt both ways and compare.

        The two ways take turns, and in turn go first, so that a drift of the machine hits both. ``on_prompt`` gets the
        number of prompts done. Raises :class:`DataError` without prompts.
        """
        if not prompts or max_new_tokens < 1:
            raise DataError("speculative decoding needs at least one prompt and one new token; check the prompt file")
        for warm_up in (self.plain, self.speculative):
            warm_up(prompts[0], min(WARM_UP_TOKENS, max_new_tokens))
        rows: list[DecodedPrompt] = []
        for index, prompt in enumerate(prompts):
            if index % 2:
                speculative = self.speculative(prompt, max_new_tokens)
                plain = self.plain(prompt, max_new_tokens)
            else:
                plain = self.plain(prompt, max_new_tokens)
                speculative = self.speculative(prompt, max_new_tokens)
            rows.append(self._compare(prompt, plain, speculative))
            on_prompt(index + 1)
        return summarise(rows, self._num_proposals, judged=self._engine.dtype == torch.float32)

    @property
    def _plain_spec(self) -> CaptureSpec:
        """Plain decoding captures nothing."""
        return CaptureSpec((), False, self._spec.dtype)

    def _compare(self, prompt: Sequence[int], plain: Decoded, speculative: Decoded) -> DecodedPrompt:
        mismatch = first_mismatch(plain.tokens, speculative.tokens)
        near_tie = mismatch is not None and self._is_near_tie(prompt, plain.tokens, speculative.tokens, mismatch)
        return DecodedPrompt(
            prompt_tokens=len(prompt),
            plain_tokens=plain.tokens,
            speculative_tokens=speculative.tokens,
            plain_seconds=plain.seconds,
            speculative_seconds=speculative.seconds,
            accepted=speculative.accepted,
            mismatch=mismatch,
            near_tie=near_tie,
        )

    def _is_near_tie(
        self, prompt: Sequence[int], plain: tuple[int, ...], speculative: tuple[int, ...], mismatch: int
    ) -> bool:
        """Whether both tokens at the mismatch are within ``NEAR_TIE_GAP`` of the largest fp64 logit.

        An output that ends early is never excused; nor are formats other than fp32, which are not judged at all.
        """
        if self._engine.dtype != torch.float32 or mismatch >= min(len(plain), len(speculative)):
            return False
        logits = self._engine.reference_logits([*prompt, *plain[:mismatch]])
        gaps = logits.max() - logits[[plain[mismatch], speculative[mismatch]]]
        return bool((gaps < NEAR_TIE_GAP).all())


def count_accepted(proposals: Sequence[int], greedy: Sequence[int]) -> int:
    """Leading proposals that equal the target's greedy choice at the preceding position."""
    for index, proposal in enumerate(proposals):
        if proposal != greedy[index]:
            return index
    return len(proposals)


def first_mismatch(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first difference, the shorter length where one continues the other, ``None`` when equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _greedy(logits: Tensor) -> list[int]:
    """The lowest id among the largest logits [m, V], for each row."""
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def _until_stop(tokens: list[int], stops: frozenset[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[: index + 1]
    return tokens
