"""Checks against the target itself: its final norm and head, what its engine generates, and a copy in this process.

Legend: S rows, H hidden size, V vocabulary, N rows behind which a token was generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.base import TargetTables, target_logits
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.tensors import materialised
from specforge.inference.self_test.evidence import SLACK, Evidence, Oracle
from specforge.inference.self_test.features import LAST, Features, distances, layer_name, split
from specforge.inference.self_test.final_norm import PossibleNorm, best_fit
from specforge.inference.self_test.report import Check, failed, passed, unverified, warning

MIN_DEVIATION = 0.02
"""The rows of a norm's output have a size of 1 up to this, whatever the number format."""
MAX_WRONG = 0.1
"""Of the next tokens that are no near-ties. A right server has none; quantised caches may cost a few."""
MAX_DISTANCE = 0.1
"""Of a usual row from the oracle's, where the layer is clearly the right one: rounding adds up from layer to layer (64
of them in bfloat16: 2 %).
"""
NEARER = 1.25
"""A layer that changes its input by less than the rounding is as near as its neighbour."""
EMBEDDINGS = "embeddings"


def final_norm(evidence: Evidence, tables: TargetTables, norms: list[PossibleNorm]) -> Check:
    """``last`` is an output of the target's final norm: without gain and bias each row has a root mean square of 1."""
    name = "final norm"
    if LAST not in evidence.alone[0].layers:
        return unverified(name, "last is not captured")
    if not norms:
        return unverified(name, "no weight of a final norm is found in the target's directory")
    norm, deviation = best_fit(norms, torch.cat([features.layers[LAST] for features in evidence.alone]))
    if deviation <= _allowed(evidence):
        return passed(name, kind=norm.kind, deviation=deviation)
    where = f"without the norm's gain a row of last has a size that is not 1 but off by {deviation:.2g}"
    places = _places(evidence)
    normed = [_fit(evidence, tables, places, _changed(evidence, norm)).share for norm in norms]
    if places and min(normed) > MAX_WRONG:
        return failed(
            name, "not_last", f"{where}, and normed it gives other tokens than the engine", deviation=deviation
        )
    return failed(name, "norm_missing", where, deviation=deviation)


def next_tokens(evidence: Evidence, tables: TargetTables, norms: list[PossibleNorm]) -> Check:
    """The head on ``last`` prefers the token that the engine generates, near-ties apart."""
    name = "next tokens"
    places = _places(evidence)
    if not places:
        return unverified(name, evidence.no_generation or "the engine generated nothing")
    claimed = _fit(evidence, tables, places, _moved(evidence, 0))
    figures = {"rows": len(places), "near_ties": claimed.near_ties, "wrong": claimed.wrong}
    fits = {
        convention: _fit(evidence, tables, places, given).share
        for convention, given in _explanations(evidence, norms).items()
    }
    likeliest = min(fits, key=fits.__getitem__)
    explained = fits[likeliest] <= MAX_WRONG / 2
    # what explains all of it is right even where few tokens differ: a norm too many changes only some
    if claimed.wrong <= 1 or (claimed.share <= MAX_WRONG and not explained):
        return passed(name, **figures)
    where = f"{claimed.wrong} of {claimed.judged} next tokens are not the engine's"
    return failed(name, likeliest if explained else "not_last", where, **figures)


@dataclass(frozen=True, slots=True)
class _Fit:
    """Of the rows that could be looked at: ``judged`` ones, near-ties left out, and ``wrong`` ones of them."""

    judged: int
    wrong: int
    near_ties: int

    @property
    def share(self) -> float:
        return self.wrong / self.judged if self.judged else 1.0


_Given = Callable[[int, int], Tensor | None]
"""(prompt, row) -> the state [1, H] after the final norm, if the features are what an explanation says; or none."""


def _places(evidence: Evidence) -> list[tuple[tuple[int, int], int]]:
    """((prompt, row), the token that the engine generates behind it)."""
    pairs = zip(evidence.prompts.next_rows, evidence.next_tokens, strict=False)
    return [(place, token) for place, token in pairs if token is not None]


def _explanations(evidence: Evidence, norms: list[PossibleNorm]) -> dict[str, _Given]:
    """By convention: where the right state of a row is, should that convention be broken."""
    found: dict[str, _Given] = {"row_late": _moved(evidence, 1), "row_early": _moved(evidence, -1)}
    if norms:
        norm, deviation = best_fit(norms, torch.cat([features.layers[LAST] for features in evidence.alone]))
        if deviation <= _allowed(evidence):
            found["norm_twice"] = _changed(evidence, norm.undone)
    return found


def _moved(evidence: Evidence, offset: int) -> _Given:
    def given(prompt: int, row: int) -> Tensor | None:
        state = evidence.alone[prompt].layers[LAST]
        return state[row + offset : row + offset + 1] if 0 <= row + offset < len(state) else None

    return given


def _changed(evidence: Evidence, change: Callable[[Tensor], Tensor]) -> _Given:
    return lambda prompt, row: change(evidence.alone[prompt].layers[LAST][row : row + 1])


def _allowed(evidence: Evidence) -> float:
    return max(MIN_DEVIATION, evidence.tolerance)


def _fit(evidence: Evidence, tables: TargetTables, places: list[tuple[tuple[int, int], int]], given: _Given) -> _Fit:
    rows = [(given(*place), token) for place, token in places]
    known = [(state, token) for state, token in rows if state is not None]
    if not known:
        return _Fit(0, 0, 0)
    logits = target_logits(tables, torch.cat([state for state, _ in known]).to(tables.lm_head.device))
    generated = torch.tensor([token for _, token in known], device=logits.device)
    best = logits.max(dim=1).values
    behind = best - logits.gather(1, generated[:, None])[:, 0]
    wrong = behind > 0
    # an error of a state, relative to its norm, moves logits by about as much of their spread
    near = wrong & (behind <= SLACK * evidence.tolerance * logits.std(dim=1))
    return _Fit(len(known) - int(near.sum()), int((wrong & ~near).sum()), int(near.sum()))


class Computed:
    """Every layer of the whole prompts, as the oracle computes them."""

    def __init__(self, oracle: Oracle, evidence: Evidence, tables: TargetTables) -> None:
        info = oracle.info
        every = CaptureSpec(tuple(range(info.num_layers)), last_hidden=True, dtype="float32")
        tasks = [
            PromptTask(f"oracle/{index}", index, row, ())
            for index, row in enumerate(evidence.prompts.rows[: evidence.prompts.num_whole])
        ]
        self.info: TargetInfo = info
        self.features: list[Features] = []
        for sample in oracle.capture(tasks, every):
            tensors = {name: materialised(source).cpu() for name, source in sample.tensors.items()}
            features = split(tensors, every, info.hidden_size)
            features.layers[EMBEDDINGS] = tables.embed_tokens[features.token_ids].float().cpu()
            self.features.append(features)

    def distances(self, evidence: Evidence, name: str) -> dict[str, float]:
        """How far the captured layer ``name`` is from each layer of the target, of a usual row; from ``name`` itself
        also one row late and one early, which are called ``late`` and ``early``.
        """
        got = [features.layers[name] for features in evidence.alone[: len(self.features)]]
        found = {
            other: _usual([distances(a[1:], b.layers[other][1:]) for a, b in zip(got, self.features, strict=True)])
            for other in self.features[0].layers
        }
        right = [features.layers[name] for features in self.features]
        found["late"] = _usual([distances(a[1:], b[:-1]) for a, b in zip(got, right, strict=True)])
        found["early"] = _usual([distances(a[:-1], b[1:]) for a, b in zip(got, right, strict=True)])
        return found


def layers(evidence: Evidence, computed: Computed | str) -> Check:
    """Each layer of ``aux`` is nearest to the one of the target that its id means, and within the tolerance."""
    name = "layer ids"
    asked = [layer for layer in evidence.alone[0].layers if layer != LAST]
    if not asked:
        return unverified(name, "aux is not captured")
    if isinstance(computed, str):
        return unverified(name, computed)
    far = {layer: computed.distances(evidence, layer) for layer in asked}
    given = {layer: _nearest(far[layer], layer) for layer in asked}
    measured = {layer: far[layer][layer] for layer in asked}
    wrong = [layer for layer in asked if given[layer] != layer]
    if wrong:
        where = ", ".join(f"{layer} holds {_called(given[layer], layer)}" for layer in wrong)
        return failed(name, _broken(asked, given, wrong), where, **measured)
    return _judged(name, evidence, far, measured)


def last_state(evidence: Evidence, computed: Computed | str, norms: list[PossibleNorm]) -> Check:
    """``last`` is the target's last state after the final norm."""
    name = "last"
    if LAST not in evidence.alone[0].layers:
        return unverified(name, "last is not captured")
    if isinstance(computed, str):
        return unverified(name, f"{computed}; a norm that is applied twice may change no next token")
    far = computed.distances(evidence, LAST)
    far |= _normed(evidence, computed, norms)
    given = _nearest(far, LAST)
    figures = {"distance": far[LAST], "before_the_norm": far[layer_name(computed.info.num_layers - 1)]}
    if given == LAST:
        return _judged(name, evidence, {LAST: far}, figures)
    names = {"twice": "norm_twice", "late": "row_late", "early": "row_early"}
    broken = names.get(given, "norm_missing" if given == layer_name(computed.info.num_layers - 1) else "not_last")
    return failed(name, broken, f"last holds {_called(given, LAST)}", **figures)


def _normed(evidence: Evidence, computed: Computed, norms: list[PossibleNorm]) -> dict[str, float]:
    """The distance of ``last`` from the target's own normed again (``twice``), and from earlier layers normed."""
    if not norms:
        return {}
    states = computed.features
    norm, _ = best_fit(norms, torch.cat([features.layers[LAST] for features in states]))
    got = [features.layers[LAST] for features in evidence.alone[: len(states)]]
    names = {LAST: "twice"} | {
        layer_name(layer): f"{layer_name(layer)} after the final norm" for layer in range(computed.info.num_layers - 1)
    }
    return {
        called: _usual([distances(a[1:], norm(b.layers[name])[1:]) for a, b in zip(got, states, strict=True)])
        for name, called in names.items()
    }


def _judged(name: str, evidence: Evidence, far: dict[str, dict[str, float]], figures: dict[str, float]) -> Check:
    """Whether layers that hold what they claim are near enough. ``far``: by layer, its distance from each candidate."""
    coarse = {layer: each[layer] for layer, each in far.items() if each[layer] > evidence.tolerance}
    if not coarse:
        return passed(name, **figures)
    allowed = {layer: _allowed_distance(evidence, far[layer], layer) for layer in coarse}
    where = ", ".join(f"{layer} by {distance:.2g} of the norm of a row" for layer, distance in coarse.items())
    if any(coarse[layer] > allowed[layer] for layer in coarse):
        return failed(name, "numerics", f"{where}; {min(allowed.values()):g} is allowed", **figures)
    return warning(name, f"{where}: more than rounding of a few layers, {evidence.tolerance:g}", **figures)


def _allowed_distance(evidence: Evidence, far: dict[str, float], claimed: str) -> float:
    """More where the engine rounds, and where nothing else is nearly as near."""
    others = min(distance for other, distance in far.items() if other != claimed)
    if evidence.info.dtype == "float32" or far[claimed] * NEARER >= others:
        return evidence.tolerance
    return max(evidence.tolerance, MAX_DISTANCE)


def _nearest(far: dict[str, float], claimed: str) -> str:
    """The nearest one; ``claimed`` where nothing is clearly nearer."""
    nearest = min(far, key=far.__getitem__)
    return nearest if far[nearest] * NEARER < far[claimed] else claimed


def _broken(asked: list[str], given: dict[str, str], wrong: list[str]) -> str:
    moved = {"late": "row_late", "early": "row_early"}
    if all(given[layer] in moved for layer in wrong):
        return moved[given[wrong[0]]]
    return "layer_order" if sorted(given.values()) == sorted(asked) else "wrong_layer"


def _called(given: str, claimed: str) -> str:
    return {
        "late": f"{claimed} one row late",
        "early": f"{claimed} one row early",
        "twice": f"{claimed} normed twice",
    }.get(given, f"the {given}" if given == EMBEDDINGS else given)


def _usual(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).median())
