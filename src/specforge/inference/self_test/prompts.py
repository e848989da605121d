"""The prompts of a self-test: a few of the run's own, cut short, and what is made of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from specforge.contracts.capture import TargetInfo

LENGTHS = (40, 33, 27, 21, 14)
"""Tokens of the whole prompts."""
MIN_TOKENS = 8
MIN_DISTINCT = 4
NUM_REPLACED = 3
"""Whole prompts of which a token is replaced in the middle."""
MAX_DRAWS = 1000
NUM_NEXT_TOKENS = 4
"""Rows of a whole prompt behind which the engine generates a token."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """Prompt ``other`` is prompt ``original`` with another token in row ``row``."""

    original: int
    other: int
    row: int


@dataclass(frozen=True, slots=True)
class PromptSet:
    """``rows``: token ids; the first ``num_whole`` are the whole prompts. ``prefixes``: pairs (whole, prefix of it).
    ``next_rows``: (prompt, row) behind which a token is generated. ``long``: a prompt that begins with the first whole
    one, empty where there is no room for it.
    """

    rows: tuple[tuple[int, ...], ...]
    num_whole: int
    prefixes: tuple[tuple[int, int], ...]
    replaced: tuple[Replaced, ...]
    next_rows: tuple[tuple[int, int], ...]
    long: tuple[int, ...] = ()


def choose_prompts(
    given: Sequence[Sequence[int]], target: TargetInfo, embedding: Tensor, max_tokens: int, long_tokens: int = 0
) -> PromptSet:
    """Prompts of several lengths, none equal to its neighbour: whole ones, two prefixes (one of a single token), and
    some with a token replaced; and one of ``long_tokens``, where these are clearly more. A pure function of its
    arguments.

    Where ``given`` has too few of a fit length, and of enough distinct tokens, rows are drawn from the vocabulary.
    Tokens with an embedding [V, H] of zeros are left out: their features may be zeros with good reason.
    """
    draw = random.Random(0)  # noqa: S311 - repeatable, not secret
    known = min(target.vocab_size, target.num_tokens or target.vocab_size)
    stops = {*target.eos_token_ids, target.mask_token_id}

    def token(other_than: int | None = None) -> int:
        drawn = draw.randrange(known)
        for _ in range(MAX_DRAWS):
            if drawn != other_than and drawn not in stops and _is_embedded(embedding, drawn):
                break
            drawn = draw.randrange(known)
        return drawn

    lengths = [max(2, min(length, max_tokens)) for length in LENGTHS]
    rows = _fit(given, lengths, embedding, target.vocab_size)
    rows += [tuple(token() for _ in range(length)) for length in lengths[len(rows) :]]
    num_whole = len(rows)
    middle = max(1, len(rows[1]) // 2)
    prefixes = ((0, len(rows)), (1, len(rows) + 1))
    rows += [rows[0][:1], rows[1][:middle]]
    replaced = []
    for original in range(NUM_REPLACED):
        whole = rows[original]
        row = min(len(whole) - 1, max(2, len(whole) // 2))
        replaced.append(Replaced(original, len(rows), row))
        rows.append((*whole[:row], token(other_than=whole[row]), *whole[row + 1 :]))
    next_rows = [(num_whole, 0)]
    for prompt in range(num_whole):
        length = len(rows[prompt])
        # neither at the start, where rows are alike, nor only at the end, where a row has no row behind it
        chosen = {max(0, length * part // NUM_NEXT_TOKENS - 1) for part in range(1, NUM_NEXT_TOKENS + 1)}
        next_rows += [(prompt, row) for row in sorted(chosen)]
    is_long = long_tokens >= 2 * len(rows[0])
    long = (*rows[0], *(token() for _ in range(long_tokens - len(rows[0])))) if is_long else ()
    return PromptSet(tuple(rows), num_whole, prefixes, tuple(replaced), tuple(next_rows), long)


def _fit(
    given: Sequence[Sequence[int]], lengths: Sequence[int], embedding: Tensor, vocab_size: int
) -> list[tuple[int, ...]]:
    """One of ``given`` for every length, as far as there are any: of longer ones the end, since many begin alike."""
    found: list[tuple[int, ...]] = []
    for row in sorted((tuple(row) for row in given), key=len, reverse=True)[: 16 * len(lengths)]:
        if len(found) == len(lengths):
            break
        cut = row[-lengths[len(found)] :]
        if len(cut) < MIN_TOKENS or len(set(cut)) < MIN_DISTINCT or not 0 <= min(cut) <= max(cut) < vocab_size:
            continue
        if any(cut[: len(other)] == other[: len(cut)] for other in found) or not _is_embedded(embedding, cut[0]):
            continue
        found.append(cut)
    return found


def _is_embedded(embedding: Tensor, token: int) -> bool:
    return token < len(embedding) and bool(embedding[token].any())
