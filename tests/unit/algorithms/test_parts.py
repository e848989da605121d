"""The shared parts against independent forms."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specforge.algorithms.base import target_logits
from specforge.algorithms.parts.attention import packed_layout, unrolled_attention
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.rotary import Rotary, rotate
from specforge.algorithms.parts.tables import load_target_tables
from specforge.algorithms.parts.vocabulary import kept_ids, target_ids, vocabulary_maps
from specforge.errors import ConfigError, TargetError
from specforge.testing.unrolled_reference import unroll_mask

SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_scalings_equal_the_targets(kind):
    scaling = {"rope_type": kind, **SCALINGS[kind]}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 1e4, **scaling},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    mine = Rotary(32, 1e4, scaling, 256)
    torch.testing.assert_close(torch.tensor(mine.inverse_frequencies), expected, rtol=1e-6, atol=1e-9)
    assert mine.attention_factor == pytest.approx(factor)


def test_unknown_rotary_scaling_is_refused_by_name():
    with pytest.raises(TargetError, match=r"'dynamic'.*supported types are default, linear, llama3, yarn"):
        Rotary(8, 1e4, {"type": "dynamic", "factor": 2.0}, 64)
    with pytest.raises(TargetError, match="lacks 'factor'"):
        Rotary(8, 1e4, {"rope_type": "linear"}, 64)


def test_rotation_depends_on_the_difference_of_positions_only():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 8, generator=generator) for _ in range(2))
    rotary = Rotary(8, 1e4, None, 64)
    scores = [(rotate(q, *rotary(torch.tensor([i + 5]))) * rotate(k, *rotary(torch.tensor([i])))).sum() for i in (0, 9)]
    torch.testing.assert_close(scores[0], scores[1])


def test_rotation_and_norm_have_the_gradients_of_their_formulas():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda t: rotate(t, cos, sin), x)
    norm = RMSNorm(8, 1e-6)
    y = torch.randn(5, 8, generator=generator, requires_grad=True)
    plain = norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    upstream = torch.randn(5, 8, generator=generator)
    expected = torch.autograd.grad(plain, (y, norm.weight), upstream)
    torch.testing.assert_close(norm(y), plain)
    torch.testing.assert_close(torch.autograd.grad(norm(y), (y, norm.weight), upstream), expected)


@pytest.mark.parametrize("step", [0, 3])
def test_unrolled_attention_and_its_gradients_equal_a_dense_mask(step):
    generator = torch.Generator().manual_seed(0)
    lengths, heads, groups, size = (5, 33, 1, 17, 18), 4, 2, 8
    num_tokens = sum(lengths)
    documents = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    rows = torch.tensor([0, 3, 4, 10, 11, 37, 39, 40, 50, 55, 56, 57])

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, requires_grad=True)

    queries, context = leaf(num_tokens, heads, size), (leaf(num_tokens, groups, size), leaf(num_tokens, groups, size))
    own = [(leaf(num_tokens, groups, size), leaf(num_tokens, groups, size)) for _ in range(step)]
    layout = packed_layout(lengths, rows)
    mine = unrolled_attention(layout, queries[rows], context, [(k[rows], v[rows]) for k, v in own])
    keys = torch.cat([context[0], *(k for k, _ in own)]).repeat_interleave(2, 1)
    values = torch.cat([context[1], *(v for _, v in own)]).repeat_interleave(2, 1)
    scores = torch.einsum("qhd,chd->hqc", queries, keys) * size**-0.5
    weights = torch.softmax(scores.masked_fill(~unroll_mask(documents, step), float("-inf")), -1)
    dense = torch.einsum("hqc,chd->qhd", weights, values)[rows]
    torch.testing.assert_close(mine, dense)
    leaves = [queries, *context, *(tensor for pair in own for tensor in pair)]
    upstream = torch.randn(mine.shape, generator=generator)
    expected = torch.autograd.grad(dense, leaves, upstream)
    for got, want in zip(torch.autograd.grad(mine, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_attention_pads_documents_only_to_documents_of_similar_length():
    lengths = (4,) * 60 + (1024,)
    layout = packed_layout(lengths, torch.arange(sum(lengths)))
    assert sum(group.bias.numel() for group in layout.groups) == 60 * 4 * 4 + 1024 * 1024


def test_vocabulary_maps_of_the_worked_example():
    counts = torch.zeros(12, dtype=torch.int64)
    counts[[3, 7, 1, 9, 4]] = torch.tensor([5, 9, 2, 1, 5])
    assert kept_ids(counts, 4).tolist() == [1, 3, 4, 7]
    assert vocabulary_maps(kept_ids(counts, 4), 12)[0].tolist() == [1, 2, 2, 4]
    assert kept_ids(counts, 7).tolist() == [0, 1, 2, 3, 4, 7, 9]


def test_ties_of_counts_go_to_the_lower_id():
    assert kept_ids(torch.tensor([1, 3, 3, 3, 2]), 2).tolist() == [1, 2]


def test_vocabulary_maps_are_inverse_to_each_other():
    """Oracle 15. Also the round trip of draft ids."""
    generator = torch.Generator().manual_seed(0)
    kept = kept_ids(torch.randint(0, 9, (200,), generator=generator), 57)
    d2t, t2d = vocabulary_maps(kept, 200)
    assert torch.equal(t2d.nonzero().squeeze(-1), torch.arange(57) + d2t)
    assert torch.equal(target_ids(d2t), kept)
    draft_of = torch.cumsum(t2d, 0) - 1
    assert torch.equal(draft_of[target_ids(d2t)], torch.arange(57))


def test_bad_kept_ids_and_sizes_are_refused():
    for kept in ([3, 1], [1, 1], [0, 12], []):
        with pytest.raises(ConfigError, match="strictly ascending ids below 12"):
            vocabulary_maps(torch.tensor(kept, dtype=torch.int64), 12)
    with pytest.raises(ConfigError, match="between 1 and the target's vocabulary of 5, got 6"):
        kept_ids(torch.ones(5, dtype=torch.int64), 6)


def write_target(root, config, tensors, shards=False):
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(tensors, root / "model.safetensors")
        return root
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, root / f"part{i}.safetensors")
    index = {"weight_map": {name: f"part{i}.safetensors" for i, name in enumerate(tensors)}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return root


@pytest.mark.parametrize("shards", [False, True])
def test_tables_are_read_from_one_file_or_many(tmp_path, shards):
    embedding, head = torch.randn(6, 4).bfloat16(), torch.randn(6, 4).bfloat16()
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(4)}
    root = write_target(tmp_path / "t", {"tie_word_embeddings": False}, tensors, shards)
    tables = load_target_tables(root)
    assert torch.equal(tables.embed_tokens, embedding.float())
    assert torch.equal(tables.lm_head, head.float())
    assert load_target_tables(root, dtype=torch.bfloat16).lm_head.dtype is torch.bfloat16


def test_a_tied_head_is_the_embedding(tmp_path):
    root = write_target(tmp_path / "t", {"tie_word_embeddings": True}, {"model.embed_tokens.weight": torch.randn(6, 4)})
    tables = load_target_tables(root)
    assert tables.lm_head is tables.embed_tokens


def test_soft_cap_scale_and_bias_are_part_of_the_teacher(tmp_path):
    tensors = {
        "model.embed_tokens.weight": torch.randn(6, 4),
        "lm_head.weight": torch.randn(6, 4),
        "lm_head.bias": torch.randn(6),
    }
    config = {"text_config": {"final_logit_softcapping": 5.0, "logit_scale": 0.25, "tie_word_embeddings": False}}
    tables, last = load_target_tables(write_target(tmp_path / "t", config, tensors)), torch.randn(3, 4)
    raw = (last @ tensors["lm_head.weight"].T + tensors["lm_head.bias"]) * 0.25
    torch.testing.assert_close(target_logits(tables, last), 5.0 * torch.tanh(raw / 5.0))


def test_targets_that_cannot_be_used_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(TargetError, match=r"has no config.json"):
        load_target_tables(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetError, match=r"has no weights: expected model.safetensors"):
        load_target_tables(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(TargetError, match="pickled weights only"):
        load_target_tables(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(TargetError, match="cannot be read"):
        load_target_tables(tmp_path)
    root = write_target(
        tmp_path / "t", {"tie_word_embeddings": False}, {"model.embed_tokens.weight": torch.randn(6, 4)}
    )
    with pytest.raises(TargetError, match="has no output head"):
        load_target_tables(root)
