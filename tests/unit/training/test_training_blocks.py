"""Blocks that are checkpointed or compiled train as they did before."""

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from specforge.algorithms.base import DraftModel
from specforge.algorithms.catalog import get_algorithm, options_of
from specforge.errors import ConfigError
from specforge.testing.algorithm import block_calls
from specforge.testing.algorithm_world import (
    CONTEXT,
    SMALL_OPTIONS,
    World,
    assert_same_gradients,
    make_world,
    packed,
    small_algorithm,
    step_gradients,
)
from specforge.testing.samples import pack
from specforge.training.blocks import checkpoint_activations, compile_blocks

LENGTHS = (19, 7, 24, 1, 12, 3)

DEEP = {
    "dflash": {"num_layers": 4, "block_size": 4, "num_anchors": 64, "aux_layers": (1, 3)},
    "peagle": {"num_depths": 3, "num_layers": 4},
    "eagle3": {"ttt_steps": 6},
    "mtp": {"num_steps": 4},
}


@pytest.mark.parametrize("case", SMALL_OPTIONS)
def test_checkpointed_blocks_give_the_same_bits(case: str):
    world = make_world(small_algorithm(case))
    batches = [*packed([world.samples(LENGTHS)]), world.empty]
    expected = step_gradients(world, batches)
    names = list(world.draft.state_dict())
    checkpoint_activations(world.draft)
    assert list(world.draft.state_dict()) == names
    found = step_gradients(world, batches)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("case", ["dflash", "eagle3", "mtp", "medusa-shared"])
def test_the_backward_computes_checkpointed_blocks_again(case: str):
    world = make_world(small_algorithm(case))
    checkpoint_activations(world.draft)
    computed: list[int] = []
    hooked = {id(block): block for block in world.draft.training_blocks()}
    for block in hooked.values():
        *_, inner = (module for module in block.modules() if isinstance(module, torch.nn.Linear))
        inner.register_forward_pre_hook(lambda *_, block=block: computed.append(id(block)))
    batch = pack(world.samples(LENGTHS))
    loss = world.loss(batch).loss_sum
    before = list(computed)
    loss.backward()
    assert sorted(computed) == sorted(before * 2)
    assert set(before) == set(hooked)


@pytest.mark.parametrize("name", DEEP)
def test_checkpointed_blocks_keep_less_memory(name: str):
    world = make_world(get_algorithm(options_of({"name": name, **DEEP[name]})))
    batch = pack(world.samples((200, 120)))
    plain = kept_bytes(world, batch)
    checkpoint_activations(world.draft)
    assert kept_bytes(world, batch) < 0.6 * plain


def test_a_copy_of_a_checkpointed_draft_computes_with_its_own_weights():
    world = make_world(small_algorithm("dflash"))
    checkpoint_activations(world.draft)
    batch = pack(world.samples(LENGTHS))
    twin = copy.deepcopy(world.draft)
    expected = float(world.loss(batch).loss_sum.detach())
    with torch.no_grad():
        for parameter in world.draft.parameters():
            parameter.zero_()
    assert float(world.algorithm.forward_loss(twin, world.tables, batch, CONTEXT).loss_sum.detach()) == expected


def test_evaluation_and_drafting_do_not_notice_checkpoints():
    world = make_world(small_algorithm("peagle"))
    batch = pack(world.samples(LENGTHS))
    with torch.no_grad():
        expected = float(world.loss(batch).loss_sum)
        calls = block_calls(world, batch)
        checkpoint_activations(world.draft)
        assert float(world.loss(batch).loss_sum) == expected
        assert block_calls(world, batch) == calls


@pytest.mark.parametrize("wish", [checkpoint_activations, compile_blocks])
def test_a_draft_without_blocks_is_refused(wish):
    class Whole(DraftModel):
        pass

    with pytest.raises(ConfigError, match=r"Whole names none in training_blocks\(\); train it without"):
        wish(Whole())


def test_checkpointed_blocks_are_not_compiled_afterwards():
    world = make_world(small_algorithm("medusa"))
    checkpoint_activations(world.draft)
    with pytest.raises(AssertionError, match="before their activations are checkpointed"):
        compile_blocks(world.draft)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("case", ["dflash", "eagle3"])
def test_compiled_blocks_train_alike(case: str, checkpointed: bool):
    world = make_world(small_algorithm(case))
    samples = world.samples(LENGTHS)
    groups = [packed([samples]), packed([samples[:2], samples[2:]]), [world.empty]]
    expected = [step_gradients(world, batches) for batches in groups]
    names = list(world.draft.state_dict())
    torch.compiler.reset()
    counters.clear()
    compile_blocks(world.draft)
    num_graphs = counters["stats"]["unique_graphs"]
    if checkpointed:
        checkpoint_activations(world.draft)
    assert list(world.draft.state_dict()) == names
    for batches, gradient in zip(groups, expected, strict=True):
        assert_same_gradients(step_gradients(world, batches), gradient)
    assert counters["stats"]["unique_graphs"] >= num_graphs + 2  # before and after the attention
    twin = copy.deepcopy(world.draft)
    with torch.no_grad():
        for parameter in world.draft.parameters():
            parameter.zero_()
    assert_same_gradients(step_gradients(replace(world, draft=twin), groups[0]), expected[0])


def kept_bytes(world: World, batch) -> int:
    """Bytes that a forward allocates and that are still there before its backward."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
        output = world.loss(batch)
    kept = sum(event.self_cpu_memory_usage for event in memory.key_averages())
    assert output.loss_sum.requires_grad
    return kept
