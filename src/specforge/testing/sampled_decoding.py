"""Whether sampled speculative decoding follows the target's distribution: 100,000 runs in seconds.

A target of a few tokens has few prefixes, so its forwards and those of a draft are computed once a prefix and
remembered; proposer, verifier and decoder run as they are. A remembered proposal is the one that the draft would make
with the same random numbers.

Legend: V vocabulary, H hidden size of the target, l proposals of a round.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer, Sampling
from specforge.algorithms.parts import sampling as sampling_part
from specforge.algorithms.parts.sampling import distribution
from specforge.contracts.capture import CaptureSpec
from specforge.evaluation.speculative import DecodingEngine, SpeculativeDecoder
from specforge.inference.engine import TargetSession

MIN_EXPECTED = 5.0
"""Outcomes that are expected less often are counted together."""


@dataclass(frozen=True, slots=True)
class _Row:
    """Of the last token of a prefix: logits [1, V], ``aux`` [1, H] after every layer, ``last`` [1, H]."""

    logits: Tensor
    aux: tuple[Tensor, ...]
    last: Tensor


class RememberingEngine:
    """A target that computes every prefix once, whichever chains and trees it is part of."""

    def __init__(self, engine: DecodingEngine) -> None:
        self.info, self.dtype, self.reference_logits = engine.info, engine.dtype, engine.reference_logits
        self._engine = engine
        self._everything = CaptureSpec(tuple(range(engine.info.num_layers)), True)
        self._rows: dict[tuple[int, ...], _Row] = {}
        self.forwards: dict[Any, tuple[Tensor, dict[str, Tensor]]] = {}

    def session(self, spec: CaptureSpec) -> TargetSession:
        return _RememberingSession(self, spec)

    def row(self, tokens: tuple[int, ...]) -> _Row:
        """The target's outputs after ``tokens``."""
        if tokens not in self._rows:
            logits, features = self._engine.session(self._everything).forward(tokens)
            layers = features["aux"].chunk(self.info.num_layers, dim=-1)
            for end in range(1, len(tokens) + 1):
                at = slice(end - 1, end)
                found = _Row(logits[at], tuple(layer[at] for layer in layers), features["last"][at])
                self._rows.setdefault(tokens[:end], found)
        return self._rows[tokens]


class _RememberingSession:
    def __init__(self, engine: RememberingEngine, spec: CaptureSpec) -> None:
        self._engine, self._spec = engine, spec
        self._tokens: tuple[int, ...] = ()
        self._num_before = 0

    def forward(
        self, token_ids: Sequence[int], parents: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        key = (self._spec, self._tokens, tuple(token_ids), None if parents is None else tuple(parents))
        found = self._engine.forwards.get(key)
        if found is None:
            found = self._engine.forwards[key] = self._compute(token_ids, parents)
        self._num_before = len(self._tokens)
        self._tokens += key[2]
        return found

    def _compute(self, token_ids: Sequence[int], parents: Sequence[int] | None) -> tuple[Tensor, dict[str, Tensor]]:
        paths: list[tuple[int, ...]] = []
        for index, token in enumerate(token_ids):
            parent = index - 1 if parents is None else parents[index]
            paths.append((*(paths[parent] if parent >= 0 else self._tokens), token))
        rows = [self._engine.row(path) for path in paths]
        features = {}
        if self._spec.aux_layers:
            aux = [torch.cat([row.aux[layer] for layer in self._spec.aux_layers], dim=-1) for row in rows]
            features["aux"] = torch.cat(aux)
        if self._spec.last_hidden:
            features["last"] = torch.cat([row.last for row in rows])
        return torch.cat([row.logits for row in rows]), features

    def crop(self, num_tokens: int) -> None:
        self._tokens = self._tokens[:num_tokens]

    def keep(self, rows: Sequence[int]) -> None:
        kept = (self._tokens[self._num_before + row] for row in rows)
        self._tokens = (*self._tokens[: self._num_before], *kept)


@dataclass(slots=True)
class _Draws:
    """What follows some draws of a proposal: one more draw from ``cumulative`` [V], or the ``proposal``."""

    cumulative: list[float] | None = None
    proposal: Proposal | None = None
    after: dict[int, _Draws] = field(default_factory=dict)


class RememberingProposer(Proposer):
    """A proposer whose proposals are computed once for every prefix and outcome of its draws."""

    drafts_trees = True

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self._features: list[Mapping[str, Tensor]] = []
        self._known: dict[Any, _Draws] = {}
        self.num_computed = 0

    def reset(self) -> None:
        self._features = []

    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        self._features.append(features)
        drawn = request.sampling
        how = None if drawn is None else (drawn.temperature, drawn.top_k, drawn.top_p)
        first = self._known.setdefault((tuple(tokens), request.num_proposals, request.tree, how), _Draws())
        generator = torch.Generator() if drawn is None else drawn.generator
        state = generator.get_state()
        found = _replayed(first, generator)
        if found is None:
            generator.set_state(state)
            found = self._compute(first, tokens, request)
        return found

    def _compute(self, node: _Draws, tokens: list[int], request: DraftRequest) -> Proposal:
        self.num_computed += 1
        features = {name: torch.cat([rows[name] for rows in self._features]) for name in self._features[0]}
        self._proposer.reset()
        with _recorded_draws() as draws:
            proposal = self._proposer.propose(tokens, features, request)
        if proposal.probabilities is not None and len(draws) < len(proposal.tokens):
            return proposal  # drawn in another way, which cannot be replayed
        for cumulative, token in draws:
            node.cumulative = cumulative
            node = node.after.setdefault(token, _Draws())
        node.proposal = proposal
        return proposal


def _replayed(node: _Draws, generator: torch.Generator) -> Proposal | None:
    """The known proposal after the draws of ``generator``, as ``parts.sampling.pick`` makes them."""
    while node.proposal is None:
        if node.cumulative is None:
            return None
        point, total = float(torch.rand((), dtype=torch.float64, generator=generator)), node.cumulative[-1]
        token = bisect_right(node.cumulative, min(point * total, math.nextafter(total, 0.0)))
        if token not in node.after:
            return None
        node = node.after[token]
    return node.proposal


@contextmanager
def _recorded_draws() -> Iterator[list[tuple[list[float], int]]]:
    """The draws inside the block: cumulative probabilities and the token."""
    draws: list[tuple[list[float], int]] = []
    pick = sampling_part.pick

    def recording(probabilities: Tensor, point: float) -> int:
        token = pick(probabilities, point)
        draws.append((probabilities.detach().to("cpu", torch.float64).cumsum(dim=0).tolist(), token))
        return token

    sampling_part.pick = recording
    try:
        yield draws
    finally:
        sampling_part.pick = pick


def exact_distribution(engine: DecodingEngine, prompt: Sequence[int], length: int, sampling: Sampling) -> Tensor:
    """fp64 [V] * length: the target's distribution of the first ``length`` tokens after ``prompt``, by enumeration."""
    spec = CaptureSpec((), False)
    vocab_size = engine.info.vocab_size
    joint = torch.zeros((vocab_size,) * length, dtype=torch.float64)
    for tokens in itertools.product(range(vocab_size), repeat=length - 1):
        logits, _ = engine.session(spec).forward([*prompt, *tokens])
        rows = distribution(logits[len(prompt) - 1 :], sampling).double()
        rows = rows / rows.sum(dim=-1, keepdim=True)
        before = math.prod(float(rows[place, token]) for place, token in enumerate(tokens))
        joint[tokens] = before * rows[-1]
    return joint


def sampled_counts(
    decoder: SpeculativeDecoder, prompt: Sequence[int], shape: Sequence[int], num_runs: int, max_new_tokens: int
) -> Tensor:
    """int64 of ``shape`` ([V] * length): how often the first ``length`` of ``max_new_tokens`` new tokens were which."""
    counts = torch.zeros(tuple(shape), dtype=torch.int64)
    flat, strides = counts.view(-1).tolist(), counts.stride()
    with torch.inference_mode():
        for _ in range(num_runs):
            tokens = decoder.speculative(prompt, max_new_tokens).tokens
            flat[sum(token * stride for token, stride in zip(tokens, strides, strict=False))] += 1
    return torch.tensor(flat).view(tuple(shape))


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of Pearson's test that ``counts`` follow ``probabilities`` (of equal shape, summing to 1).

    0 where something happened that has probability 0.
    """
    observed, expected = counts.flatten().double(), probabilities.flatten() * float(counts.sum())
    if bool((observed[expected == 0] > 0).any()):
        return 0.0
    rare = expected < MIN_EXPECTED
    pooled = float(expected[rare].sum()) >= MIN_EXPECTED
    observed_cells, expected_cells = observed[~rare], expected[~rare]
    if pooled:
        observed_cells = torch.cat((observed_cells, observed[rare].sum().view(1)))
        expected_cells = torch.cat((expected_cells, expected[rare].sum().view(1)))
    statistic = ((observed_cells - expected_cells).square() / expected_cells).sum()
    freedom = torch.tensor(len(expected_cells) - 1 if pooled or not rare.any() else len(expected_cells))
    return float(torch.special.gammaincc(freedom.double() / 2, statistic / 2))
