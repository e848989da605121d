"""Every algorithm against its obvious form: the same loss and the same gradients from the same weights."""

import pytest
import torch

from specforge.algorithms.base import StepContext
from specforge.algorithms.catalog import ALGORITHMS, get_algorithm, options_of
from specforge.testing.algorithm_world import BLOCK_DRAFT, SMALL_OPTIONS, assert_same_gradients, gradients, make_world
from specforge.testing.plain.base import PlainInputs
from specforge.testing.plain.paths import PLAIN_PATHS
from specforge.testing.samples import pack

WITHOUT_PLAIN_PATH = {"eagle3-sample_mean", "eagle3-mla", "dspark-rnn"}
"""Objectives and architectures that are compared with references of their own elsewhere."""
VARIANTS = {
    **SMALL_OPTIONS,
    "eagle3-mask_offset": {"ttt_steps": 4, "mask_offset": 0, "norm_before_residual": True, "norm_before_fc": True},
    "dflash-confidence": {**BLOCK_DRAFT, "loss_type": "dpace-cumulative-confidence-only"},
    "dflash-value": {**BLOCK_DRAFT, "loss_type": "dpace-continuation-value-only", "dpace_alpha": 0.2},
    "domino-unshifted": {**SMALL_OPTIONS["domino"], "shift_label": False, "gamma": "uniform"},
}
CASES = [case for case in VARIANTS if case.partition("-")[0] in ALGORITHMS and case not in WITHOUT_PLAIN_PATH]


def test_every_algorithm_of_the_catalog_has_a_plain_path():
    assert set(ALGORITHMS) <= set(PLAIN_PATHS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("global_step", [0, 3])
def test_the_product_gives_the_loss_and_the_gradients_of_the_plain_path(case, global_step):
    name = case.partition("-")[0]
    world = make_world(get_algorithm(options_of({"name": name, **VARIANTS[case]})))
    samples = world.samples((19, 7, 24, 2, 12))
    batch = pack([*samples[:2], samples[2].masked((2, 9), (14, 20)), *samples[3:]])
    context = StepContext(global_step, total_steps=10, seed=5)
    world.draft.zero_grad()
    loss = world.loss(batch, context).loss_sum
    loss.backward()
    found = gradients(world)
    world.draft.zero_grad()
    plain = PLAIN_PATHS[name](PlainInputs(world.algorithm, world.draft, world.tables, batch, context))
    plain.backward()
    expected = {
        key: torch.zeros_like(p) if p.grad is None else p.grad
        for key, p in world.draft.named_parameters()
        if p.requires_grad
    }
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert_same_gradients(found, expected)
