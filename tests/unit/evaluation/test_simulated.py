"""The estimate of training against real decoding of the same texts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specforge.algorithms.base import Runs
from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.evaluation.simulated import rounds_of, simulate
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.huggingface import HFTargetEngine
from specforge.testing.drafting import drafting_cases, make_drafting

PROMPTS = ([3, 1], [5, 1, 1, 0, 2, 7, 4], [6, 2, 3, 3])
NUM_NEW = 40


@pytest.mark.parametrize("case", drafting_cases())
def test_simulated_rounds_are_those_of_real_decoding(make_target: Callable[[int], HFTargetEngine], case: str):
    target = make_target(8)
    drafting = make_drafting(target, case)
    answers = [target.generate([prompt], Generate(NUM_NEW))[0].token_ids for prompt in PROMPTS]
    texts = list(zip(PROMPTS, answers, strict=True))
    simulated = simulate(target, drafting.algorithm, drafting.draft, target.tables, drafting.spec, texts, NUM_NEW)
    num_proposals = sum(name.startswith("accuracy_") for name in simulated.scalars)
    decoder = SpeculativeDecoder(target, drafting.proposer, drafting.spec, num_proposals)
    accepted = [count for prompt in PROMPTS for count in decoder.speculative(prompt, NUM_NEW).accepted]
    assert simulated.num_rounds == len(accepted) > 0
    assert simulated.simulated_acc_len == 1 + sum(accepted) / len(accepted)


@pytest.mark.parametrize("case", ["eagle3", "dflash", "dspark", "mtp"])
def test_simulated_rounds_end_at_stop_tokens_as_real_ones(make_target: Callable[[int], HFTargetEngine], case: str):
    target, cut = make_target(8), 0
    drafting = make_drafting(target, case)
    for stop in range(8):
        target.info = replace(target.info, eos_token_ids=(stop,))
        answers = [target.generate([prompt], Generate(NUM_NEW))[0].token_ids for prompt in PROMPTS]
        texts = list(zip(PROMPTS, answers, strict=True))
        simulated = simulate(target, drafting.algorithm, drafting.draft, target.tables, drafting.spec, texts, NUM_NEW)
        num_proposals = sum(name.startswith("accuracy_") for name in simulated.scalars)
        decoder = SpeculativeDecoder(target, drafting.proposer, drafting.spec, num_proposals)
        decoded = [decoder.speculative(prompt, NUM_NEW) for prompt in PROMPTS]
        assert [result.tokens for result in decoded] == answers
        accepted = [count for result in decoded for count in result.accepted]
        rounds = [a_round for result in decoded for a_round in result.rounds if a_round.counts]
        cut += sum(len(a_round.committed) <= len(a_round.accepted) for a_round in rounds)
        assert simulated.num_rounds == len(accepted)
        assert simulated.simulated_acc_len == (1 + sum(accepted) / len(accepted) if accepted else None)
    assert cut > 0


def test_rounds_skip_what_they_accept_and_end_with_the_text():
    task = PromptTask("a", 0, (0,) * 12, ((3, 12),))
    runs = Runs(torch.arange(2, 11), torch.tensor([0, 2, 1, 0, 0, 3, 0, 0, 0]))
    assert rounds_of(runs, task, 4, 9) == [2, 0]
    assert rounds_of(runs, task, 1, 9) == [2, 0, 3]
