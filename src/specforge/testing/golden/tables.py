"""Tables of example values: default layer ids, vocabulary maps, attention masks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specforge.algorithms.eagle3.algorithm import default_aux_layers
from specforge.algorithms.parts.block_config import default_block_layers
from specforge.algorithms.parts.blocks import Blocks
from specforge.algorithms.parts.vocabulary import kept_ids, vocabulary_maps
from specforge.algorithms.peagle.features import CodShares, cod_positions
from specforge.testing.block_reference import block_mask
from specforge.testing.golden.peagle import recorded_plan, visible_elements
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
        got = torch.tensor(default_aux_layers(int(depth.removeprefix("L"))))
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


def _default_block_layers(_key: str, value: dict[str, list[int]], result: Comparison) -> None:
    """Entries ``L{layers}_n{number}``."""
    for name, ids in value.items():
        num_layers, number = (int(part[1:]) for part in name.split("_"))
        result.check(Kind.METRICS, name, torch.tensor(default_block_layers(num_layers, number)), torch.tensor(ids))


def _block_mask(key: str, value: list[list[int]], result: Comparison) -> None:
    """``..._S{tokens}_b{slots}_anchors{a}_{a or "invalid"}_{full or sliding{window}}``: one sample."""
    found = re.fullmatch(r".*_S(\d+)_b(\d+)_anchors([\w]+?)(?:_full|_sliding(\d+))?", key)
    if found is None:
        raise NotBuilt(f"no runner for the table {key!r}")
    anchors = found[3].split("_")
    keep = torch.tensor([anchor != "invalid" for anchor in anchors])
    places = torch.tensor([0 if anchor == "invalid" else int(anchor) for anchor in anchors])
    length, window = int(found[1]), None if found[4] is None else int(found[4])
    starts, ends = torch.zeros_like(places), torch.full_like(places, length)
    mask = block_mask(Blocks(places, starts, ends, int(found[2])), length, window, keep)
    result.check(Kind.METRICS, "mask", mask.long(), torch.tensor(value))


def _element_mask(_key: str, value: dict[str, Any], result: Comparison) -> None:
    anchors, depths = torch.tensor(value["anchor"]), torch.tensor(value["depth"])
    length = int((depths == 0).sum())
    plan = recorded_plan(anchors, depths, torch.zeros(length, dtype=torch.int64), (length,))
    result.check(Kind.METRICS, "mask", visible_elements(plan).long(), torch.tensor(value["mask"]))


def _cod_draw(key: str, value: dict[str, Any], result: Comparison) -> None:
    """``..._ratio{r}``: every recorded choice must be one that ours offers, of the same size."""
    anchors, depths = np.array(value["anchor"]), np.array(value["depth"])
    recorded = [np.sort(anchors[depths == depth]) + depth for depth in range(1, value["num_depths"])]
    unused = iter(recorded)

    def choose(eligible: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        chosen = next(unused)
        result.check(Kind.METRICS, "drawn at a depth", float(chosen.size), float(count))
        result.check(Kind.METRICS, "drawn of the eligible", float(np.isin(chosen, eligible).sum()), float(chosen.size))
        return chosen

    shares = CodShares(value["num_depths"], ratio=float(key.rsplit("ratio", 1)[1]), min_ratio=0.2)
    drawn = cod_positions(np.array(value["loss_mask"]) != 0, shares, choose)
    result.check(Kind.METRICS, "depths", float(len(drawn)), float(sum(found.size > 0 for found in recorded)))
    result.check(Kind.METRICS, "rows of depth 0", float((depths == 0).sum()), float(len(value["loss_mask"])))


_RUNNERS: dict[str, Callable[[str, Any, Comparison], None]] = {
    "eagle3_default_aux_ids": _default_aux_layers,
    "vocab_map": _vocabulary_map,
    "eagle3_ttt_mask": _unroll_mask,
    "dflash_default_target_layer_ids": _default_block_layers,
    "dflash_mask": _block_mask,
    "peagle_mask": _element_mask,
    "peagle_cod_ratio": _cod_draw,
}
