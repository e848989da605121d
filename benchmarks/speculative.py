"""What a round of speculative decoding costs, in plain forwards of the same target.

The packaged target on one CPU thread, and a draft that was never trained: its chains cost what those of a trained one
do. An oracle answers in its place, so that every round commits the same number of tokens. The parts take turns, so
that a drift of the machine hits all of them; the figures are ratios of medians, for seconds are the machine's own.

    python benchmarks/speculative.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer
from specforge.algorithms.eagle3.algorithm import Eagle3
from specforge.algorithms.eagle3.config import Eagle3Options
from specforge.contracts.capture import CaptureSpec
from specforge.demo.run import PACKAGED_TARGET
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.engine import TargetSession
from specforge.inference.huggingface import HFTargetEngine

NUM_PROPOSALS = 5
NUM_ROUNDS = 8
PROMPT_TOKENS = 48
NEW_TOKENS = 1 + NUM_ROUNDS * (NUM_PROPOSALS + 1)
NUM_REPEATS = 40
NUM_WARM_UPS = 3
PLAIN, ROUND, CHAIN, VERIFY = "plain_forward", "round", "draft_proposals", "verify_forward"


class OracleProposer(Proposer):
    """Lets the draft propose, notes the seconds it took, and answers with the known greedy output."""

    def __init__(self, draft: Proposer, output: list[int]) -> None:
        self._draft = draft
        self._output = output
        self.seconds: list[float] = []

    def reset(self) -> None:
        self._draft.reset()
        self.seconds = []

    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        self.seconds.append(seconds_of(lambda: self._draft.propose(tokens, features, request)))
        return Proposal(tuple(self._output[len(tokens) : len(tokens) + request.num_proposals]))


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def verify_seconds(session: TargetSession, tokens: list[int]) -> float:
    """One forward of a committed token and the proposals behind the prompt, its greedy choices, and the crop."""

    def verify() -> None:
        logits, _ = session.forward(tokens)
        logits.argmax(dim=-1).tolist()
        session.crop(PROMPT_TOKENS)

    return statistics.median(seconds_of(verify) for _ in range(NUM_ROUNDS))


def measure() -> dict[str, float]:
    """Median seconds of every part."""
    engine = HFTargetEngine(PACKAGED_TARGET)
    engine.info = replace(engine.info, eos_token_ids=())
    algorithm = Eagle3(Eagle3Options())
    config = algorithm.draft_config(engine.info)
    spec: CaptureSpec = algorithm.capture_spec(config, "float32")
    draft = algorithm.build_draft(config, engine.tables, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, engine.info.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    output = [*prompt, *engine.generate([prompt], NEW_TOKENS)[0].token_ids]
    oracle = OracleProposer(algorithm.proposer(draft, engine.tables), output)
    decoder = SpeculativeDecoder(engine, oracle, spec, NUM_PROPOSALS)
    session = engine.session(spec)
    session.forward(prompt)
    seconds: dict[str, list[float]] = {PLAIN: [], ROUND: [], CHAIN: [], VERIFY: []}
    for _ in range(NUM_WARM_UPS + NUM_REPEATS):
        seconds[PLAIN].append(decoder.plain(prompt, NEW_TOKENS).seconds / (NEW_TOKENS - 1))
        decoded = decoder.speculative(prompt, NEW_TOKENS)
        assert decoded.accepted == (NUM_PROPOSALS,) * NUM_ROUNDS, "the oracle's proposals are the greedy output"
        seconds[ROUND].append(decoded.seconds / NUM_ROUNDS)
        # the first round's chain starts with the draft's prefill of the prompt
        seconds[CHAIN].append(statistics.median(oracle.seconds[1:]))
        seconds[VERIFY].append(verify_seconds(session, output[PROMPT_TOKENS : PROMPT_TOKENS + NUM_PROPOSALS + 1]))
    return {name: statistics.median(values[NUM_WARM_UPS:]) for name, values in seconds.items()}


def report() -> dict[str, Any]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        medians = measure()
    return {
        "num_proposals": NUM_PROPOSALS,
        "over_one_plain_forward": {name: round(medians[name] / medians[PLAIN], 3) for name in (ROUND, CHAIN, VERIFY)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of speculative decoding in plain forwards of the target.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    figures = report()
    for name, ratio in figures["over_one_plain_forward"].items():
        print(f"{name:16} {ratio:.2f} plain forwards")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
