"""A proposer of any algorithm of the catalog, with random weights, for a tiny target."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specforge.algorithms.base import Algorithm, DraftModel, Proposer
from specforge.algorithms.catalog import algorithm_names, get_algorithm, options_of
from specforge.contracts.capture import CaptureSpec
from specforge.inference.huggingface import HFTargetEngine
from specforge.testing.algorithm_world import SMALL_OPTIONS, randomise

PRUNED = {"eagle3": 5, "peagle": 6}
"""Draft vocabularies of the drafts that have their own, for a target of 8 tokens."""


@dataclass(frozen=True)
class Drafting:
    algorithm: Algorithm
    draft: DraftModel
    proposer: Proposer
    spec: CaptureSpec


def drafting_cases() -> list[str]:
    """The small options of every algorithm of the catalog, and its defaults where there are none."""
    names = algorithm_names()
    return [case for case in SMALL_OPTIONS if case.partition("-")[0] in names] + [
        name for name in names if name not in SMALL_OPTIONS
    ]


def make_drafting(engine: HFTargetEngine, case: str) -> Drafting:
    """A draft with large random weights: it has an opinion, and not the target's."""
    name, options = case.partition("-")[0], dict(SMALL_OPTIONS.get(case, {}))
    vocab_size = engine.info.vocab_size
    if "draft_vocab_size" in options:
        options["draft_vocab_size"] = min(options["draft_vocab_size"], PRUNED[name] if vocab_size == 8 else vocab_size)
    algorithm = get_algorithm(options_of({"name": name, **options}))
    config = algorithm.draft_config(engine.info)
    generator = torch.Generator().manual_seed(17)
    kept = None
    if config.draft_vocab_size < vocab_size:
        kept = torch.randperm(vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
    draft = algorithm.build_draft(config, engine.tables, seed=0, kept_ids=kept)
    randomise(draft, generator)
    proposer = algorithm.proposer(draft.eval(), engine.tables)
    return Drafting(algorithm, draft, proposer, algorithm.capture_spec(config, "float32"))
