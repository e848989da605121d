"""What a round of speculative decoding costs, in plain forwards of the same target and batch.

The packaged target on one CPU thread, and a draft that was never trained: its chains cost what those of a trained one
do. An oracle answers in its place, so that every round commits the same number of tokens. The parts take turns, so
that a drift of the machine hits all of them; the figures are ratios of medians, for seconds are the machine's own.

    python benchmarks/speculative.py [--batch-size N,N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer
from specforge.algorithms.eagle3.algorithm import Eagle3
from specforge.algorithms.eagle3.config import Eagle3Options
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.demo.run import PACKAGED_TARGET
from specforge.evaluation.lanes import open_session
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.engine import BatchSession
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


def verify_seconds(session: BatchSession, tokens: list[list[int]]) -> float:
    """One forward of a committed token and the proposals of every prompt, its greedy choices, and the crops."""

    def verify() -> None:
        logits, _ = session.forward(tokens)
        logits.argmax(dim=-1).tolist()
        for number in range(len(tokens)):
            session.crop(number, PROMPT_TOKENS)

    return statistics.median(seconds_of(verify) for _ in range(NUM_ROUNDS))


def measure(batch_size: int) -> dict[str, float]:
    """Median seconds of every part, for a batch of prompts of equal length."""
    engine = HFTargetEngine(PACKAGED_TARGET)
    engine.info = replace(engine.info, eos_token_ids=())
    algorithm = Eagle3(Eagle3Options())
    config = algorithm.draft_config(engine.info)
    spec: CaptureSpec = algorithm.capture_spec(config, "float32")
    draft = algorithm.build_draft(config, engine.tables, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, PROMPT_TOKENS)
    prompts: list[list[int]] = torch.randint(1, engine.info.vocab_size, shape, generator=generator).tolist()
    outputs = [[*prompt, *engine.generate([prompt], Generate(NEW_TOKENS))[0].token_ids] for prompt in prompts]
    oracles = [OracleProposer(algorithm.proposer(draft, engine.tables), output) for output in outputs]
    decoder = SpeculativeDecoder(engine, oracles, spec, NUM_PROPOSALS)
    session = open_session(engine, spec, batch_size)
    session.admit(prompts)
    proposed = [output[PROMPT_TOKENS : PROMPT_TOKENS + NUM_PROPOSALS + 1] for output in outputs]
    seconds: dict[str, list[float]] = {PLAIN: [], ROUND: [], CHAIN: [], VERIFY: []}
    for _ in range(NUM_WARM_UPS + NUM_REPEATS // batch_size + 1):
        plain = decoder.plain_batch(prompts, NEW_TOKENS)
        seconds[PLAIN].append(sum(it.seconds for it in plain) / (NEW_TOKENS - 1))
        decoded = decoder.speculative_batch(prompts, NEW_TOKENS)
        full = (NUM_PROPOSALS,) * NUM_ROUNDS
        assert all(it.accepted == full for it in decoded), "the oracle's proposals are the greedy output"
        seconds[ROUND].append(sum(it.seconds for it in decoded) / NUM_ROUNDS)
        # the first round's chain starts with the draft's prefill of the prompt
        chains = [statistics.median(oracle.seconds[1:]) for oracle in oracles]
        seconds[CHAIN].append(sum(chains))
        seconds[VERIFY].append(verify_seconds(session, proposed))
    return {name: statistics.median(values[NUM_WARM_UPS:]) for name, values in seconds.items()}


def report(batch_sizes: Sequence[int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    with torch.inference_mode():
        for batch_size in batch_sizes:
            medians = measure(batch_size)
            found[str(batch_size)] = {name: round(medians[name] / medians[PLAIN], 3) for name in (ROUND, CHAIN, VERIFY)}
    return {"num_proposals": NUM_PROPOSALS, "over_one_plain_forward": found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of speculative decoding in plain forwards of the target.")
    parser.add_argument("--batch-size", default="1", metavar="N,N", help="prompts decoded together; several sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args()
    figures = report([int(size) for size in arguments.batch_size.split(",")])
    for size, ratios in figures["over_one_plain_forward"].items():
        for name, ratio in ratios.items():
            print(f"batch size {size:3} {name:16} {ratio:.2f} plain forwards")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
