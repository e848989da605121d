import pytest
import torch
from torch import nn

from specforge.training.optimizer import MasterOptimizer, OptimizerSettings


def make(dtype: torch.dtype, **settings):
    generator = torch.Generator().manual_seed(0)
    parameters = {
        "a": nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype)),
        "b": nn.Parameter(torch.randn(5, generator=generator).to(dtype)),
    }
    return parameters, MasterOptimizer(parameters, OptimizerSettings(**settings))


def give_gradients(parameters, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def test_model_weights_are_the_rounded_masters():
    """Oracle 44."""
    parameters, optimizer = make(torch.bfloat16)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step(1e-2)
    state = optimizer.state_tensors()
    for name, parameter in parameters.items():
        assert state[f"master.{name}"].dtype == torch.float32
        assert torch.equal(parameter, state[f"master.{name}"].bfloat16())


def test_clip_uses_the_norm_of_all_gradients_together():
    """Oracle 42. The norm is global; the vectors of four whole steps are run by ``specforge.testing.golden``."""
    parameters, optimizer = make(torch.float32, max_grad_norm=0.5, betas=(0.0, 0.0), eps=1.0)
    give_gradients(parameters, 1, scale=10.0)
    gradients = torch.cat([p.grad.flatten() for p in parameters.values()])
    before = torch.cat([p.detach().flatten().clone() for p in parameters.values()])
    norm = optimizer.step(1.0)
    assert norm == pytest.approx(float(gradients.norm()))
    clipped = gradients * (0.5 / (norm + 1e-6))
    after = torch.cat([p.detach().flatten() for p in parameters.values()])
    # with both betas 0 and eps 1, AdamW's update is g / (|g| + 1)
    assert torch.allclose(before - after, clipped / (clipped.abs() + 1.0), atol=1e-6)


def test_adamw_on_masters_follows_its_formula():
    """Oracle 42. Decoupled decay, moments of the clipped gradients, in fp64 beside it."""
    parameters, optimizer = make(torch.bfloat16, betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=0.5)
    masters = {name: p.detach().double() for name, p in parameters.items()}
    moments = {name: (torch.zeros_like(m), torch.zeros_like(m)) for name, m in masters.items()}
    for step in range(1, 5):
        give_gradients(parameters, step, scale=0.1 * step)
        gradients = {name: p.grad.double() for name, p in parameters.items()}
        norm = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
        assert optimizer.step(0.01) == pytest.approx(norm, rel=1e-6)
        for name, gradient in gradients.items():
            clipped = gradient * min(1.0, 0.5 / (norm + 1e-6))
            first, second = moments[name]
            first, second = 0.9 * first + 0.1 * clipped, 0.99 * second + 0.01 * clipped**2
            moments[name] = first, second
            slope = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
            masters[name] = masters[name] * (1 - 0.01 * 0.1) - 0.01 * slope
            found = optimizer.state_tensors()[f"master.{name}"]
            assert torch.allclose(found.double(), masters[name], atol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_gradients_change_nothing(poison):
    parameters, optimizer = make(torch.float32)
    give_gradients(parameters, 2)
    parameters["b"].grad[0] = poison
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer.step(1e-2)
    assert all(torch.equal(before[name], p) for name, p in parameters.items())
    assert all(p.grad is None for p in parameters.values())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_optimizer_continues_with_the_same_bits(dtype, kind):
    straight, optimizer = make(dtype, kind=kind)
    for step in range(6):
        give_gradients(straight, step)
        optimizer.step(1e-2)
    first, early = make(dtype, kind=kind)
    for step in range(3):
        give_gradients(first, step)
        early.step(1e-2)
    resumed, late = make(dtype, kind=kind)
    for name, tensor in early.state_tensors().items():
        late.state_tensors()[name].copy_(tensor)
    late.state_changed()
    for step in range(3, 6):
        give_gradients(resumed, step)
        late.step(1e-2)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(("decay", "falls"), [("all", {"a", "b"}), ("matrices", {"a"})])
def test_weight_decay_is_for_what_it_says(decay, falls):
    parameters = {"a": nn.Parameter(torch.ones(3, 2)), "b": nn.Parameter(torch.ones(3))}
    optimizer = MasterOptimizer(parameters, OptimizerSettings(weight_decay=0.5, decay=decay))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    assert {name for name, parameter in parameters.items() if bool((parameter < 1).all())} == falls


def test_the_state_has_its_names_before_the_first_step():
    parameters, optimizer = make(torch.float32)
    before = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    give_gradients(parameters, 1)
    optimizer.step(1e-2)
    after = optimizer.state_tensors()
    assert (
        set(before)
        == set(after)
        == {f"{key}.{name}" for key in ("master", "step", "exp_avg", "exp_avg_sq") for name in parameters}
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_muon_updates_matrices_with_orthogonal_steps_and_leaves_tables_and_norms_to_adamw():
    generator = torch.Generator().manual_seed(0)
    names = {"layer.weight": (6, 4), "lm_head.weight": (6, 4), "norm.weight": (4,)}
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in names.items()}
    optimizer = MasterOptimizer(parameters, OptimizerSettings(kind="muon", max_grad_norm=1e9), {"lm_head.weight"})
    before = {name: p.detach().clone() for name, p in parameters.items()}
    give_gradients(parameters, 3)
    optimizer.step(0.1)
    update = before["layer.weight"] - parameters["layer.weight"].detach()
    singular = torch.linalg.svdvals(update / (0.1 * 0.2 * 6**0.5))
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    for name in ("lm_head.weight", "norm.weight"):  # AdamW's first step is the sign of the gradient
        assert torch.allclose((before[name] - parameters[name]).abs(), torch.full_like(before[name], 0.1), atol=1e-3)
