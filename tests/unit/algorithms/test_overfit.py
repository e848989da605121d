"""One sample repeated is learned, and then drafted: training and inference are aligned end to end."""

from dataclasses import replace

import pytest
import torch

from specforge.algorithms.base import DraftRequest, StepContext
from specforge.algorithms.catalog import ALGORITHMS, get_algorithm, options_of
from specforge.contracts.capture_server import Generate
from specforge.contracts.refs import Slot
from specforge.contracts.tasks import PromptTask
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.target import load_tokenizer
from specforge.testing.samples import Sample, pack

BLOCK_DRAFT = {"num_layers": 2, "block_size": 4, "num_anchors": 64, "aux_layers": (1, 3, 5)}
CASES = {
    "eagle3": {"ttt_steps": 4},
    "peagle": {"num_depths": 4, "num_layers": 2},
    "dflash": BLOCK_DRAFT,
    "domino": {**BLOCK_DRAFT, "emb_dim": 32, "gru_hidden_dim": 64},
    "dspark": {**BLOCK_DRAFT, "markov_rank": 32},
    "mtp": {},
    "medusa": {"num_heads": 4},
}
PROMPT = "Ada went to the park and saw 3 birds. Then"
ANSWER_TOKENS = 40
STEPS = 150
LR = 8e-3
NUM_PROPOSALS = 3


def test_every_algorithm_of_the_catalog_is_a_case():
    assert set(ALGORITHMS) <= set(CASES)


@pytest.fixture(scope="module")
def engine(tiny_target_dir):
    return HFTargetEngine(tiny_target_dir)


@pytest.fixture(scope="module")
def text(engine, tiny_target_dir):
    """A prompt with the target's own greedy answer, as ids, and where the answer starts."""
    prompt = load_tokenizer(tiny_target_dir)(PROMPT)["input_ids"]
    [answer] = engine.generate([prompt], Generate(ANSWER_TOKENS))
    return [*prompt, *answer.token_ids], len(prompt)


def captured(engine, spec, ids, start):
    """The sample of ``ids`` whose answer starts at ``start``, as training reads it."""
    [sample] = engine.capture([PromptTask("sample", 0, tuple(ids), ((start, len(ids)),))], spec)
    features = {
        name: source if isinstance(source, torch.Tensor) else torch.cat(source.parts, dim=-1)
        for name, source in sample.tensors.items()
        if name != "input_ids"
    }
    return Sample("sample", torch.tensor(ids), torch.arange(len(ids)) >= start, features)


def overfit(algorithm, draft, tables, sample):
    """Trains on the sample alone and gives the accuracy of every position in the last step."""
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LR)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (1.0 - step / STEPS)
        batch, context = pack([replace(sample, slot=Slot(step, 0))]), StepContext(step, STEPS, seed=0)
        output = algorithm.forward_loss(draft, tables, batch, context)
        optimizer.zero_grad()
        (output.loss_sum / algorithm.supervised_weight(batch, context)).backward()
        optimizer.step()
    return (output.correct / output.count.clamp(min=1))[output.count > 0].tolist()


def decoded(proposer, sample, start, num_proposals):
    """(accepted, proposed) tokens of greedy decoding along the sample, which is the target's own greedy text."""
    ids, position, known, accepted, proposed = sample.ids.tolist(), start, 0, 0, 0
    while position + num_proposals < len(ids):
        features = {name: tensor[known:position] for name, tensor in sample.features.items()}
        tokens = proposer.propose(ids[: position + 1], features, DraftRequest(num_proposals)).tokens
        truth = ids[position + 1 : position + 1 + len(tokens)]
        run = next(
            (i for i, (token, right) in enumerate(zip(tokens, truth, strict=True)) if token != right), len(tokens)
        )
        known, position = position, position + run + 1
        accepted, proposed = accepted + run, proposed + len(tokens)
    return accepted, proposed


@pytest.mark.parametrize("name", [name for name in CASES if name in ALGORITHMS])
def test_a_repeated_sample_is_learned_and_then_accepted_by_greedy_decoding(engine, text, name):
    """Oracle 51. A real target and its own greedy answer: over 0.95 at every position, and drafting follows."""
    ids, start = text
    algorithm = get_algorithm(options_of({"name": name, **CASES[name]}))
    config = algorithm.draft_config(engine.info)
    draft = algorithm.build_draft(config, engine.tables, seed=0)
    sample = captured(engine, algorithm.capture_spec(config, "float32"), ids, start)
    accuracies = overfit(algorithm, draft, engine.tables, sample)
    assert min(accuracies) > 0.95, accuracies
    draft.eval()
    accepted, proposed = decoded(algorithm.proposer(draft, engine.tables), sample, start, NUM_PROPOSALS)
    assert proposed >= 20
    assert accepted / proposed > 0.95
