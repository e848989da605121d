"""No algorithm ever makes logits of all rows, of the draft or of the teacher, in the forward or in the backward."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specforge.algorithms.parts import losses
from specforge.testing.algorithm_world import SMALL_OPTIONS, make_world, small_algorithm
from specforge.testing.samples import SMALL_TARGET, pack

VOCAB, CHUNK_ROWS = 59, 8


class WidestLogits(TorchDispatchMode):
    """The most rows of a matrix that is as wide as a vocabulary; views of the heads have as many as the hidden size."""

    def __init__(self, widths):
        super().__init__()
        self.widths, self.num_rows = widths, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] in self.widths:
                self.num_rows = max(self.num_rows, tensor.numel() // tensor.shape[-1])
        return output


@pytest.mark.parametrize("case", SMALL_OPTIONS)
def test_no_logits_of_all_rows_exist(case, monkeypatch):
    monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", CHUNK_ROWS)
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 1)
    algorithm = small_algorithm(case)
    if getattr(algorithm.options, "draft_vocab_size", None):
        algorithm.options = algorithm.options.model_copy(update={"draft_vocab_size": 37})
    world = make_world(algorithm, replace(SMALL_TARGET, vocab_size=VOCAB))
    batch = pack(world.samples((40, 33, 50)))
    with WidestLogits({VOCAB, world.config.draft_vocab_size}) as seen:
        output = world.loss(batch)
        output.loss_sum.backward()
    assert int(output.count.sum()) > 4 * CHUNK_ROWS
    assert seen.num_rows <= max(CHUNK_ROWS, SMALL_TARGET.hidden_size)
