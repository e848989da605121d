"""DFlash and D-PACE: alignment, masks, losses against their plain forms, and drafting equal to training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from specforge.algorithms.base import DraftRequest, Sampling, StepContext, TargetTables
from specforge.algorithms.dflash.algorithm import DFlash
from specforge.algorithms.dflash.config import DFlashDraftConfig, DFlashOptions
from specforge.algorithms.dflash.features import supervise
from specforge.algorithms.dflash.loss import dpace_weights
from specforge.algorithms.parts import losses
from specforge.algorithms.parts.block_attention import block_layout
from specforge.algorithms.parts.blocks import Blocks, sample_blocks, slot_embeddings
from specforge.contracts.batches import TrainBatch
from specforge.contracts.refs import Slot
from specforge.testing.block_reference import block_mask, dense_backbone

HIDDEN, VOCAB, BLOCK, MASK = 16, 30, 4, 29
CONFIG = DFlashDraftConfig(
    hidden_size=HIDDEN,
    target_hidden_size=HIDDEN,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=128,
    vocab_size=VOCAB,
    draft_vocab_size=VOCAB,
    aux_layers=(1, 4),
    target_num_layers=8,
    num_layers=2,
    block_size=BLOCK,
    mask_token_id=MASK,
    layer_types=("full_attention", "full_attention"),
)
SLIDING = replace(CONFIG, layer_types=("sliding_attention", "full_attention"), sliding_window=5)
CONTEXT = StepContext(global_step=0, total_steps=1, seed=5)
LOSS_TYPES = ["dflash", "dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"]


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.fixture
def tables(random) -> TargetTables:
    return TargetTables(
        torch.randn(VOCAB, HIDDEN, generator=random), torch.randn(VOCAB, HIDDEN, generator=random), logit_softcap=20.0
    )


def dflash(**options: object) -> DFlash:
    return DFlash(DFlashOptions(block_size=BLOCK, num_layers=2, **options))


def make_draft(tables, generator, config=CONFIG):
    """A draft whose weights are large enough for attention to matter."""
    draft = dflash().build_draft(config, tables, seed=0)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + (1.0 if "norm" in name else 0.0))
    return draft


def document(generator, length: int, answer_from: int) -> dict[str, torch.Tensor]:
    mask = torch.zeros(length, dtype=torch.bool)
    mask[answer_from:] = True
    return {
        "ids": torch.randint(0, VOCAB - 1, (length,), generator=generator),
        "mask": mask,
        "aux": torch.randn(length, 2 * HIDDEN, generator=generator),
    }


def pack(documents: list[dict[str, torch.Tensor]], names: list[str] | None = None) -> TrainBatch[torch.Tensor]:
    lengths = tuple(len(item["ids"]) for item in documents)
    names = names or [str(i) for i in range(len(documents))]

    def joined(key: str, empty: torch.Tensor) -> torch.Tensor:
        return torch.cat([empty, *(item[key] for item in documents)])

    none = torch.zeros(0, dtype=torch.int64)
    return TrainBatch(
        input_ids=joined("ids", none),
        loss_mask=joined("mask", none.bool()),
        position_ids=torch.cat([none, *(torch.arange(n) for n in lengths)]),
        document_ids=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
        features={"aux": joined("aux", torch.zeros(0, 2 * HIDDEN))},
        lengths=lengths,
        sample_ids=tuple(names),
        slots=tuple(Slot(0, i) for i in range(len(lengths))),
    )


def gradients(draft) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in draft.named_parameters()}
    draft.zero_grad()
    return found


def assert_same_gradients(mine, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=2e-4, atol=2e-5 * float(gradient.abs().max()), msg=name)


def dense_logits(draft, tables, batch, blocks) -> torch.Tensor:
    """[N, b, V]."""
    slots = slot_embeddings(tables.embed_tokens, batch.input_ids[blocks.anchors], BLOCK, MASK)
    states = dense_backbone(draft, slots, batch.features["aux"], blocks)
    logits = states @ tables.lm_head.T
    return (torch.tanh(logits / tables.logit_softcap) * tables.logit_softcap).view(-1, BLOCK, VOCAB)


def dense_loss(draft, tables, batch, blocks, options) -> tuple[torch.Tensor, float]:
    """Loss sum and divisor, one slot after the other as the formulas are."""
    logits, ends = dense_logits(draft, tables, batch, blocks), blocks.ends.tolist()
    total, divisor = torch.zeros(()), 0.0
    for i, anchor in enumerate(blocks.anchors.tolist()):
        places = [anchor + k if anchor + k < ends[i] and batch.loss_mask[anchor + k] else None for k in range(BLOCK)]
        entropies = [
            None if place is None else F.cross_entropy(logits[i, k], batch.input_ids[place])
            for k, place in enumerate(places)
        ]
        share = [1.0 if e is None else 0.5 * float(torch.exp(-e.detach())) + 0.5 for e in entropies]
        for k in range(1, BLOCK):
            if entropies[k] is None:
                continue
            reach = [float(torch.tensor(share[1 : u + 1]).prod()) for u in range(BLOCK)]
            rest = sum(reach[u] for u in range(k, BLOCK) if entropies[u] is not None)
            weight = {
                "dflash": float(torch.exp(torch.tensor(-(k - 1) / 4.0))),
                "dpace": rest,
                "dpace-cumulative-confidence-only": reach[k],
                "dpace-continuation-value-only": rest / reach[k],
            }[options.loss_type]
            total = total + weight * entropies[k]
            divisor += weight if options.loss_type == "dflash" else 1.0
    return total, divisor


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["full", "sliding"])
def test_loss_divisor_and_gradients_equal_the_dense_reference(random, tables, loss_type, config):
    algorithm, draft = (
        dflash(loss_type=loss_type, num_anchors=5, gamma=4.0 if loss_type == "dflash" else None),
        make_draft(tables, random, config),
    )
    batch = pack([document(random, n, start) for n, start in ((9, 3), (21, 10), (5, 5), (7, 0), (4, 2))])
    batch.loss_mask[14] = False
    output = algorithm.forward_loss(draft, tables, batch, CONTEXT)
    output.loss_sum.backward()
    mine = gradients(draft)
    blocks = sample_blocks(batch, CONTEXT, BLOCK, 5)
    assert blocks.num_blocks == 16
    expected, divisor = dense_loss(draft, tables, batch, blocks, algorithm.options)
    expected.backward()
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-5)
    assert algorithm.supervised_weight(batch, CONTEXT) == pytest.approx(divisor, rel=1e-6)
    assert_same_gradients(mine, gradients(draft))


def test_mask_is_that_of_the_worked_example():
    """Oracle 20."""
    batch = pack([{"ids": torch.zeros(8).long(), "mask": torch.ones(8).bool(), "aux": torch.zeros(8, 2 * HIDDEN)}])
    blocks = Blocks.at(torch.tensor([2, 5]), batch, 3)
    full = ["11000000 111000"] * 3 + ["11111000 000111"] * 3
    sliding = ["11000000 100000", "11000000 110000", "01000000 111000"]
    sliding += ["00111000 000100", "00011000 000110", "00001000 000111"]
    layout = block_layout(blocks, batch)
    for window, rows in ((None, full), (4, sliding)):
        expected = torch.tensor([[character == "1" for character in row.replace(" ", "")] for row in rows])
        assert torch.equal(block_mask(blocks, 8, window), expected)
        product = layout.visible(window, slice(0, 2), slice(0, 5)).expand(2, 3, 5).flatten(0, 1)
        assert torch.equal(product, expected[:, :5])


def test_labels_are_those_of_the_worked_example_and_the_first_slot_adds_nothing(random, tables):
    """Oracle 25."""
    item = document(random, 8, 0)
    batch = pack([item])
    supervision = supervise(Blocks.at(torch.tensor([2]), batch, 3), batch)
    assert supervision.labels.tolist() == [item["ids"][3:5].tolist()]
    assert supervision.mask.all()
    draft, blocks = make_draft(tables, random), Blocks.at(torch.tensor([2, 5]), batch, BLOCK)
    seen = []
    hook = draft.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    output = dflash().block_loss(draft, tables, batch, blocks)
    hook.remove()
    (gradient,) = torch.autograd.grad(output.loss_sum, seen)
    assert bool((gradient.view(2, BLOCK, HIDDEN)[:, 0] == 0).all())
    assert output.count.tolist() == [2, 2, 1]


def states(draft, tables, batch, anchors: list[int]) -> torch.Tensor:
    return draft.states(tables, batch, Blocks.at(torch.tensor(anchors), batch, BLOCK)).detach()


@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["full", "sliding"])
def test_a_block_does_not_depend_on_the_other_blocks(random, tables, config):
    """Oracle 21."""
    draft = make_draft(tables, random, config)
    batch = pack([document(random, 14, 0), document(random, 20, 0)])
    together = states(draft, tables, batch, [3, 7, 12, 15, 30])
    torch.testing.assert_close(states(draft, tables, batch, [7])[0], together[1], rtol=1e-5, atol=1e-5)
    permuted = states(draft, tables, batch, [12, 3, 7, 30, 15])
    torch.testing.assert_close(permuted, together[[2, 0, 1, 4, 3]], rtol=1e-5, atol=1e-5)


def test_a_block_sees_nothing_from_its_anchor_on_nor_of_other_documents(random, tables):
    """Oracle 22."""
    draft, first, second = make_draft(tables, random), document(random, 14, 0), document(random, 12, 0)
    before = states(draft, tables, pack([first, second]), [6, 19])
    first["aux"][6:], second["aux"][5:] = float("nan"), float("nan")
    first["ids"][7:], second["ids"][6:] = 1, 1
    after = torch.cat([states(draft, tables, pack([first]), [6]), states(draft, tables, pack([second]), [5])])
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config", [CONFIG, SLIDING, replace(SLIDING, sliding_window=2)], ids=["full", "sliding", "window below block"]
)
def test_drafting_with_a_cache_equals_the_training_forward_of_one_anchor(random, tables, config):
    """Oracle 23."""
    algorithm, draft, item = dflash(), make_draft(tables, random, config), document(random, 30, 0)
    proposer, ids, known = algorithm.proposer(draft, tables), item["ids"].tolist(), 0
    for last in (5, 6, 9, 17, 29):
        features = {"aux": item["aux"][known:last]}
        proposal = proposer.propose(ids[: last + 1], features, DraftRequest(num_proposals=3))
        logits = states(draft, tables, pack([item]), [last])[0] @ tables.lm_head.T
        assert proposal.tokens == tuple(logits[1:].argmax(-1).tolist())
        known = last


def test_sampled_slots_come_with_the_distributions_they_were_drawn_from(random, tables):
    algorithm, draft, item = dflash(), make_draft(tables, random), document(random, 9, 0)
    proposer = algorithm.proposer(draft, tables)
    sampling = Sampling(temperature=0.7, generator=torch.Generator().manual_seed(1), top_k=5)
    proposal = proposer.propose(item["ids"].tolist(), {"aux": item["aux"][:8]}, DraftRequest(2, sampling))
    assert proposal.probabilities is not None
    assert proposal.probabilities.shape == (2, VOCAB)
    torch.testing.assert_close(proposal.probabilities.sum(-1), torch.ones(2))
    assert all(proposal.probabilities[k, token] > 0 for k, token in enumerate(proposal.tokens))
    assert (proposal.probabilities > 0).sum(-1).tolist() == [5, 5]
    greedy = proposer.propose(item["ids"].tolist(), {"aux": item["aux"][:0]}, DraftRequest(9))
    assert len(greedy.tokens) == BLOCK - 1
    assert proposer.propose(item["ids"].tolist(), {"aux": item["aux"][:0]}, DraftRequest(0)).tokens == ()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_slots_without_a_label_add_nothing_and_stay_finite(random, tables, loss_type):
    """Oracle 24."""
    algorithm, draft = (
        dflash(loss_type=loss_type, gamma="uniform" if loss_type == "dflash" else None),
        make_draft(tables, random),
    )
    item = document(random, 8, 0)
    item["mask"][5] = False
    batch = pack([item])
    ends = Blocks.at(torch.tensor([0, 4, 7]), batch, BLOCK)
    output = algorithm.block_loss(draft, tables, batch, ends)
    output.loss_sum.backward()
    assert output.count.tolist() == [1, 2, 2]
    assert int(output.runs.sums()[1]) == 2
    assert bool(output.loss_sum.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(draft).values())


@pytest.mark.parametrize("loss_type", LOSS_TYPES[:2])
def test_a_batch_without_supervision_gives_zeros_that_reach_every_parameter(random, tables, loss_type):
    algorithm, draft = dflash(loss_type=loss_type), make_draft(tables, random)
    silent = document(random, 6, 6)
    reference = algorithm.forward_loss(draft, tables, pack([document(random, 6, 0)]), CONTEXT)
    for batch in (pack([]), pack([silent])):
        output = algorithm.forward_loss(draft, tables, batch, CONTEXT)
        output.loss_sum.backward()
        assert float(output.loss_sum.detach()) == 0.0
        assert all(bool((gradient == 0).all()) for gradient in gradients(draft).values())
        assert output.count.tolist() == [0] * (BLOCK - 1)
        assert output.metrics.keys() == reference.metrics.keys()
        assert algorithm.supervised_weight(batch, CONTEXT) == 0.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, random, tables, loss_type):
    """Oracle 27."""
    algorithm, draft = dflash(loss_type=loss_type), make_draft(tables, random)
    batch = pack([document(random, 40, 2), document(random, 33, 5)])
    whole = algorithm.forward_loss(draft, tables, batch, CONTEXT)
    whole.loss_sum.backward()
    expected = gradients(draft)
    monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", 7)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", {"cpu": 1, "cuda": 1})
    chunked = algorithm.forward_loss(draft, tables, batch, CONTEXT)
    chunked.loss_sum.backward()
    torch.testing.assert_close(chunked.loss_sum, whole.loss_sum, rtol=1e-6, atol=0)
    assert torch.equal(chunked.correct, whole.correct)
    assert_same_gradients(gradients(draft), expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_samples_one_by_one_give_the_sums_and_gradients_of_one_batch(random, tables, loss_type):
    """Oracle 28."""
    algorithm, draft = dflash(loss_type=loss_type, num_anchors=4), make_draft(tables, random)
    documents = [document(random, n, n // 3) for n in (8, 40, 17, 3, 64, 21)]
    whole = algorithm.forward_loss(draft, tables, pack(documents), CONTEXT)
    (whole.loss_sum / algorithm.supervised_weight(pack(documents), CONTEXT)).backward()
    expected = gradients(draft)
    parts = [pack(documents[:1], ["0"]), pack(documents[1:4], ["1", "2", "3"]), pack(documents[4:], ["4", "5"])]
    divisor = sum(algorithm.supervised_weight(part, CONTEXT) for part in parts)
    outputs = [algorithm.forward_loss(draft, tables, part, CONTEXT) for part in parts]
    for output in outputs:
        (output.loss_sum / divisor).backward()
    assert_same_gradients(gradients(draft), expected)
    assert torch.equal(torch.stack([output.correct for output in outputs]).sum(0), whole.correct)
    assert sum(int(output.runs.sums()[0]) for output in outputs) == int(whole.runs.sums()[0])


def test_dpace_weights_without_confidence_count_the_slots_that_follow():
    """Oracle 30."""
    entropy = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).float()
    counted = dpace_weights(entropy.detach(), valid, "dpace", 1.0)
    assert counted.tolist() == [[5, 4, 3, 2, 1], [3, 0, 2, 1, 0], [0, 0, 0, 0, 0]]
    assert torch.equal(dpace_weights(entropy.detach(), valid, "dpace-cumulative-confidence-only", 1.0), valid)
    both, reach, value = (dpace_weights(entropy.detach(), valid, kind, 0.5) for kind in LOSS_TYPES[1:])
    torch.testing.assert_close(both, reach * value)


def test_no_gradient_flows_through_the_weights_of_dpace(random, tables):
    """Oracle 30."""
    algorithm, draft = dflash(loss_type="dpace"), make_draft(tables, random)
    batch = pack([document(random, 20, 4)])
    blocks = sample_blocks(batch, CONTEXT, BLOCK, 512)
    algorithm.block_loss(draft, tables, batch, blocks).loss_sum.backward()
    mine = gradients(draft)
    supervision = supervise(blocks, batch)
    logits = dense_logits(draft, tables, batch, blocks)[:, 1:]
    entropy = F.cross_entropy(logits.flatten(0, 1), supervision.labels.flatten(), reduction="none")
    entropy = entropy.view_as(supervision.labels)
    weights = dpace_weights(entropy.detach(), supervision.mask.float(), "dpace", 0.5)
    (weights * entropy).sum().backward()
    assert_same_gradients(mine, gradients(draft))


def test_weights_of_long_blocks_with_hopeless_slots_stay_finite():
    entropy, valid = torch.full((1, 63), 80.0), torch.ones(1, 63)
    for alpha in (0.0, 0.5):
        weights = dpace_weights(entropy, valid, "dpace-continuation-value-only", alpha)
        assert bool(weights.isfinite().all())
        assert bool((weights >= 1).all())


def test_a_single_sample_is_learned_and_then_drafted(random, tables):
    """Oracle 51."""
    algorithm = dflash(num_anchors=64, gamma="uniform")
    draft, item = algorithm.build_draft(CONFIG, tables, seed=1), document(random, 24, 3)
    batch = pack([item])
    optimizer = torch.optim.AdamW(draft.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        output = algorithm.forward_loss(draft, tables, batch, CONTEXT)
        (output.loss_sum / algorithm.supervised_weight(batch, CONTEXT)).backward()
        optimizer.step()
    assert float((output.correct / output.count).min()) > 0.95
    proposer, ids = algorithm.proposer(draft, tables), item["ids"].tolist()
    proposal = proposer.propose(ids[:11], {"aux": item["aux"][:10]}, DraftRequest(num_proposals=3))
    assert proposal.tokens == tuple(ids[11:14])


def test_number_of_parameters_is_that_of_the_draft(random, tables):
    draft = make_draft(tables, random)
    assert CONFIG.num_parameters == sum(parameter.numel() for parameter in draft.parameters())
    assert set(draft.served_state()) == set(draft.state_dict())
