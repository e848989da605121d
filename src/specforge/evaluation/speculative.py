"""SpeculativeDecoder: speculative decoding in process, greedy (checked token by token) or sampled, chains or trees.

The target decodes a batch in one forward; each sequence of it has a proposer of its own, and those work one after the
other. A batch is decoded to its end: a sequence that is done leaves it, and no other takes its place.

The definitions of the figures are in docs/glossary.md.

Legend: n sequences of a batch, R tokens of one forward, V vocabulary.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer, Sampling, TreeShape
from specforge.algorithms.parts.sampling import distribution, draw
from specforge.contracts.capture import CaptureSpec
from specforge.errors import DataError
from specforge.evaluation.lanes import Decoded, DecodingEngine, Lane, Round, open_session
from specforge.evaluation.report import DecodedPrompt, SpeculativeReport, summarise
from specforge.evaluation.verification import Verdict, verify_greedy, verify_sampled
from specforge.inference.engine import BatchSession

__all__ = ["Decoded", "DecodingEngine", "Round", "SpeculativeDecoder", "first_mismatch"]

NEAR_TIE_GAP = 1e-5
"""A fp64 logit gap below this excuses a mismatch between plain and speculative output."""

WARM_UP_TOKENS = 4

Prompts = Sequence[Sequence[int]]
Step = Callable[[BatchSession, list[Lane]], None]


class SpeculativeDecoder:
    """Decodes prompts in rounds of a chain of ``num_proposals`` tokens or of a ``tree``.

    ``proposers``: one for every sequence of a batch, of which there are so many; a single one decodes one prompt at a
    time. ``spec`` is what the proposer's algorithm captures. Greedy without ``sampling``; ties go to the lowest id.
    """

    def __init__(
        self,
        engine: DecodingEngine,
        proposers: Proposer | Sequence[Proposer],
        spec: CaptureSpec,
        num_proposals: int,
        *,
        sampling: Sampling | None = None,
        tree: TreeShape | None = None,
    ) -> None:
        self._proposers = (proposers,) if isinstance(proposers, Proposer) else tuple(proposers)
        if not self._proposers:
            raise ValueError("a decoder needs at least one proposer")
        if num_proposals < 1:
            raise ValueError(f"num_proposals must be at least 1, got {num_proposals}")
        if tree is not None and not self._proposers[0].drafts_trees:
            raise ValueError(f"{type(self._proposers[0]).__name__} drafts no trees; decode with chains")
        self._engine = engine
        self._spec = spec
        self._sampling = sampling
        self._tree = tree
        self.num_proposals = num_proposals if tree is None else tree.depth + 1
        self._stops = frozenset(engine.info.eos_token_ids)

    @property
    def batch_size(self) -> int:
        """Sequences that are decoded together."""
        return len(self._proposers)

    @property
    def judged(self) -> bool:
        """Whether a difference from plain decoding is a loss: greedy, and computed in fp32."""
        return self._engine.dtype == torch.float32 and self._sampling is None

    def plain(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """Decoding of one prompt with a KV cache, one token a forward."""
        return self.plain_batch([prompt], max_new_tokens)[0]

    def speculative(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """Speculative decoding of one prompt, as :meth:`speculative_batch`."""
        return self.speculative_batch([prompt], max_new_tokens)[0]

    def plain_batch(
        self, prompts: Prompts, max_new_tokens: int, samplings: Sequence[Sampling | None] | None = None
    ) -> list[Decoded]:
        """Decoding of at most ``batch_size`` prompts together, one token each a forward.

        ``samplings``: how each prompt draws; without them all draw as the decoder says, one after the other.
        """
        return self._decode(self._lanes(prompts, max_new_tokens, samplings), self._plain_spec, self._plain_step)

    def speculative_batch(
        self, prompts: Prompts, max_new_tokens: int, samplings: Sequence[Sampling | None] | None = None
    ) -> list[Decoded]:
        """Speculative decoding of at most ``batch_size`` prompts together. A stop token ends an output, also in the
        middle of an accepted run.

        A round that starts with room for fewer tokens than a full round can commit proposes fewer and does not count.
        The draft's own prefill is part of its decode time.
        """
        lanes = self._lanes(prompts, max_new_tokens, samplings)
        for lane, proposer in zip(lanes, self._proposers, strict=False):
            proposer.reset()
            lane.proposer = proposer
        return self._decode(lanes, self._spec, self._round)

    def _lanes(self, prompts: Prompts, max_new_tokens: int, samplings: Sequence[Sampling | None] | None) -> list[Lane]:
        if not 1 <= len(prompts) <= self.batch_size:
            raise ValueError(f"a batch has 1 to {self.batch_size} prompts, got {len(prompts)}")
        chosen = [self._sampling] * len(prompts) if samplings is None else samplings
        return [
            Lane(len(prompt), len(prompt) + max_new_tokens, list(prompt), sampling)
            for prompt, sampling in zip(prompts, chosen, strict=True)
        ]

    def _decode(self, lanes: list[Lane], spec: CaptureSpec, step: Step) -> list[Decoded]:
        """The prefill, and steps until every sequence is done."""
        session = open_session(self._engine, spec, len(lanes))
        counts = [lane.num_prompt for lane in lanes]
        logits, features = session.admit([lane.tokens for lane in lanes])
        split = {name: rows.split(counts) for name, rows in features.items()}
        for number, (lane, token) in enumerate(zip(lanes, self._next(logits, lanes), strict=True)):
            lane.tokens.append(token)
            lane.features = {name: rows[number] for name, rows in split.items()}
        active = list(lanes)
        start = time.perf_counter()
        while active := self._without_done(session, active):
            step(session, active)
            now = time.perf_counter()
            for lane in active:
                lane.seconds += (now - start) / len(active)
            start = now
        return [lane.decoded() for lane in lanes]

    def _without_done(self, session: BatchSession, active: list[Lane]) -> list[Lane]:
        """``active`` in the order of the session, from which sequences that are done were dropped."""
        left = list(active)
        for number in reversed(range(len(active))):
            if left[number].is_done(self._stops):
                session.drop(number)
                left[number] = left[-1]
                left.pop()
        return left

    def _plain_step(self, session: BatchSession, lanes: list[Lane]) -> None:
        logits, _ = session.forward([lane.tokens[-1:] for lane in lanes])
        for lane, token in zip(lanes, self._next(logits, lanes), strict=True):
            lane.tokens.append(token)

    def _round(self, session: BatchSession, lanes: list[Lane]) -> None:
        proposals = [self._propose(lane) for lane in lanes]
        verdicts = self._verify(session, lanes, proposals)
        for lane, proposal, verdict in zip(lanes, proposals, verdicts, strict=True):
            lane.commit(proposal, verdict, self._stops, self.num_proposals)

    def _propose(self, lane: Lane) -> Proposal:
        """A proposal whose paths leave room for the target's own token."""
        limit = min(lane.room - 1, self.num_proposals)
        if not limit:
            return Proposal(())
        assert lane.proposer is not None
        tree = None if self._tree is None else _shallower(self._tree, limit)
        proposal = lane.proposer.propose(lane.tokens, lane.features, DraftRequest(limit, lane.sampling, tree))
        most = limit if tree is None else tree.num_nodes - 1
        if len(proposal.tokens) > most:
            raise ValueError(
                f"{type(lane.proposer).__name__} proposed {len(proposal.tokens)} tokens; at most {most} were asked for"
            )
        return proposal

    def _verify(self, session: BatchSession, lanes: list[Lane], proposals: list[Proposal]) -> list[Verdict]:
        """The target's verdicts. The session keeps the last committed token of each lane and what was accepted after
        it, and the lanes have the features there.
        """
        tokens = [[lane.tokens[-1], *proposal.tokens] for lane, proposal in zip(lanes, proposals, strict=True)]
        logits, features = session.forward(tokens, [_parents(proposal) for proposal in proposals])
        counts = [len(row) for row in tokens]
        split = {name: rows.split(counts) for name, rows in features.items()}
        verdicts = self._verdicts(logits, lanes, proposals, counts)
        for number, (lane, proposal, verdict) in enumerate(zip(lanes, proposals, verdicts, strict=True)):
            if proposal.parents is None:
                count = len(verdict.accepted)
                session.crop(number, len(lane.tokens) + count)
                lane.features = {name: rows[number][: count + 1] for name, rows in split.items()}
            else:
                kept = [0, *(index + 1 for index in verdict.accepted)]
                session.keep(number, kept)
                lane.features = {name: rows[number][kept] for name, rows in split.items()}
        return verdicts

    def _verdicts(
        self, logits: Tensor, lanes: list[Lane], proposals: list[Proposal], counts: list[int]
    ) -> list[Verdict]:
        """``logits`` [R, V] of all sequences, of which each has ``counts`` rows."""
        if self._sampling is None:
            choices = logits.argmax(dim=-1).split(counts)
            return [verify_greedy(proposal, own.tolist()) for proposal, own in zip(proposals, choices, strict=True)]
        rows = distribution(logits, self._sampling).split(counts)
        return [
            verify_sampled(proposal, own, _generator(lane))
            for lane, proposal, own in zip(lanes, proposals, rows, strict=True)
        ]

    def evaluate(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        on_prompt: Callable[[int], None] = lambda _done: None,
    ) -> SpeculativeReport:
        """Decode every prompt both ways, in batches, and compare.

        The two ways take turns, and in turn go first (plain decoding in the first batch, and so in a single one), so
        that a drift of the machine hits both. Sampled prompts draw with generators of their own, so that a prompt's
        tokens do not depend on its batch. ``on_prompt`` gets the number of prompts done. Raises :class:`DataError`
        without prompts.
        """
        if not prompts or max_new_tokens < 1:
            raise DataError("speculative decoding needs at least one prompt and one new token; check the prompt file")
        ways = (self.plain_batch, self.speculative_batch)
        for warm_up in ways:
            warm_up(prompts[: self.batch_size], min(WARM_UP_TOKENS, max_new_tokens))
        rows: list[DecodedPrompt] = []
        for turn, first in enumerate(range(0, len(prompts), self.batch_size)):
            batch = prompts[first : first + self.batch_size]
            results: dict[int, list[Decoded]] = {}
            for way in (0, 1) if turn % 2 == 0 else (1, 0):
                samplings = [self._sampling_of(first + place, way) for place in range(len(batch))]
                results[way] = ways[way](batch, max_new_tokens, samplings)
            for prompt, plain, speculative in zip(batch, results[0], results[1], strict=True):
                rows.append(self._compare(prompt, turn, plain, speculative))
                on_prompt(len(rows))
        return summarise(rows, self.num_proposals, self.judged)

    def _sampling_of(self, index: int, way: int) -> Sampling | None:
        """How prompt ``index`` draws in one of the two ways."""
        if self._sampling is None:
            return None
        key = f"{self._sampling.generator.initial_seed()}|{index}|{way}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
        return replace(self._sampling, generator=torch.Generator().manual_seed(seed))

    def _next(self, logits: Tensor, lanes: list[Lane]) -> list[int]:
        """The tokens after ``logits`` [n, V]."""
        if self._sampling is None:
            return [int(token) for token in logits.argmax(dim=-1).tolist()]
        rows = distribution(logits, self._sampling)
        return [draw(row, _generator(lane)) for row, lane in zip(rows, lanes, strict=True)]

    @property
    def _plain_spec(self) -> CaptureSpec:
        """Plain decoding captures nothing."""
        return CaptureSpec((), False, self._spec.dtype)

    def _compare(self, prompt: Sequence[int], batch: int, plain: Decoded, speculative: Decoded) -> DecodedPrompt:
        compared = self._sampling is None
        mismatch = first_mismatch(plain.tokens, speculative.tokens) if compared else None
        near_tie = mismatch is not None and self.is_near_tie(prompt, plain.tokens, speculative.tokens, mismatch)
        return DecodedPrompt(
            prompt_tokens=len(prompt),
            batch=batch,
            plain_tokens=plain.tokens,
            speculative_tokens=speculative.tokens,
            plain_seconds=plain.seconds,
            speculative_seconds=speculative.seconds,
            accepted=speculative.accepted,
            mismatch=mismatch,
            near_tie=near_tie,
            compared=compared,
        )

    def is_near_tie(
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


def first_mismatch(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first difference, the shorter length where one continues the other, ``None`` when equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _shallower(tree: TreeShape, max_tokens: int) -> TreeShape:
    """``tree`` with paths of at most ``max_tokens`` tokens."""
    return TreeShape(tree.top_k, min(tree.depth, max_tokens - 1), tree.num_nodes)


def _parents(proposal: Proposal) -> tuple[int, ...] | None:
    """Parents of the last committed token and the proposals, as a session takes them; ``None`` for a chain."""
    return None if proposal.parents is None else (-1, *(parent + 1 for parent in proposal.parents))


def _generator(lane: Lane) -> torch.Generator:
    assert lane.sampling is not None
    return lane.sampling.generator
