"""MTP: alignment, training equals inference, the start from the target's last layer."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from specforge.algorithms.base import DraftRequest, Sampling, StepContext
from specforge.algorithms.mtp.algorithm import Mtp
from specforge.algorithms.mtp.config import MtpDraftConfig, MtpOptions
from specforge.algorithms.mtp.features import plan_steps
from specforge.algorithms.mtp.loss import step_weights
from specforge.algorithms.mtp.model import step_embeddings
from specforge.algorithms.parts.decoder import DecoderLayer
from specforge.algorithms.parts.target_layers import last_layer
from specforge.errors import ConfigError, DraftError

CONTEXT = StepContext(global_step=0, total_steps=1, seed=0)
CONFIG = MtpDraftConfig(
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=128,
    vocab_size=40,
    draft_vocab_size=40,
    aux_layers=(),
    target_num_layers=8,
)


def setup(lab, qk_norm=False, **options):
    """A draft whose weights are large enough for attention to matter."""
    algorithm, tables = Mtp(MtpOptions(**options)), lab.tables()
    draft = algorithm.build_draft(replace(CONFIG, qk_norm=qk_norm), tables, seed=0)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.copy_(lab.random(*parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    return algorithm, draft, tables


def dense_logits(draft, tables, document, num_steps):
    """Logits of every step [K, S, V] of one document, all rows computed under one dense causal mask."""
    ids, length = document["ids"], len(document["ids"])
    mtp, layer = draft.mtp, draft.mtp.layer
    hidden, logits = document["last"], []
    shifted = torch.cat((ids, torch.zeros(num_steps + 1, dtype=torch.int64)))
    for step in range(num_steps):
        embedded = mtp.pre_fc_norm_embedding(tables.embed_tokens[shifted[step + 1 : step + 1 + length]])
        rows = mtp.fc(torch.cat((embedded, mtp.pre_fc_norm_hidden(hidden)), dim=-1))
        angles = layer.self_attn.rotary(torch.arange(length))
        normed = layer.input_layernorm(rows)
        queries, (keys, values) = layer.self_attn.queries(normed, angles), layer.self_attn.keys_values(normed, angles)
        attended = F.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in (queries, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1))),
            is_causal=True,
        )
        hidden = mtp.norm(layer.finish(rows, attended.transpose(0, 1)))
        logits.append(hidden @ tables.lm_head.T)
    return torch.stack(logits)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_loss_and_gradients_equal_a_dense_unroll(lab, pack, run_loss, gradients, qk_norm):
    algorithm, draft, tables = setup(lab, qk_norm, num_steps=3, step_decay=0.5)
    documents = [lab.document(9), lab.document(4), lab.document(14, answer_from=6), lab.document(2, answer_from=1)]
    output = run_loss(algorithm, draft, tables, pack(documents))
    output.loss_sum.backward()
    ours = gradients(draft)
    draft.zero_grad()
    total, correct, count, runs = torch.zeros(()), torch.zeros(3), torch.zeros(3), 0
    for document in documents:
        logits, length = dense_logits(draft, tables, document, 3), len(document["ids"])
        for row in range(length):
            run, alive = 1, True
            for step, weight in enumerate((4 / 7, 2 / 7, 1 / 7)):
                label = row + 2 + step
                supervised = label < length and bool(document["mask"][label])
                right = supervised and bool(logits[step, row].argmax() == document["ids"][label])
                if supervised:
                    total = total + weight * F.cross_entropy(logits[step, row], document["ids"][label])
                    count[step] += 1
                    correct[step] += right
                alive = alive and right
                run += alive
            runs += run if row + 2 < length and document["mask"][row + 2] else 0
    total.backward()
    torch.testing.assert_close(output.loss_sum, total.detach(), rtol=1e-5, atol=1e-5)
    assert output.correct.tolist() == correct.tolist()
    assert output.count.tolist() == count.tolist()
    assert (int(output.runs.sums()[0]), int(output.runs.sums()[1])) == (runs, int(count[0]))
    assert algorithm.supervised_weight(pack(documents), CONTEXT) == count[0]
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_changed_token_changes_no_row_of_another_document_or_before_it(lab, pack):
    _, draft, tables = setup(lab)
    documents = [lab.document(9), lab.document(8)]
    plan, _ = plan_steps(pack(documents), 3)

    def readouts():
        batch = pack(documents)
        return draft(batch.features["last"], step_embeddings(batch.input_ids, tables.embed_tokens), plan)

    before = readouts()
    documents[0]["ids"][6] = (documents[0]["ids"][6] + 1) % 40
    after = readouts()
    changed = (before[0] != after[0]).any(-1)
    assert plan.context[changed].tolist() == [5, 6]  # row 5 embeds token 6, and row 6 sees it
    second = (before[1] != after[1]).any(-1)
    assert plan.context[second].tolist() == [4, 5, 6]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_step_k_of_the_unroll_equals_teacher_forced_decoding(lab, pack, qk_norm):
    algorithm, draft, tables = setup(lab, qk_norm, num_steps=4)
    num_steps, batch = 4, pack([lab.document(11), lab.document(7)])
    plan, _ = plan_steps(batch, num_steps)
    with torch.no_grad():
        readouts = draft(batch.features["last"], step_embeddings(batch.input_ids, tables.embed_tokens), plan)
        logits = [readout @ tables.lm_head.T for readout in readouts]
    proposer, start = algorithm.proposer(draft, tables), 0
    for length in batch.lengths:
        ids, last = batch.input_ids[start : start + length].tolist(), batch.features["last"][start : start + length]
        proposer.reset()
        for row in range(length - num_steps - 1):
            proposer.propose(ids[: row + 2], {"last": last[row : row + 1]}, DraftRequest(row % 3))
            proposer._drop_speculation()
            for step in range(num_steps):
                got = proposer.extend(ids[: row + 2 + step], step + 1)
                place = int((plan.context == start + row).nonzero())
                if step == num_steps - 1:
                    place = int((plan.last_rows == place).nonzero())
                torch.testing.assert_close(got, logits[step][place], rtol=1e-5, atol=1e-5)
        start += length


def test_proposals_do_not_depend_on_how_features_arrive_or_on_earlier_speculation(lab):
    algorithm, draft, tables = setup(lab)
    document = lab.document(600)
    ids, last = document["ids"].tolist(), document["last"]
    whole = algorithm.proposer(draft, tables).propose(ids, {"last": last[:599]}, DraftRequest(5))
    proposer = algorithm.proposer(draft, tables)
    proposer.propose(ids[:2], {"last": last[:1]}, DraftRequest(6))
    proposer.propose(ids[:9], {"last": last[1:8]}, DraftRequest(1))
    proposer.propose(ids[:14], {"last": last[8:13]}, DraftRequest(0))
    proposer.propose(ids[:300], {"last": last[13:299]}, DraftRequest(3))
    assert proposer.propose(ids, {"last": last[299:599]}, DraftRequest(5)) == whole
    assert proposer.propose(ids, {"last": last[:0]}, DraftRequest(5)) == whole
    assert len(whole.tokens) == 5
    with pytest.raises(ValueError, match="need features of 600 positions, got 599"):
        proposer.propose([*ids, 1], {"last": last[:0]}, DraftRequest(5))


def test_sampled_tokens_come_with_the_distributions_they_were_drawn_from(lab):
    algorithm, draft, tables = setup(lab)
    document = lab.document(9)
    ids, features = document["ids"].tolist(), {"last": document["last"][:8]}
    sampling = Sampling(temperature=0.5, generator=torch.Generator().manual_seed(1))
    proposer = algorithm.proposer(draft, tables)
    proposal = proposer.propose(ids, features, DraftRequest(3, sampling))
    assert proposal.probabilities.shape == (3, 40)
    proposer.reset()
    proposer.propose(ids, features, DraftRequest(0))
    expected = torch.softmax(proposer.extend([*ids, *proposal.tokens[:2]], 3) / 0.5, -1)
    torch.testing.assert_close(proposal.probabilities[2], expected)


def test_a_batch_without_supervision_gives_zeros_that_reach_every_parameter(
    lab, pack, empty_batch, run_loss, gradients
):
    algorithm, draft, tables = setup(lab)
    for batch in (empty_batch, pack([lab.document(4, answer_from=4)])):
        draft.zero_grad()
        output = run_loss(algorithm, draft, tables, batch)
        output.loss_sum.backward()
        assert output.loss_sum == 0
        assert output.count.tolist() == [0] * 3
        assert set(gradients(draft)) == set(dict(draft.named_parameters()))


def test_steps_without_a_row_are_left_out(lab, pack, run_loss):
    algorithm, draft, tables = setup(lab)
    output = run_loss(algorithm, draft, tables, pack([lab.document(3)]))
    assert output.count.tolist() == [1, 0, 0]
    assert torch.isfinite(output.loss_sum)


def test_grouping_of_samples_changes_nothing(lab, pack, run_loss):
    algorithm, draft, tables = setup(lab)
    documents = [lab.document(9), lab.document(5), lab.document(14, answer_from=6)]
    whole = run_loss(algorithm, draft, tables, pack(documents))
    apart = [run_loss(algorithm, draft, tables, pack([document])) for document in documents]
    torch.testing.assert_close(whole.loss_sum, sum(output.loss_sum for output in apart))
    assert torch.equal(whole.correct, sum(output.correct for output in apart))


def test_a_single_sample_is_learnt_and_drafted(lab, pack, run_loss):
    algorithm, draft, tables = setup(lab)
    batch = pack([lab.document(12)])
    optimizer = torch.optim.Adam(draft.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        output = run_loss(algorithm, draft, tables, batch)
        (output.loss_sum / algorithm.supervised_weight(batch, CONTEXT)).backward()
        optimizer.step()
    assert bool((output.correct > 0.95 * output.count).all())
    proposer, ids = algorithm.proposer(draft, tables), batch.input_ids.tolist()
    assert list(proposer.propose(ids[:5], {"last": batch.features["last"][:4]}, DraftRequest(3)).tokens) == ids[5:8]


def test_step_weights_sum_to_one():
    assert step_weights(3, 0.6).tolist() == pytest.approx([1 / 1.96, 0.6 / 1.96, 0.36 / 1.96])


def write_target(lab, directory, qk_norm, extra=None, **settings):
    layer = DecoderLayer(replace(CONFIG, qk_norm=qk_norm), qk_norm=qk_norm)
    weights = {f"model.layers.7.{name}": lab.random(*value.shape) for name, value in layer.state_dict().items()}
    weights |= {"model.norm.weight": lab.random(16), "model.layers.6.mlp.up_proj.weight": lab.random(2, 2)}
    save_file(weights | (extra or {}), directory / "model.safetensors")
    settings = {"num_hidden_layers": 8, "hidden_act": "silu"} | settings
    (directory / "config.json").write_text(json.dumps(settings))
    return weights


@pytest.mark.parametrize("qk_norm", [False, True])
def test_draft_starts_as_a_copy_of_the_targets_last_layer(lab, tmp_path, qk_norm):
    weights = write_target(lab, tmp_path, qk_norm)
    algorithm, config = Mtp(MtpOptions()), replace(CONFIG, qk_norm=qk_norm)
    tables = replace(lab.tables(), directory=tmp_path)
    state = algorithm.build_draft(config, tables, seed=0).served_state()
    for name in ("self_attn.k_proj.weight", "mlp.down_proj.weight", "post_attention_layernorm.weight"):
        assert torch.equal(state[f"mtp.layers.0.{name}"], weights[f"model.layers.7.{name}"])
    assert torch.equal(state["mtp.norm.weight"], weights["model.norm.weight"])
    assert ("mtp.layers.0.self_attn.q_norm.weight" in state) is qk_norm
    random = Mtp(MtpOptions(init_from_target=False)).build_draft(config, tables, seed=0).served_state()
    assert torch.equal(random["mtp.norm.weight"], torch.ones(16))
    assert torch.equal(random["mtp.fc.weight"], state["mtp.fc.weight"])


def test_layers_of_another_kind_are_refused(lab, tmp_path):
    bias = {"model.layers.7.self_attn.q_proj.bias": lab.random(32)}
    write_target(lab, tmp_path, False, bias)
    with pytest.raises(DraftError, match=r"self_attn.q_proj.bias is not expected"):
        last_layer(tmp_path)
    write_target(lab, tmp_path, False, hidden_act="gelu")
    with pytest.raises(DraftError, match=r"hidden_act is 'gelu'"):
        last_layer(tmp_path)
    write_target(lab, tmp_path, False, residual_multiplier=0.2)
    with pytest.raises(DraftError, match=r"residual_multiplier is 0.2"):
        last_layer(tmp_path)
    write_target(lab, tmp_path, False, num_hidden_layers=9)
    with pytest.raises(DraftError, match=r"expected tensors named \*layers.8.self_attn.q_proj.weight"):
        last_layer(tmp_path)
    write_target(lab, tmp_path, True)
    with pytest.raises(DraftError, match=r"k_norm.weight is nothing here and \[8\] there"):
        Mtp(MtpOptions()).build_draft(CONFIG, replace(lab.tables(), directory=tmp_path), seed=0)


def test_config_round_trip_sizes_and_refusals(lab):
    algorithm, draft, tables = setup(lab, qk_norm=True)
    assert MtpDraftConfig.from_dict(draft.config.to_dict()) == draft.config
    assert draft.config.num_parameters == sum(p.numel() for p in draft.parameters())
    assert algorithm.capture_spec(draft.config, "bfloat16").widths(16) == (("last", "bfloat16", 16),)
    with pytest.raises(ConfigError, match="target's own head"):
        algorithm.build_draft(CONFIG, tables, seed=0, kept_ids=torch.arange(4))
