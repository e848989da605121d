"""Where a target's rotary embedding depends on the longest position of a forward, as transformers computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

Row = TypeVar("Row")
Result = TypeVar("Result")


def length_of_short_rope(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which all sequences have the same frequencies; ``None`` where that holds for any number.

    ``config``: that of the decoder, as in ``config.json``. With the RoPE types ``dynamic`` and ``longrope`` a longer
    sequence has others, for all of its positions.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # some targets have a set of parameters a layer type
    nested = [each for each in found.values() if isinstance(each, Mapping)]
    lengths = []
    for parameters in nested or [found]:
        kind = str(parameters.get("rope_type", parameters.get("type", "")))
        trained = parameters.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
        longest = config.get("max_position_embeddings")
        if kind in {"longrope", "su"}:
            lengths.append(int(trained or longest or 0))
        elif "dynamic" in kind:
            # one less: transformers goes back to the frequencies of short sequences below its limit only
            lengths.append(int(longest or trained or 0) - 1)
    return max(0, min(lengths)) if lengths else None


def forget_longest(model: nn.Module) -> None:
    """Take RoPE of the type ``dynamic`` back to short sequences. It keeps the frequencies of the longest one that it
    saw, so without this a sample would depend on those before it.
    """
    device = next(model.parameters()).device
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")) and hasattr(module, "original_max_seq_len"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(device)


def grouped(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """The indices of ``lengths``, in groups that may share a forward: those up to ``limit``, each longer one alone."""
    if limit is None:
        return [list(range(len(lengths)))] if lengths else []
    short = [index for index, length in enumerate(lengths) if length <= limit]
    alone = [[index] for index, length in enumerate(lengths) if length > limit]
    return [short, *alone] if short else alone


def in_groups(
    rows: Sequence[Row],
    length: Callable[[Row], int],
    limit: int | None,
    compute: Callable[[list[Row]], list[Result]],
) -> list[Result]:
    """``compute`` of ``rows``, in their order, one forward a group of :func:`grouped`."""
    found: dict[int, Result] = {}
    for group in grouped([length(row) for row in rows], limit):
        found |= zip(group, compute([rows[index] for index in group]), strict=True)
    return [found[index] for index in range(len(rows))]
