"""Attention of blocks: strips and the block-sparse form against one dense mask."""

import pytest
import torch

from specforge.algorithms.parts import block_attention as module
from specforge.algorithms.parts.block_attention import block_attention, block_layout, tile_attention
from specforge.algorithms.parts.blocks import Blocks
from specforge.contracts.batches import TrainBatch
from specforge.contracts.refs import Slot
from specforge.testing.block_reference import block_mask, dense_block_attention

HEADS, GROUPS, SIZE = 4, 2, 8


def packed(*lengths: int) -> TrainBatch[torch.Tensor]:
    total = sum(lengths)
    return TrainBatch(
        input_ids=torch.zeros(total, dtype=torch.int64),
        loss_mask=torch.ones(total, dtype=torch.bool),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        document_ids=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        features={},
        lengths=lengths,
        sample_ids=tuple(str(i) for i in range(len(lengths))),
        slots=tuple(Slot(0, i) for i in range(len(lengths))),
    )


def operands(num_tokens: int, num_rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(num_rows, HEADS), (num_tokens, GROUPS), (num_tokens, GROUPS), (num_rows, GROUPS), (num_rows, GROUPS)]
    return [torch.randn(*shape, SIZE, generator=generator, requires_grad=True) for shape in shapes]


def attend(blocks, batch, tensors, window, attention=block_attention):
    queries, keys, values, own_keys, own_values = tensors
    layout = block_layout(blocks, batch)
    context = keys.index_select(0, layout.context), values.index_select(0, layout.context)
    return attention(layout, queries, context, (own_keys, own_values), window)


def dense(blocks, batch, tensors, window):
    queries, keys, values, own_keys, own_values = tensors
    mask = block_mask(blocks, batch.input_ids.numel(), window)
    return dense_block_attention(mask, queries, (keys, values), (own_keys, own_values))


ANCHORS = [0, 3, 7, 8, 10, 24, 30, 39]
LENGTHS = (9, 4, 11, 16)


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("strip_rows", [3, 256])
def test_strips_equal_the_dense_mask_forward_and_backward(monkeypatch, window, strip_rows):
    monkeypatch.setattr(module, "STRIP_ROWS", strip_rows)
    batch = packed(*LENGTHS)
    blocks = Blocks.at(torch.tensor(ANCHORS), batch, 3)
    tensors = operands(sum(LENGTHS), len(ANCHORS) * 3)
    upstream = torch.randn(len(ANCHORS) * 3, HEADS, SIZE, generator=torch.Generator().manual_seed(4))
    results = []
    for form in (attend, dense):
        output = form(blocks, batch, tensors, window)
        results.append([output.detach(), *torch.autograd.grad(output, tensors, upstream)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 4])
def test_block_sparse_form_equals_strips(monkeypatch, window):
    monkeypatch.setattr(module, "TILE", 16)
    batch = packed(40, 25)
    blocks = Blocks.at(torch.tensor([0, 5, 20, 21, 22, 39, 45, 60, 64]), batch, 4)
    tensors = [tensor.detach() for tensor in operands(65, 36)]

    def tiles(*args):
        return tile_attention(*args, compiled=False)

    mine, expected = attend(blocks, batch, tensors, window, tiles), attend(blocks, batch, tensors, window)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_tiles_of_the_block_sparse_mask_say_whole_only_where_all_is_visible(monkeypatch, window):
    monkeypatch.setattr(module, "TILE", 8)
    batch = packed(60, 45)
    blocks = Blocks.at(torch.tensor([30, 40, 41, 42, 43, 44, 50, 80, 95, 96]), batch, 4)
    layout = block_layout(blocks, batch)
    tokens = torch.cat((layout.context, torch.arange(105, 105 + 40)))
    mask = block_mask(blocks, 105, window)[:, tokens]
    tiles = layout.tiles(window)
    rows, columns = -(-mask.shape[0] // 8), -(-mask.shape[1] // 8)
    padded = torch.zeros(rows * 8, columns * 8, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    grid = padded.view(rows, 8, columns, 8).transpose(1, 2)
    listed = torch.zeros(rows, columns, dtype=torch.bool)
    whole = torch.zeros_like(listed)
    for row in range(rows):
        listed[row, tiles.kv_indices[0, 0, row, : tiles.kv_num_blocks[0, 0, row]].long()] = True
        whole[row, tiles.full_kv_indices[0, 0, row, : tiles.full_kv_num_blocks[0, 0, row]].long()] = True
    assert bool(whole.any())
    assert bool(grid.all(-1).all(-1)[whole].all())
    assert not bool((grid.any(-1).any(-1) & ~(listed | whole)).any())
    assert not bool((listed & whole).any())


def test_only_tokens_before_the_last_anchor_of_a_document_are_context():
    batch = packed(6, 5, 7)
    layout = block_layout(Blocks.at(torch.tensor([2, 4, 11, 15]), batch, 3), batch)
    assert layout.context.tolist() == [0, 1, 2, 3, 11, 12, 13, 14]
    assert layout.lows.tolist() == [0, 0, 4, 4]
    assert layout.highs.tolist() == [2, 4, 4, 8]
    assert layout.slot_positions.view(-1, 3)[:, 0].tolist() == [2, 4, 0, 4]


def test_wide_window_sees_the_whole_context_and_stays_causal_in_the_block():
    """Oracle 29."""
    batch = packed(20)
    blocks = Blocks.at(torch.tensor([3, 9, 17]), batch, 4)
    full, wide = (block_mask(blocks, 20, window) for window in (None, 24))
    assert torch.equal(full[:, :20], wide[:, :20])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(wide[4:8, 24:28], causal)
    tensors = operands(20, 12)
    output = attend(blocks, batch, tensors, 24)
    torch.testing.assert_close(output, dense(blocks, batch, tensors, 24), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output, attend(blocks, batch, tensors, None), atol=1e-3)
