"""AdamW, or Muon for the matrices, on fp32 masters with global-norm clipping."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from specforge.errors import DraftError

OptimizerKind = Literal["adamw", "muon"]


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """``max_grad_norm`` bounds the L2 norm of all gradients together; betas and eps are AdamW's.

    ``muon`` updates the matrices by orthogonalised momentum (momentum 0.95, update scaled to the RMS of AdamW's, so
    that one learning rate serves both; arXiv 2502.16982, eq. 4), everything else by AdamW.
    """

    kind: OptimizerKind = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5


class MasterOptimizer:
    """Owns fp32 copies of lower-precision parameters; an fp32 parameter is its own master.

    One ``step``: norm of all gradients in fp32, clip factor ``min(1, max_norm / (norm + 1e-6))``, update of the
    masters, parameters <- masters rounded. Gradients are ``None`` afterwards. ``tables`` names the parameters that are
    AdamW's whatever the optimizer of the matrices is.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings, tables: Collection[str] = ()
    ) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._settings = settings
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
        self._owners = _owners(self._masters, settings, tables)

    def step(self, lr: float) -> float:
        """Apply the accumulated gradients with rate ``lr``; returns their norm before clipping.

        A norm that is not finite changes nothing: the gradients are dropped and the caller counts it.
        """
        grads = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        norm = float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in grads.values()])))
        if math.isfinite(norm):
            clip = min(1.0, self._settings.max_grad_norm / (norm + 1e-6))
            for name, grad in grads.items():
                self._masters[name].grad = grad.float() * clip
            for optimizer in {id(owner): owner for owner in self._owners.values()}.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            self._publish()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._masters[name].grad = None

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters, moments and step counts as flat tensors: ``master.NAME``, ``exp_avg.NAME``, ..."""
        tensors: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            tensors[f"master.{name}"] = master.detach()
            for key, value in self._owners[name].state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave; names or shapes that differ are a :class:`DraftError`."""
        left = dict(tensors)
        for name, master in self._masters.items():
            saved = left.pop(f"master.{name}", None)
            if saved is None or saved.shape != master.shape:
                raise DraftError(f"the optimizer state has no master of {name} with shape {tuple(master.shape)}")
            master.copy_(saved)
            keys = [key for key in left if key.partition(".")[2] == name]
            if keys:
                self._owners[name].state[master] = {
                    key.partition(".")[0]: _restored(left.pop(key), master) for key in keys
                }
        if left:
            raise DraftError(f"the optimizer state holds {min(left)!r}, which this draft does not have")
        self._publish()


def _restored(saved: Tensor, master: Tensor) -> Tensor:
    """A moment is where its master is; the step count, a scalar, stays on the CPU, where the optimizers keep it."""
    return saved.clone() if saved.ndim == 0 else saved.to(master.device, copy=True)


def _owners(
    masters: Mapping[str, nn.Parameter], settings: OptimizerSettings, tables: Collection[str]
) -> dict[str, torch.optim.Optimizer]:
    """Which optimizer updates which master."""
    is_matrix = {name: master.ndim == 2 and name not in tables for name, master in masters.items()}
    matrices = [name for name in masters if settings.kind == "muon" and is_matrix[name]]
    others = [name for name in masters if name not in matrices]
    owners: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        muon = torch.optim.Muon(
            [masters[name] for name in matrices],
            lr=0.0,
            weight_decay=settings.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        owners |= dict.fromkeys(matrices, muon)
    if others:
        adamw = torch.optim.AdamW(
            [masters[name] for name in others],
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        owners |= dict.fromkeys(others, adamw)
    return owners
