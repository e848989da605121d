"""The draft as the trainer runs it: whole for one step, its weights, gradients and moments in shards between steps.

FSDP2 (``fully_shard``): every rank keeps a shard of every parameter. A step gathers the whole draft once, adds up the
gradients of all its micro-batches, and reduces them once, unit by unit, while the last backward runs. A unit is a block
of the draft that one forward calls once; everything else is one unit more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from specforge.algorithms.base import DraftModel, StepOutput
from specforge.errors import ConfigError
from specforge.training.ranks import Ranks

ShardingKind = Literal["shard", "replicate", "hybrid"]


@dataclass(frozen=True, slots=True)
class Sharding:
    """``shard``: one copy of the training state over all ranks; ``replicate``: a whole copy on each; ``hybrid``: a copy
    over every ``shard_size`` ranks with consecutive numbers.
    """

    kind: ShardingKind = "shard"
    shard_size: int | None = None

    def ranks_a_copy(self, size: int) -> int:
        """How many of ``size`` ranks hold one copy together."""
        if self.kind != "hybrid":
            return size if self.kind == "shard" else 1
        if self.shard_size is None or size % self.shard_size:
            raise ConfigError(
                f"training.sharding is hybrid with training.shard_size {self.shard_size}, but there are {size} train "
                "ranks: set shard_size to a divisor of them, or sharding to shard or replicate"
            )
        return self.shard_size

    def mesh(self, size: int, device_type: str) -> DeviceMesh:
        copy = self.ranks_a_copy(size)
        if copy == size:
            return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
        return init_device_mesh(device_type, (size // copy, copy), mesh_dim_names=("replicate", "shard"))


class ShardedDraft(nn.Module):
    """Wraps a draft, in place: from here on its parameters are shards, except between :meth:`gather` and the last
    :meth:`backward` of a step, or inside :meth:`whole`.

    With one rank nothing is sharded and every call is the plain one. All ranks make the same calls.
    """

    def __init__(self, draft: DraftModel, ranks: Ranks, sharding: Sharding, device_type: str) -> None:
        super().__init__()
        self.draft = draft
        self.num_copies = 1
        self._units: list[FSDPModule] = []
        if ranks.size == 1:
            return
        self.num_copies = ranks.size // sharding.ranks_a_copy(ranks.size)
        mesh = sharding.mesh(ranks.size, device_type)
        modules = [*(draft.training_blocks() if draft.blocks_run_once else ()), self]
        for module in modules:
            fully_shard(module, mesh=mesh, reshard_after_forward=False)
            assert isinstance(module, FSDPModule)
            # The loss is divided by a sum over all ranks already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            self._units.append(module)

    def gather(self) -> None:
        """Make the weights whole; they stay so until the last :meth:`backward`."""
        for unit in self._units:
            unit.unshard()

    def backward(self, forward: Callable[[], StepOutput], divisor: float, *, last: bool) -> StepOutput:
        """Run ``forward`` and add the gradient of its loss sum over ``divisor``; ``last`` of a step: then reduce."""
        for unit in self._units:
            unit.set_requires_gradient_sync(last, recurse=False)
            unit.set_reshard_after_backward(last, recurse=False)
        result: tuple[Tensor, StepOutput] = self(forward)
        loss, output = result
        (loss / divisor).backward()
        return output

    def forward(self, forward: Callable[[], StepOutput]) -> tuple[Tensor, StepOutput]:
        """(loss sum, all of the output). Called, because the hooks of the sharding are those of a call."""
        output = forward()
        if not self._units:
            return output.loss_sum, output
        # Ranks must agree on which parameters have a gradient to reduce: all.
        reach = torch.stack([p.flatten()[:0].sum() for p in self.draft.parameters() if p.requires_grad]).sum()
        return output.loss_sum + reach.to(output.loss_sum.dtype), output

    @contextlib.contextmanager
    def whole(self) -> Iterator[DraftModel]:
        """The draft with whole weights, for forwards without gradients."""
        self.gather()
        try:
            with torch.no_grad():
                yield self.draft
        finally:
            for unit in self._units:
                unit.reshard()

    def served_state(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The draft's ``served_state()`` with whole tensors, for those that ``keep`` it; else empty. A collective."""
        found = {}
        for name, tensor in self.draft.served_state().items():
            gathered = whole(tensor)
            if keep:
                found[name] = gathered
        return found


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered where it is in shards (a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
