"""Tables of example values: default layer ids, vocabulary maps, attention masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specforge.algorithms.eagle3.algorithm import aux_layers
from specforge.algorithms.parts.vocabulary import kept_ids, vocabulary_maps
from specforge.testing.golden.report import Comparison, Kind, NotBuilt, Status
from specforge.testing.golden.vectors import Vector
from specforge.testing.unrolled_reference import unroll_mask


def run_tables(vector: Vector, name: str) -> list[Comparison]:
    """One result for each entry of ``values``."""
    results = []
    for key, value in vector.facts["values"].items():
        result = Comparison(f"{name}:{key}")
        results.append(result)
        try:
            _runner(key)(key, value, result)
            result.finish(set())
        except NotBuilt as reason:
            result.status, result.note = Status.NOT_BUILT, str(reason)
        except (KeyError, ValueError, TypeError) as error:
            result.status, result.note = Status.FAILED, f"{type(error).__name__}: {error}"
    return results


def _runner(key: str) -> Callable[[str, Any, Comparison], None]:
    for prefix, runner in _RUNNERS.items():
        if key.startswith(prefix):
            return runner
    raise NotBuilt(f"no runner for the table {key!r}")


def _default_aux_layers(_key: str, value: dict[str, list[int]], result: Comparison) -> None:
    for depth, ids in value.items():
        got = torch.tensor(aux_layers(None, int(depth.removeprefix("L"))))
        result.check(Kind.METRICS, depth, got, torch.tensor(ids))


def _vocabulary_map(_key: str, value: dict[str, Any], result: Comparison) -> None:
    counts = torch.zeros(value["target_vocab"], dtype=torch.int64)
    for token, count in value["counts"].items():
        counts[int(token)] = count
    d2t, t2d = vocabulary_maps(kept_ids(counts, value["draft_vocab"]), value["target_vocab"])
    result.check(Kind.METRICS, "d2t", d2t, torch.tensor(value["d2t"]))
    result.check(Kind.METRICS, "t2d", t2d.long(), torch.tensor(value["t2d"]))


def _unroll_mask(key: str, value: dict[str, list[list[int]]], result: Comparison) -> None:
    """``..._Q{rows}_step{k}``, entries ``len{valid}...``: rows without a teacher at that step are empty there."""
    step = int(key.rsplit("step", 1)[1])
    for name, mask in value.items():
        expected = torch.tensor(mask)
        length = int(name.removeprefix("len").split("_")[0])
        rows = expected.shape[0]
        alive = torch.arange(rows) < length - step
        got = unroll_mask(torch.zeros(rows, dtype=torch.int64), step) & alive[:, None]
        result.check(Kind.METRICS, name, got.long(), expected)


_RUNNERS: dict[str, Callable[[str, Any, Comparison], None]] = {
    "eagle3_default_aux_ids": _default_aux_layers,
    "vocab_map": _vocabulary_map,
    "eagle3_ttt_mask": _unroll_mask,
}
