"""Sequences while they are decoded, and the target's sessions for one of them or for several.

Legend: V vocabulary, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specforge.algorithms.base import Proposal, Proposer, Sampling
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import TargetError
from specforge.evaluation.verification import Verdict
from specforge.inference.engine import BatchSession, DecodesBatches, TargetSession


class DecodingEngine(Protocol):
    """What the decoder asks of a target. For batches it is also ``DecodesBatches``; ``HFTargetEngine`` is both."""

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

    ``seconds`` is decode time: from the end of the target's prefill, which gave the first of ``tokens``, to the end. In
    a batch it is the sum of this sequence's shares: a step counts in equal parts for the sequences that are in it.
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


@dataclass(slots=True, eq=False)
class Lane:
    """A sequence that is being decoded. ``tokens`` are prompt and output, ``end`` is the largest number of them.

    ``features`` are those of the positions that the proposer has not seen; ``proposer`` is ``None`` in plain decoding.
    """

    num_prompt: int
    end: int
    tokens: list[int]
    sampling: Sampling | None
    proposer: Proposer | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Tokens that may still be appended."""
        return self.end - len(self.tokens)

    def is_done(self, stops: frozenset[int]) -> bool:
        return self.room <= 0 or self.tokens[-1] in stops

    def commit(self, proposal: Proposal, verdict: Verdict, stops: frozenset[int], full_round: int) -> None:
        """Append what a round gives, up to a stop token and the end; ``full_round``: proposals of one that counts."""
        new = [*(proposal.tokens[index] for index in verdict.accepted), verdict.extra]
        new = _until_stop(new[: self.room], stops)
        counts = self.room > full_round
        self.rounds.append(Round(len(self.tokens) - 1, proposal.tokens, verdict.accepted, tuple(new), counts))
        self.tokens += new

    def decoded(self) -> Decoded:
        return Decoded(tuple(self.tokens[self.num_prompt :]), self.seconds, tuple(self.rounds))


class OneSequence:
    """Implements ``BatchSession`` for one sequence with a ``TargetSession``, whose forwards need no masks."""

    def __init__(self, session: TargetSession) -> None:
        self._session = session

    def admit(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, Tensor]]:
        (prompt,) = prompts
        logits, features = self._session.forward(prompt)
        return logits[-1:], features

    def forward(
        self, token_ids: Sequence[Sequence[int]], parents: Sequence[Sequence[int] | None] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (tokens,) = token_ids
        tree = None if parents is None else parents[0]
        return self._session.forward(tokens) if tree is None else self._session.forward(tokens, tree)

    def crop(self, sequence: int, num_tokens: int) -> None:
        assert sequence == 0
        self._session.crop(num_tokens)

    def keep(self, sequence: int, rows: Sequence[int]) -> None:
        assert sequence == 0
        self._session.keep(rows)

    def drop(self, sequence: int) -> None:
        """The session ends with its sequence."""


def open_session(engine: DecodingEngine, spec: CaptureSpec, num_sequences: int) -> BatchSession:
    """A session of ``engine`` for so many sequences. :class:`TargetError` where it decodes one at a time only."""
    if num_sequences == 1:
        return OneSequence(engine.session(spec))
    if not isinstance(engine, DecodesBatches):
        raise TargetError(
            f"{type(engine).__name__} decodes one sequence at a time, but a batch of {num_sequences} was asked for; "
            "use a batch size of 1"
        )
    return engine.batch_session(spec, num_sequences)


def _until_stop(tokens: list[int], stops: frozenset[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stops:
            return tokens[: index + 1]
    return tokens
