"""Checks that need nothing but the features: that there are any, that they are of their prompt, that rows are of their
tokens. Every check is a pure function of the evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from specforge.inference.self_test.evidence import SLACK, Evidence
from specforge.inference.self_test.features import LAST, Features, distances, layer_name
from specforge.inference.self_test.prompts import Replaced
from specforge.inference.self_test.report import Check, failed, passed, unverified

FAR = 0.3
"""A single row that is off by more is that of another token, and not rounding."""
FEW_ROWS = 50
"""Of so many rows one may be far beyond rounding: the state of a token that the target hardly reads."""
CONSTANT = 1e-6
"""Rows or channels that differ by less, relative to their size, are the same."""


def finite(evidence: Evidence) -> Check:
    """No NaN, no infinity."""
    found = _rows_where(evidence, lambda values: ~torch.isfinite(values).all(dim=1))
    return failed("finite", "finite", found) if found else passed("finite")


def not_zero(evidence: Evidence) -> Check:
    """Every row of every layer holds something."""
    found = _rows_where(evidence, lambda values: (values == 0).all(dim=1))
    return failed("not zero", "zeros", found) if found else passed("not zero")


def not_constant(evidence: Evidence) -> Check:
    """Rows differ from each other, and channels within a row."""
    found: list[str] = []
    for features in evidence.alone[: evidence.prompts.num_whole]:
        for name, values in features.layers.items():
            size = values.abs().amax()
            if (values - values[:1]).abs().amax() <= CONSTANT * size:
                found.append(f"{name} has the same row for every token")
            elif ((values.amax(dim=1) - values.amin(dim=1)) <= CONSTANT * size).any():
                found.append(f"{name} has rows in which all channels are equal")
    return failed("not constant", "constant", _joined(found)) if found else passed("not constant")


def token_ids(evidence: Evidence) -> Check:
    """The feature ``input_ids`` is what was asked for."""
    name = "token ids"
    for how, answers in _answers(evidence):
        for index, (row, features) in enumerate(zip(evidence.prompts.rows, answers, strict=True)):
            got = tuple(features.token_ids.tolist())
            if got != row:
                where = f"prompt {index}, captured {how}: asked for {_shown(row)}, got {_shown(got)}"
                return failed(name, "token_ids", where)
    return passed(name, prompts=len(evidence.prompts.rows))


def repeatable(evidence: Evidence) -> Check:
    """The same prompt right behind itself has the same features."""
    name = "repeated"
    worst, differing = _differing(evidence, evidence.alone, evidence.again)
    if not differing:
        return passed(name, worst_distance=worst)
    # of two requests for the same prompt the second one has the right features, where each gives those before it
    late = [index for index in differing if index and _same(evidence, evidence.alone[index], evidence.again[index - 1])]
    broken = "previous_request" if 2 * len(late) > len(differing) else "not_repeatable"
    return failed(name, broken, f"{_prompts(differing)} of {len(evidence.alone)}", worst_distance=worst)


def at_once(evidence: Evidence) -> Check:
    """A prompt has the features that it has alone when all others are in flight too."""
    return _like_alone("all at once", evidence, evidence.at_once)


def joined(evidence: Evidence) -> Check:
    """A prompt has the features that it has alone when it is one item of a request."""
    return _like_alone("in one request", evidence, evidence.joined)


def distinct_layers(evidence: Evidence) -> Check:
    """No two layers are the same, ``last`` included."""
    name = "distinct layers"
    names = list(evidence.alone[0].layers)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            if all(torch.equal(features.layers[first], features.layers[second]) for features in evidence.alone):
                final = layer_name(evidence.info.num_layers - 1)
                broken = "norm_missing" if {first, second} == {final, LAST} else "same_layer"
                return failed(name, broken, f"{first} and {second} are equal to the bit")
    return passed(name, layers=len(names))


def prefixes(evidence: Evidence) -> Check:
    """The rows of a prefix are the first rows of the whole prompt: no row depends on later tokens."""
    limit, worst = SLACK * evidence.tolerance, 0.0
    names: list[str] = []
    kinds: list[str] = []
    for whole, prefix in evidence.prompts.prefixes:
        for name, values in evidence.alone[prefix].layers.items():
            far = distances(evidence.alone[whole].layers[name][: len(values)], values)
            worst = max(worst, float(far.max()))
            rows = (far > limit).nonzero().flatten().tolist()
            alone = len(rows) == 1 and not evidence.info.strict and float(far.max()) <= FAR
            if rows and not (alone and len(values) > 1):
                names.append(name)
                kinds += _moved(rows, len(values))
    if not names:
        return passed("prefixes", worst_distance=worst)
    return failed("prefixes", _most(kinds or ["not_causal"]), _joined(names), worst_distance=worst)


def _moved(rows: list[int], num_rows: int) -> list[str]:
    """What it means that these rows of a prefix differ from the whole prompt's; a single row has no direction."""
    if num_rows == 1:
        return []
    return ["row_late" if rows == [0] else "row_early" if rows == [num_rows - 1] else "not_causal"]


def long_prompt(evidence: Evidence) -> Check:
    """A prompt that the engine computes in several steps has the first rows that these tokens have alone, and features
    in every row.
    """
    name, features, rows = "long prompt", evidence.long, evidence.prompts.long
    if isinstance(features, str):
        return unverified(name, features)
    if tuple(features.token_ids.tolist()) != rows:
        return failed(name, "token_ids", f"a prompt of {len(rows)} tokens has others")
    empty = [
        f"{layer} in {int(wrong.sum())} of {len(values)} rows"
        for layer, values in features.layers.items()
        if (wrong := ~torch.isfinite(values).all(dim=1) | (values == 0).all(dim=1)).any()
    ]
    if empty:
        return failed(name, "long_prompt", f"zeros or no numbers: {_joined(empty)}")
    short = evidence.alone[0]
    far = torch.stack(
        [distances(features.layers[layer][: len(values)], values) for layer, values in short.layers.items()]
    )
    figures: dict[str, float | str] = {"tokens": len(rows), "worst_distance": float(far.max())}
    if _is_near(evidence, far):
        return passed(name, **figures)
    where = f"the first {far.shape[1]} of {len(rows)} rows, by {float(far.max()):.2g} of the norm of a row"
    return failed(name, "long_prompt", where, **figures)


def own_rows(evidence: Evidence) -> Check:
    """Where a token is replaced, its own row is the first one that changes."""
    limit = SLACK * evidence.tolerance
    broken = {
        name: _most([_first_change(evidence, pair, name, limit) for pair in evidence.prompts.replaced])
        for name in evidence.alone[0].layers
    }
    wrong = {name: kind for name, kind in broken.items() if kind}
    if not wrong:
        return passed("own rows", replaced_tokens=len(evidence.prompts.replaced))
    kind = _most(list(wrong.values()))
    return failed("own rows", kind, _joined([name for name in wrong if wrong[name] == kind]))


def _first_change(evidence: Evidence, pair: Replaced, name: str, limit: float) -> str:
    """The convention that is broken by the first row that differs between the two prompts; empty for none."""
    original, other = (evidence.alone[index].layers[name] for index in (pair.original, pair.other))
    rows = (distances(other, original) > limit).nonzero().flatten().tolist()
    if not rows:
        # behind the last row there is none in which a token that is given late could be seen
        return "row_late" if pair.row == len(original) - 1 else "stale"
    return {0: "", 1: "row_late", -1: "row_early"}.get(rows[0] - pair.row, "not_causal")


def _like_alone(name: str, evidence: Evidence, answers: list[Features]) -> Check:
    worst, differing = _differing(evidence, answers, evidence.alone)
    if not differing:
        return passed(name, worst_distance=worst)
    others = [
        index
        for index in differing
        if any(
            _same(evidence, answers[index], evidence.alone[other]) for other in range(len(answers)) if other != index
        )
    ]
    broken = "other_sample" if 2 * len(others) > len(differing) else "batch"
    where = f"{name}: {_prompts(differing)} of {len(answers)}, by {worst:.2g} of the norm of a row"
    if broken == "batch" and evidence.info.strict:
        where += "; the server says strict, so to the bit is expected"
    return failed(name, broken, where, worst_distance=worst)


def _differing(evidence: Evidence, got: Sequence[Features], wanted: Sequence[Features]) -> tuple[float, list[int]]:
    """The worst distance, and the prompts that differ: in a bit where the server is strict, else by more than rounding.

    Usual rows within the tolerance, and all but few within its slack.
    """
    worst, differing = 0.0, []
    for index, (mine, other) in enumerate(zip(got, wanted, strict=True)):
        far = torch.stack([distances(mine.layers[name], other.layers[name]) for name in other.layers])
        worst = max(worst, float(far.max()))
        equal = all(torch.equal(mine.layers[name], other.layers[name]) for name in other.layers)
        near = _is_near(evidence, far)
        if not (equal if evidence.info.strict else near):
            differing.append(index)
    return worst, differing


def _same(evidence: Evidence, mine: Features, other: Features) -> bool:
    """Whether the rows that both have are the same."""
    rows = min(len(mine.token_ids), len(other.token_ids))
    far = [distances(mine.layers[name][:rows], other.layers[name][:rows]) for name in other.layers]
    return _is_near(evidence, torch.stack(far))


def _is_near(evidence: Evidence, far: torch.Tensor) -> bool:
    """``far`` [n, S] of n layers."""
    rows = far.amax(dim=0)
    num_far = int((rows > SLACK * evidence.tolerance).sum())
    return bool(far.median() <= evidence.tolerance and num_far <= -(-len(rows) // FEW_ROWS))


def _answers(evidence: Evidence) -> list[tuple[str, list[Features]]]:
    return [
        ("alone", evidence.alone),
        ("again", evidence.again),
        ("all at once", evidence.at_once),
        ("in one request", evidence.joined),
    ]


def _rows_where(evidence: Evidence, wrong: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Where a row is ``wrong``, a function of [S, H]; empty for nowhere."""
    found = []
    for how, answers in _answers(evidence):
        for index, features in enumerate(answers):
            for name, values in features.layers.items():
                rows = wrong(values).nonzero().flatten().tolist()
                if rows:
                    found.append(f"{name} in {len(rows)} of {len(values)} rows of prompt {index}, captured {how}")
    return _joined(found)


def _joined(found: Sequence[str], most: int = 4) -> str:
    """Each once, and not too many."""
    each = list(dict.fromkeys(found))
    return ", ".join(each[:most]) + (f" and {len(each) - most} more" if len(each) > most else "")


def _most(kinds: Sequence[str]) -> str:
    """What is there most often; of several the first."""
    return Counter(kinds).most_common(1)[0][0]


def _prompts(indices: Sequence[int]) -> str:
    return f"prompts {', '.join(map(str, indices))}"


def _shown(row: Sequence[int]) -> str:
    return f"{len(row)} tokens {list(row[:8])}{'..' if len(row) > 8 else ''}"
