"""SpeculativeDecoder: speculative decoding in process, greedy (checked token by token) or sampled, chains or trees.

The definitions of the figures are in docs/glossary.md.

Legend: m positions of one forward, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer, Sampling, TreeShape
from specforge.algorithms.parts.sampling import distribution, draw
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import DataError
from specforge.evaluation.report import DecodedPrompt, SpeculativeReport, summarise
from specforge.evaluation.verification import Verdict, verify_greedy, verify_sampled
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
class Round:
    """One round: ``start`` is the position of the last committed token, ``accepted`` indices into ``proposals``.

    ``committed`` are the tokens that it appended, those after a stop token left out. ``counts`` is false where the
    length limit left no room for all proposals that were asked for, also if the draft can propose fewer only.
    """

    start: int
    proposals: tuple[int, ...]
    accepted: tuple[int, ...]
    committed: tuple[int, ...]
    counts: bool


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decoding; plain decoding has no rounds.

    ``seconds`` is decode time: from the end of the target's prefill, which gave the first of ``tokens``, to the end.
    """

    tokens: tuple[int, ...]
    seconds: float
    rounds: tuple[Round, ...] = ()

    @property
    def accepted(self) -> tuple[int, ...]:
        """Accepted proposals of each round that counts: one less than the tokens it committed, also where a stop token
        cut it.
        """
        return tuple(len(a_round.committed) - 1 for a_round in self.rounds if a_round.counts)


class SpeculativeDecoder:
    """Decodes prompts one at a time, in rounds of a chain of ``num_proposals`` tokens or of a ``tree``.

    ``spec`` is what the proposer's algorithm captures. Greedy without ``sampling``; ties go to the lowest id.
    """

    def __init__(
        self,
        engine: DecodingEngine,
        proposer: Proposer,
        spec: CaptureSpec,
        num_proposals: int,
        *,
        sampling: Sampling | None = None,
        tree: TreeShape | None = None,
    ) -> None:
        if num_proposals < 1:
            raise ValueError(f"num_proposals must be at least 1, got {num_proposals}")
        if tree is not None and not proposer.drafts_trees:
            raise ValueError(f"{type(proposer).__name__} drafts no trees; decode with chains")
        self._engine = engine
        self._proposer = proposer
        self._spec = spec
        self._sampling = sampling
        self._tree = tree
        self._num_proposals = num_proposals if tree is None else tree.depth + 1
        self._stops = frozenset(engine.info.eos_token_ids)

    def plain(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """Decoding with a KV cache, one token a forward."""
        session = self._engine.session(self._plain_spec)
        logits, _ = session.forward(prompt)
        tokens = [self._next(logits)]
        start = time.perf_counter()
        while len(tokens) < max_new_tokens and tokens[-1] not in self._stops:
            logits, _ = session.forward(tokens[-1:])
            tokens.append(self._next(logits))
        return Decoded(tuple(tokens), time.perf_counter() - start)

    def speculative(self, prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        """Speculative decoding. A stop token ends the output, also in the middle of an accepted run.

        A round that starts with room for fewer tokens than a full round can commit proposes fewer and does not count.
        The draft's own prefill is part of its decode time.
        """
        session = self._engine.session(self._spec)
        self._proposer.reset()
        logits, features = session.forward(prompt)
        committed = [*prompt, self._next(logits)]
        end = len(prompt) + max_new_tokens
        rounds: list[Round] = []
        start = time.perf_counter()
        while len(committed) < end and committed[-1] not in self._stops:
            room = end - len(committed)
            proposal = self._propose(committed, features, room - 1)
            verdict, features = self._verify(session, committed, proposal)
            new = [*(proposal.tokens[index] for index in verdict.accepted), verdict.extra]
            new = _until_stop(new[:room], self._stops)
            counts = room > self._num_proposals
            rounds.append(Round(len(committed) - 1, proposal.tokens, verdict.accepted, tuple(new), counts))
            committed += new
        return Decoded(tuple(committed[len(prompt) :]), time.perf_counter() - start, tuple(rounds))

    def _propose(self, committed: list[int], features: dict[str, Tensor], limit: int) -> Proposal:
        """A proposal whose paths have at most ``limit`` tokens."""
        limit = min(limit, self._num_proposals)
        if not limit:
            return Proposal(())
        tree = None if self._tree is None else _shallower(self._tree, limit)
        proposal = self._proposer.propose(committed, features, DraftRequest(limit, self._sampling, tree))
        most = limit if tree is None else tree.num_nodes - 1
        if len(proposal.tokens) > most:
            raise ValueError(
                f"{type(self._proposer).__name__} proposed {len(proposal.tokens)} tokens; at most {most} were asked for"
            )
        return proposal

    def _verify(
        self, session: TargetSession, committed: list[int], proposal: Proposal
    ) -> tuple[Verdict, dict[str, Tensor]]:
        """The target's verdict, and its features at the last committed token and the accepted ones, which it keeps."""
        tokens = [committed[-1], *proposal.tokens]
        if proposal.parents is None:
            logits, features = session.forward(tokens)
        else:
            logits, features = session.forward(tokens, (-1, *(parent + 1 for parent in proposal.parents)))
        if self._sampling is None:
            verdict = verify_greedy(proposal, logits.argmax(dim=-1).tolist())
        else:
            verdict = verify_sampled(proposal, distribution(logits, self._sampling), self._sampling.generator)
        if proposal.parents is None:
            count = len(verdict.accepted)
            session.crop(len(committed) + count)
            return verdict, {name: rows[: count + 1] for name, rows in features.items()}
        rows = [0, *(index + 1 for index in verdict.accepted)]
        session.keep(rows)
        return verdict, {name: values[rows] for name, values in features.items()}

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
        judged = self._engine.dtype == torch.float32 and self._sampling is None
        return summarise(rows, self._num_proposals, judged)

    def _next(self, logits: Tensor) -> int:
        """The token after the last row of ``logits`` [m, V]."""
        if self._sampling is None:
            return int(logits[-1].argmax())
        return draw(distribution(logits[-1], self._sampling), self._sampling.generator)

    @property
    def _plain_spec(self) -> CaptureSpec:
        """Plain decoding captures nothing."""
        return CaptureSpec((), False, self._spec.dtype)

    def _compare(self, prompt: Sequence[int], plain: Decoded, speculative: Decoded) -> DecodedPrompt:
        compared = self._sampling is None
        mismatch = first_mismatch(plain.tokens, speculative.tokens) if compared else None
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
            compared=compared,
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


def first_mismatch(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first difference, the shorter length where one continues the other, ``None`` when equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _shallower(tree: TreeShape, max_tokens: int) -> TreeShape:
    """``tree`` with paths of at most ``max_tokens`` tokens."""
    return TreeShape(tree.top_k, min(tree.depth, max_tokens - 1), tree.num_nodes)


def _until_stop(tokens: list[int], stops: frozenset[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[: index + 1]
    return tokens
