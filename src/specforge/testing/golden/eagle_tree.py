"""Golden vectors of EAGLE's drafted trees: two rounds of one sequence, the second on the cache of the first.

Legend: N nodes with the root, R rows of features.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, TargetTables, TreeShape
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.eagle3.proposer import Eagle3Proposer
from specforge.testing.golden.eagle3 import padded_case
from specforge.testing.golden.report import Comparison, InputsAbsent, Kind
from specforge.testing.golden.vectors import Vector, read_source

TREE_KEYS = {
    "name",
    "sort_for_sampling",
    "total_tokens_arg",
    "depth",
    "top_k",
    "prefix_len",
    "draft_tokens",
    "retrieve_indices",
    "tree_mask",
    "tree_position_ids",
    "second_round",
}


def run_eagle_tree(vector: Vector, result: Comparison) -> None:
    """Every tree of ``trees``. ``weights`` names a file below the golden directory, ``inputs`` the sample of it."""
    file = _named(r"(\S+)\.safetensors", vector.facts["weights"])
    sample = int(_named(r"sample (\d+)", vector.facts["inputs"]))
    source = read_source(_above(vector.path, f"{file}.json"))
    case = padded_case(source, 1, source.facts["cfg_extra"])
    ids, aux = source.tensors["in.input_ids"][sample].tolist(), source.tensors["in.aux_hidden"][sample]
    for place, tree in enumerate(vector.facts["trees"]):
        if unknown := set(tree) - TREE_KEYS:
            raise ValueError(f"unknown keys in a tree: {sorted(unknown)}")
        _run_tree(f"trees[{place}]", tree, (case.draft, case.tables), (ids, aux), result)


def _run_tree(
    name: str,
    tree: dict[str, Any],
    drafting: tuple[Eagle3Draft, TargetTables],
    sample: tuple[list[int], Tensor],
    result: Comparison,
) -> None:
    proposer, (ids, aux) = Eagle3Proposer(*drafting), sample
    shape = TreeShape(top_k=tree["top_k"], depth=tree["depth"], num_nodes=tree["total_tokens_arg"])
    request, length = DraftRequest(shape.num_nodes, tree=shape), tree["prefix_len"]
    proposal = proposer.propose(ids[: length + 1], {"aux": aux[:length]}, request)
    _check(name, proposal, ids[length], tree, tree["sort_for_sampling"], result)
    if (second := tree.get("second_round")) is None:
        return
    rows, length = second["new_hidden_rows"], second["ids_len"]
    proposal = proposer.propose(ids[:length], {"aux": aux[rows]}, request)
    _check(f"{name}.second_round", proposal, ids[length - 1], second, tree["sort_for_sampling"], result)


def _check(
    name: str, proposal: Proposal, root: int, expected: dict[str, Any], ordered: bool, result: Comparison
) -> None:
    """The tree and what a decoder makes of it, exactly. ``ordered``: the paths are sorted by their nodes."""
    assert proposal.parents is not None
    parents = [-1, *(parent + 1 for parent in proposal.parents)]
    visible = torch.eye(len(parents), dtype=torch.int64)
    for node, parent in enumerate(parents[1:], start=1):
        visible[node] |= visible[parent]
    depths = visible.sum(1) - 1
    leaves = sorted(set(range(len(parents))) - set(parents))
    paths = [visible[leaf].nonzero().flatten().tolist() for leaf in leaves]
    paths = sorted(paths) if ordered else paths
    padded = torch.tensor([path + [-1] * (int(depths.max()) + 1 - len(path)) for path in paths])
    got = {
        "draft_tokens": torch.tensor([root, *proposal.tokens]),
        "tree_mask": visible,
        "tree_position_ids": depths,
        "retrieve_indices": padded,
    }
    for key, value in got.items():
        result.check(Kind.METRICS, f"{name}.{key}", value, torch.tensor(expected[key]))


def _above(start: Path, file: str) -> Path:
    """``file`` below the nearest directory above ``start`` that has it, or an :class:`InputsAbsent`."""
    for directory in start.parents:
        if (directory / file).exists():
            return directory / file
    raise InputsAbsent(f"its inputs are in {file}, which is in no directory above")


def _named(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"expected {pattern!r} in {text!r}")
    return found[1]
