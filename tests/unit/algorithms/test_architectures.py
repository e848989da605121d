"""Draft architectures as an axis of their own, and multi-head latent attention."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from specforge.algorithms.eagle3.features import plan_unroll
from specforge.algorithms.eagle3.loss import unroll
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts import architectures
from specforge.algorithms.parts.architectures import Llama, draft_architecture, draft_architectures, register_draft
from specforge.algorithms.parts.attention import packed_layout, unrolled_attention
from specforge.algorithms.parts.mla import half_rotated, interleaved
from specforge.algorithms.parts.projections import GroupedQueryAttention
from specforge.errors import ConfigError, DraftError
from specforge.testing.samples import SMALL_TARGET
from specforge.testing.unrolled_reference import DenseInputs, dense_unroll, unroll_mask

YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5}
MLA = {
    "architecture": "mla",
    "num_key_value_heads": 4,
    "head_dim": 10,
    "q_lora_rank": 12,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
TARGET = dataclasses.replace(SMALL_TARGET, hidden_size=64, intermediate_size=48)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mla"])
def test_every_architecture_counts_and_names_its_weights(eagle3, architecture):
    config = eagle3(architecture=architecture, draft_vocab_size=16).draft_config(TARGET)
    draft = Eagle3Draft(config, torch.arange(16))
    assert sum(p.numel() for p in draft.parameters()) == config.num_parameters
    built = {name: tuple(p.shape) for name, p in draft.midlayer.self_attn.named_parameters()}
    assert built == draft_architecture(architecture).shapes(config, 2 * config.hidden_size)


def test_latent_attention_has_the_served_names_and_deepseeks_sizes_for_large_targets(eagle3):
    large = dataclasses.replace(TARGET, hidden_size=7168, num_attention_heads=64, num_key_value_heads=64, head_dim=64)
    config = eagle3(architecture="mla").draft_config(large)
    assert draft_architecture("mla").shapes(config, 2 * 7168) == {
        "q_a_proj.weight": (1536, 14336),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (64 * 192, 1536),
        "kv_a_proj_with_mqa.weight": (576, 14336),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (64 * 256, 512),
        "o_proj.weight": (7168, 64 * 128),
    }
    assert (config.head_dim, config.num_key_value_heads) == (192, 64)
    assert type(config).from_dict(config.to_dict()) == config


def test_options_size_the_latent_attention_and_refuse_sizes_that_it_does_not_have(eagle3):
    options = {"q_lora_rank": 20, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 7}
    config = eagle3(architecture="mla", **options).draft_config(TARGET)
    assert {name: getattr(config, name) for name in options} == options
    with pytest.raises(ConfigError, match="set qk_nope_head_dim"):
        eagle3(architecture="mla", head_dim=8).draft_config(TARGET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 3}, "even qk_rope"),
        ({"head_dim": 8}, "got 8 and"),
        ({"v_head_dim": None}, "needs v_head_dim"),
    ],
)
def test_inconsistent_sizes_of_latent_attention_are_refused(lab, eagle3, changes, message):
    with pytest.raises(DraftError, match=message):
        lab.draft(eagle3(), lab.tables(), **{**MLA, **changes})


def plain_latent_attention(draft, inputs: torch.Tensor) -> torch.Tensor:
    """[T, H] after o_proj, from ``inputs`` [T, 2H] of one document, written as DeepSeek's own code computes it: weights
    in the order of its checkpoints, neighbouring dimensions turned as complex numbers, one head at a time.
    """
    config, weights = draft.config, interleaved(draft.midlayer.self_attn.state_dict(), draft.config)
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    frequencies = torch.tensor(draft.midlayer.self_attn.rotary.inverse_frequencies, dtype=torch.float64)
    angles = torch.arange(len(inputs), dtype=torch.float64)[:, None] * frequencies

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(x):
        factor = draft.midlayer.self_attn.rotary.attention_factor
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.full_like(angles, factor), angles
        )
        return torch.view_as_real(pairs).flatten(-2)

    weights = {name: weight.double() for name, weight in weights.items()}
    queries = (
        norm(inputs @ weights["q_a_proj.weight"].T, weights["q_a_layernorm.weight"]) @ weights["q_b_proj.weight"].T
    )
    compressed = inputs @ weights["kv_a_proj_with_mqa.weight"].T
    latent = norm(compressed[:, : config.kv_lora_rank], weights["kv_a_layernorm.weight"])
    expanded, shared = latent @ weights["kv_b_proj.weight"].T, turn(compressed[:, config.kv_lora_rank :])
    scale = (nope + rope) ** -0.5
    if config.rope_scaling is not None:
        scale *= (0.1 * config.rope_scaling["mscale_all_dim"] * math.log(config.rope_scaling["factor"]) + 1.0) ** 2
    outputs = []
    for head in range(config.num_attention_heads):
        query = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        key_value = expanded[:, head * (nope + value) : (head + 1) * (nope + value)]
        scores = query[:, :nope] @ key_value[:, :nope].T + turn(query[:, nope:]) @ shared.T
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        outputs.append(torch.softmax((scores * scale).masked_fill(hidden, -torch.inf), -1) @ key_value[:, nope:])
    return torch.cat(outputs, dim=-1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("scaling", [None, YARN])
def test_latent_attention_equals_deepseeks_own_form(lab, pack, eagle3, scaling):
    algorithm, tables, length = eagle3(), lab.tables(), 14
    draft = lab.draft(algorithm, tables, **MLA, rope_scaling=scaling)
    batch = pack([lab.document(length)])
    plan, _ = plan_unroll(batch, torch.ones(1, length, dtype=torch.bool))
    with torch.no_grad():
        got = unroll(draft, tables, batch, plan)[0]
        layer, hidden = draft.midlayer, draft.fuse(batch.features["aux"])
        embedded = tables.embed_tokens[torch.cat((batch.input_ids[1:], batch.input_ids.new_zeros(1)))]
        inputs = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), dim=-1).double()
        residual = hidden + plain_latent_attention(draft, inputs).float()
        expected = draft.norm(residual + layer.mlp(layer.post_attention_layernorm(residual)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_every_step_of_the_latent_unroll_and_its_gradients_equal_a_dense_mask(lab, pack, eagle3):
    algorithm, tables, num_steps = eagle3(), lab.tables(), 3
    draft = lab.draft(algorithm, tables, **MLA, rope_scaling=YARN)
    batch = pack([lab.document(9), lab.document(4)])
    plan, _ = plan_unroll(batch, torch.ones(num_steps, 13, dtype=torch.bool))
    ids = torch.cat((batch.input_ids, batch.input_ids.new_zeros(1)))
    inputs = DenseInputs(
        batch.features["aux"], tables.embed_tokens, ids[plan.tokens], batch.position_ids, batch.document_ids
    )
    got = torch.stack([draft.lm_head(readout) for readout in unroll(draft, tables, batch, plan)])
    expected = torch.stack(dense_unroll(draft, inputs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    upstream, parameters = lab.random(*got.shape), list(draft.parameters())
    found, wanted = (torch.autograd.grad(logits, parameters, upstream) for logits in (got, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-4)


def test_served_order_of_rotated_rows_survives_a_round_trip(lab, eagle3):
    draft = lab.draft(eagle3(), lab.tables(), **MLA)
    state = draft.served_state()
    served = interleaved(state, draft.config)
    changed = {name for name in state if not torch.equal(state[name], served[name])}
    assert changed == {
        "midlayer.self_attn.q_b_proj.weight",
        "midlayer.self_attn.kv_a_proj_with_mqa.weight",
    }
    back = half_rotated(served, draft.config)
    assert all(torch.equal(state[name], back[name]) for name in state)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("value_size", [3, 8, 11])
def test_values_may_be_narrower_or_wider_than_keys(step, value_size):
    generator = torch.Generator().manual_seed(0)
    lengths, heads, groups, size = (5, 33, 1, 17), 4, 2, 8
    num_tokens = sum(lengths)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    rows = torch.tensor([0, 3, 4, 10, 11, 37, 39, 40, 50, 55])

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, requires_grad=True)

    def pair():
        return leaf(num_tokens, groups, size), leaf(num_tokens, groups, value_size)

    queries, context, own = leaf(num_tokens, heads, size), pair(), [pair() for _ in range(step)]
    mine = unrolled_attention(
        packed_layout(lengths, rows), queries[rows], context, [(k[rows], v[rows]) for k, v in own]
    )
    keys = torch.cat([context[0], *(k for k, _ in own)]).repeat_interleave(2, 1)
    values = torch.cat([context[1], *(v for _, v in own)]).repeat_interleave(2, 1)
    scores = torch.einsum("qhd,chd->hqc", queries, keys) * size**-0.5
    weights = torch.softmax(scores.masked_fill(~unroll_mask(documents, step), float("-inf")), -1)
    dense = torch.einsum("hqc,chd->qhd", weights, values)[rows]
    torch.testing.assert_close(mine, dense)
    leaves = [queries, *context, *(tensor for both in own for tensor in both)]
    upstream = torch.randn(mine.shape, generator=generator)
    expected = torch.autograd.grad(dense, leaves, upstream)
    for got, want in zip(torch.autograd.grad(mine, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_weight_of_latent_attention(lab, pack, eagle3, run_loss, gradients):
    algorithm, tables = eagle3(ttt_steps=3), lab.tables()
    draft = lab.draft(algorithm, tables, **MLA, rope_scaling=YARN)
    run_loss(algorithm, draft, tables, pack([lab.document(11), lab.document(7)])).loss_sum.backward()
    found = gradients(draft)
    assert all(
        bool(found[f"midlayer.self_attn.{name}"].any()) for name in dict(draft.midlayer.self_attn.named_parameters())
    )


class DoubledHeads(GroupedQueryAttention):
    """An attention of a third party."""

    def queries(self, projected, angles):
        return 2.0 * super().queries(projected, angles)


@pytest.fixture
def third_party(monkeypatch):
    """An architecture that is gone after the test."""
    monkeypatch.setattr(architectures, "_registered", dict(architectures._registered))

    @register_draft("doubled")
    class Doubled(Llama):
        attention = f"{__name__}:DoubledHeads"

    return Doubled


@pytest.mark.usefixtures("third_party")
def test_a_third_partys_architecture_trains_and_drafts_alike(lab, pack, eagle3):
    algorithm, tables, length = eagle3(), lab.tables(), 9
    draft = lab.draft(algorithm, tables, architecture="doubled")
    batch = pack([lab.document(length)])
    plan, _ = plan_unroll(batch, torch.ones(2, length, dtype=torch.bool))
    with torch.no_grad():
        first, second = (draft.lm_head(readout) for readout in unroll(draft, tables, batch, plan))
    ids, proposer = batch.input_ids.tolist(), algorithm.proposer(draft, tables)
    torch.testing.assert_close(proposer.append_true_rows(batch.features["aux"][:6], ids[1:7]), first[5])
    torch.testing.assert_close(proposer.speculate(ids[7]), second[5])


@pytest.mark.usefixtures("third_party")
def test_a_name_that_is_taken_and_weights_that_are_not_as_promised_are_refused(lab, eagle3):
    with pytest.raises(ConfigError, match=r"'llama' of .* is taken by"):
        register_draft("llama")(Llama)

    @register_draft("torn")
    class Torn(Llama):
        def shapes(self, config, input_size):
            return {name: shape for name, shape in super().shapes(config, input_size).items() if "o_proj" not in name}

    with pytest.raises(DraftError, match="'torn' names the weights"):
        lab.draft(eagle3(), lab.tables(), architecture="torn")


def test_an_unknown_architecture_is_refused_with_those_that_exist(eagle3):
    with pytest.raises(ConfigError, match="no draft architecture 'lama'; expected one of llama, qwen3, mla"):
        eagle3(architecture="lama").draft_config(TARGET)
    assert draft_architectures()[:3] == ("llama", "qwen3", "mla")


def test_the_registry_loads_no_tensor_library():
    code = "import sys, specforge.algorithms.parts.architectures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
