"""Which blocks are drawn, which tokens their slots stand for, how they are measured, and what options make of them."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from specforge.algorithms.base import StepContext
from specforge.algorithms.parts.block_config import BlockDraftConfig, BlockOptions, default_block_layers
from specforge.algorithms.parts.blocks import Blocks, block_output, sample_blocks, slot_embeddings, slot_tokens
from specforge.contracts.batches import TrainBatch
from specforge.contracts.refs import Slot
from specforge.errors import ConfigError, DraftError
from specforge.testing.samples import SMALL_TARGET

TARGET = replace(SMALL_TARGET, num_layers=36)


def packed(masks: list[str], names: str = "abcdefgh") -> TrainBatch[torch.Tensor]:
    lengths = tuple(len(mask) for mask in masks)
    total = sum(lengths)
    return TrainBatch(
        input_ids=torch.arange(100, 100 + total),
        loss_mask=torch.tensor([character == "1" for character in "".join(masks)], dtype=torch.bool),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        document_ids=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        features={},
        lengths=lengths,
        sample_ids=tuple(names[: len(masks)]),
        slots=tuple(Slot(0, i) for i in range(len(masks))),
    )


def at(seed: int = 0) -> StepContext:
    return StepContext(global_step=3, total_steps=10, seed=seed)


def test_anchors_are_tokens_of_an_answer_followed_by_another_in_the_same_document():
    blocks = sample_blocks(packed(["0011101", "1100", "0000", "1"]), at(), 4, 512)
    assert blocks.anchors.tolist() == [2, 3, 7]
    assert blocks.starts.tolist() == [0, 0, 7]
    assert blocks.ends.tolist() == [7, 7, 11]


def test_the_draw_of_a_sample_does_not_depend_on_what_it_is_packed_with():
    masks = ["0" + "1" * 40, "1" * 30, "00" + "1" * 50]
    together = sample_blocks(packed(masks), at(), 4, 6)
    start, alone = 0, []
    for index, mask in enumerate(masks):
        anchors = sample_blocks(packed([mask], "abc"[index]), at(), 4, 6).anchors
        assert anchors.numel() == 6
        assert bool((anchors[1:] > anchors[:-1]).all())
        alone.append(anchors + start)
        start += len(mask)
    assert torch.equal(together.anchors, torch.cat(alone))


def test_the_draw_changes_with_seed_and_epoch_and_not_with_the_step():
    batch = packed(["1" * 200])
    first = sample_blocks(batch, at(), 4, 8).anchors
    other_epoch = replace(batch, slots=(Slot(1, 0),))
    assert torch.equal(first, sample_blocks(batch, StepContext(7, 10, 0), 4, 8).anchors)
    assert not torch.equal(first, sample_blocks(batch, at(1), 4, 8).anchors)
    assert not torch.equal(first, sample_blocks(other_epoch, at(), 4, 8).anchors)


def test_every_candidate_is_drawn_about_equally_often():
    batch = packed(["1" * 11])
    counts = torch.zeros(11)
    for seed in range(400):
        counts[sample_blocks(batch, at(seed), 4, 3).anchors] += 1
    assert counts[10] == 0
    assert 80 < float(counts[:10].min()) <= float(counts[:10].max()) < 160


def test_slots_outside_the_document_are_clamped_and_marked():
    batch = packed(["1111", "11111"])
    blocks = Blocks.at(torch.tensor([2, 4]), batch, 3)
    index, inside = slot_tokens(blocks, 1)
    assert index.tolist() == [[3, 3, 3], [5, 6, 7]]
    assert inside.tolist() == [[True, False, False], [True, True, True]]
    index, inside = slot_tokens(blocks, -1)
    assert index.tolist() == [[1, 2, 3], [4, 4, 5]]
    assert inside.tolist() == [[True, True, True], [False, True, True]]


def test_first_slot_holds_the_anchor_and_the_others_the_mask():
    table = torch.arange(10.0)[:, None]
    assert slot_embeddings(table, torch.tensor([4, 7]), 3, 9).flatten().tolist() == [4, 9, 9, 7, 9, 9]


def test_run_stops_at_a_wrong_and_at_an_invalid_slot():
    correct = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    valid = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    anchors = torch.tensor([3, 5, 7, 9])
    right, count, runs = block_output(Blocks(anchors, anchors * 0, anchors + 9, 5), correct, valid)
    assert right.tolist() == [2, 2, 2, 3]
    assert count.tolist() == [3, 2, 3, 3]
    assert runs.anchors.tolist() == [3, 5, 7]
    assert runs.lengths.tolist() == [2, 1, 0]
    assert [int(x) for x in runs.sums()] == [3 + 2 + 1, 3]


def test_default_layers_round_half_to_even():
    assert default_block_layers(36, 5) == (1, 9, 17, 25, 33)
    assert default_block_layers(28, 6) == (1, 6, 11, 15, 20, 25)
    assert default_block_layers(24, 1) == (12,)


def fields(**options: object) -> dict[str, object]:
    return BlockOptions(**options).block_fields(TARGET, "DFlash")


def test_options_become_a_config_and_back():
    config = BlockDraftConfig(**fields(layer_types=["sliding_attention"] * 4 + ["full_attention"], sliding_window=8))
    assert config.aux_layers == (1, 9, 17, 25, 33)
    assert config.mask_token_id == TARGET.vocab_size - 1
    assert config.windows() == (8, 8, 8, 8, None)
    assert BlockDraftConfig.from_dict(config.to_dict()) == config


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="mask_token_id must be a row"):
        fields(mask_token_id=40)
    with pytest.raises(ConfigError, match="the default of DFlash"):
        BlockOptions().block_fields(replace(TARGET, num_layers=6), "DFlash")
    with pytest.raises(ValidationError, match="sliding_window belongs"):
        BlockOptions(sliding_window=4)
    with pytest.raises(ValidationError, match="an entry for each of 5 layers"):
        BlockOptions(layer_types=["full_attention"])
    with pytest.raises(DraftError, match="needs sliding_window"):
        BlockDraftConfig(**fields() | {"layer_types": ("sliding_attention",) * 5})


def test_decay_follows_the_block_size_unless_it_is_set():
    assert BlockOptions(block_size=16).slot_weights(3) == BlockOptions(gamma=7.0).slot_weights(3)
    assert BlockOptions(block_size=10).slot_weights(3) == BlockOptions(gamma=5.0).slot_weights(3)
    assert BlockOptions(block_size=8).slot_weights(3) == BlockOptions(gamma=4.0).slot_weights(3)
    restored = BlockOptions.model_validate_json(BlockOptions(gamma="uniform").model_dump_json())
    assert restored.slot_weights(3) == (1.0, 1.0, 1.0)


def test_infinite_decay_equals_no_decay():
    """Oracle 26."""
    huge = BlockOptions(gamma=1e30).slot_weights(15)
    assert huge == BlockOptions(gamma="uniform").slot_weights(15)


def test_masked_slots_default_to_a_row_that_no_text_uses():
    with_tokenizer = replace(TARGET, num_tokens=TARGET.vocab_size - 3)
    assert BlockOptions().block_fields(replace(with_tokenizer, mask_token_id=5), "DFlash")["mask_token_id"] == 5
    assert BlockOptions().block_fields(with_tokenizer, "DFlash")["mask_token_id"] == TARGET.vocab_size - 3
    full = replace(TARGET, num_tokens=TARGET.vocab_size)
    assert BlockOptions().block_fields(full, "DFlash")["mask_token_id"] == TARGET.eos_token_ids[0]
    for unknown in (replace(full, eos_token_ids=()), replace(TARGET, num_tokens=None)):
        assert BlockOptions().block_fields(unknown, "DFlash")["mask_token_id"] == TARGET.vocab_size - 1
