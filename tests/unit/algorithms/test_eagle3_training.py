"""Learning, initialisation and the edges of a training step."""

import dataclasses

import pytest
import torch

from specforge.algorithms.base import DraftRequest
from specforge.errors import ConfigError


def greedy_world(lab, tables, num_documents=1, length=24):
    """Documents whose tokens are what the teacher says: x_{j+1} = argmax(W y_j)."""
    documents = []
    for _ in range(num_documents):
        document = lab.document(length, 2)
        document["last"] = tables.lm_head[torch.roll(document["ids"], -1)] * 3.0
        document["ids"][1:] = (document["last"] @ tables.lm_head.T).argmax(-1)[:-1]
        documents.append(document)
    return documents


def test_a_repeated_sample_is_learned_and_then_accepted_by_greedy_decoding(lab, pack, eagle3, run_loss, context):
    """Oracle 51. Every step over 0.95, and the proposer then drafts the sample."""
    algorithm, tables = eagle3(ttt_steps=4), lab.tables()
    document = greedy_world(lab, tables)[0]
    draft, batch = lab.draft(algorithm, tables), pack([document])
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        output = run_loss(algorithm, draft, tables, batch)
        (output.loss_sum / algorithm.supervised_weight(batch, context)).backward()
        optimizer.step()
    assert float((output.correct / output.count).min()) > 0.95
    ids, aux, rounds, position = document["ids"].tolist(), document["aux"], [], 3
    proposer, known = algorithm.proposer(draft, tables), 0
    while position + 4 < len(ids):
        proposal = proposer.propose(ids[: position + 1], {"aux": aux[known:position]}, DraftRequest(4)).tokens
        known, truth = position, ids[position + 1 : position + 5]
        accepted = next((i for i in range(4) if proposal[i] != truth[i]), 4)
        rounds.append(accepted + 1)
        position += accepted + 1
    assert sum(rounds) / len(rounds) > 4.5


def test_an_empty_micro_batch_gives_zeros_that_reach_every_parameter(lab, pack, eagle3, run_loss, empty_batch):
    algorithm, tables = eagle3(ttt_steps=3), lab.tables()
    draft = lab.draft(algorithm, tables)
    full = run_loss(algorithm, draft, tables, pack([lab.document(10)]))
    for batch in (empty_batch, pack([lab.document(9, 9), lab.document(1, 0)])):
        draft.zero_grad()
        output = run_loss(algorithm, draft, tables, batch)
        output.loss_sum.backward()
        assert float(output.loss_sum.detach()) == 0.0
        assert all(bool((p.grad == 0).all()) for p in draft.parameters())
        assert output.metrics.keys() == full.metrics.keys()
        assert output.correct.tolist() == output.count.tolist() == [0, 0, 0]


def test_features_in_bfloat16_are_computed_with_in_the_dtype_of_the_draft(lab, pack, eagle3, run_loss, gradients):
    """The stored format rounds once; nothing after it does, and nothing is cast twice."""
    algorithm, tables = eagle3(ttt_steps=3), lab.tables()
    draft = lab.draft(algorithm, tables, fc_norm=True)
    batch = pack([lab.document(12), lab.document(7)])
    found = []
    for dtypes in ([torch.bfloat16], [torch.bfloat16, torch.float32]):
        features = dict(batch.features)
        for dtype in dtypes:
            features = {name: tensor.to(dtype) for name, tensor in features.items()}
        draft.zero_grad()
        output = run_loss(algorithm, draft, tables, dataclasses.replace(batch, features=features))
        output.loss_sum.backward()
        found.append((output.loss_sum.detach(), gradients(draft)))
    (stored, stored_gradients), (widened, widened_gradients) = found
    assert stored.dtype == torch.float32
    assert torch.equal(stored, widened)
    assert all(torch.equal(stored_gradients[name], widened_gradients[name]) for name in widened_gradients)


def test_a_full_micro_batch_reaches_every_parameter(lab, pack, eagle3, run_loss):
    algorithm, tables = eagle3(), lab.tables()
    draft = lab.draft(algorithm, tables, fc_norm=True, norm_before_fc=True, architecture="qwen3")
    run_loss(algorithm, draft, tables, pack([lab.document(20)])).loss_sum.backward()
    assert all(bool((p.grad != 0).any()) for p in draft.parameters())


def test_evaluation_without_gradients_gives_the_same_numbers(lab, pack, eagle3, run_loss):
    algorithm, tables = eagle3(), lab.tables()
    draft, batch = lab.draft(algorithm, tables), pack([lab.document(20)])
    trained = run_loss(algorithm, draft, tables, batch)
    with torch.no_grad():
        evaluated = run_loss(algorithm, draft, tables, batch)
    assert torch.equal(trained.loss_sum, evaluated.loss_sum)
    assert not evaluated.loss_sum.requires_grad


def test_a_frozen_head_keeps_the_targets_rows(lab, pack, eagle3, run_loss):
    algorithm, tables = eagle3(freeze_lm_head=True), lab.tables()
    kept = torch.arange(3, 33, 2)
    config = lab.draft(algorithm, tables, draft_vocab_size=15).config
    draft = algorithm.build_draft(config, tables, seed=1, kept_ids=kept)
    run_loss(algorithm, draft, tables, pack([lab.document(20)])).loss_sum.backward()
    assert draft.lm_head.weight.grad is None
    assert torch.equal(draft.lm_head.weight, tables.lm_head[kept])
    assert draft.fc.weight.grad is not None


def test_a_fresh_draft_depends_on_its_seed_alone(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    config = lab.draft(algorithm, tables).config
    torch.manual_seed(1)
    first = algorithm.build_draft(config, tables, seed=5).served_state()
    torch.manual_seed(2)
    again = algorithm.build_draft(config, tables, seed=5).served_state()
    other = algorithm.build_draft(config, tables, seed=6).served_state()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])
    assert abs(float(first["midlayer.mlp.up_proj.weight"].std()) - 0.02) < 0.002


def test_served_state_has_the_served_names(lab, eagle3):
    draft = lab.draft(
        eagle3(), lab.tables(), fc_norm=True, norm_before_fc=True, architecture="qwen3", draft_vocab_size=13
    )
    state = draft.served_state()
    layer = [
        "input_layernorm",
        "hidden_norm",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    layer += [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    names = [
        "fc",
        "norm",
        "lm_head",
        "input_norm",
        *(f"fc_norm.{i}" for i in range(3)),
        *(f"midlayer.{n}" for n in layer),
    ]
    assert set(state) == {f"{name}.weight" for name in names} | {"d2t", "t2d"}
    assert (state["d2t"].dtype, state["t2d"].dtype) == (torch.int64, torch.bool)
    assert (state["d2t"].shape, state["t2d"].shape) == ((13,), (40,))


def test_kept_ids_must_fit_the_draft_vocabulary(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    config = lab.draft(algorithm, tables, draft_vocab_size=13).config
    with pytest.raises(ConfigError, match="draft vocabulary of 13 out of 40, got 40"):
        algorithm.build_draft(config, tables, seed=0)


def test_bfloat16_autocast_gives_the_same_loss_and_gradients_to_its_precision(lab, pack, eagle3, run_loss):
    algorithm, tables = eagle3(ttt_steps=3), lab.tables()
    draft, batch = lab.draft(algorithm, tables), pack([lab.document(20), lab.document(11)])
    results = []
    for enabled in (False, True):
        draft.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = run_loss(algorithm, draft, tables, batch)
        output.loss_sum.backward()
        results.append((output.loss_sum.detach(), {name: p.grad.clone() for name, p in draft.named_parameters()}))
    (exact, exact_grads), (rounded, rounded_grads) = results
    assert torch.allclose(exact, rounded, rtol=2e-2)
    for name, grad in exact_grads.items():
        assert (grad - rounded_grads[name]).norm() <= 0.1 * grad.norm() + 1e-6, name
