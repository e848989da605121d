"""AdamW, or Muon for the matrices, on fp32 masters with global-norm clipping; of whole tensors and of shards alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from specforge.training.sharding import own_part

OptimizerKind = Literal["adamw", "muon"]
DecayKind = Literal["all", "matrices"]
MUON_MOMENTUM = 0.95


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """``max_grad_norm`` bounds the L2 norm of all gradients together; betas and eps are AdamW's.

    ``weight_decay`` is decoupled; ``decay`` says what it is for: ``matrices`` leaves norms and biases alone.

    ``muon`` updates the matrices by orthogonalised momentum (momentum 0.95, update scaled to the RMS of AdamW's, so
    that one learning rate serves both; arXiv 2502.16982, eq. 4), everything else by AdamW.
    """

    kind: OptimizerKind = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.5
    decay: DecayKind = "all"


SumOfSquares = Callable[[float], float]
"""From that of the shards here to that of all of them."""


class MasterOptimizer:
    """Owns fp32 copies of lower-precision parameters; an fp32 parameter is its own master.

    One ``step``: norm of all gradients, clip factor ``min(1, max_norm / (norm + 1e-6))``, update of the masters,
    parameters <- masters rounded. Gradients are ``None`` afterwards. ``tables`` names the parameters that are AdamW's
    whatever the optimizer of the matrices is. Parameters may be shards; then ``over_shards`` adds up squares.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimizerSettings,
        tables: Collection[str] = (),
        over_shards: SumOfSquares = float,
    ) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._settings = settings
        self._over_shards = over_shards
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
        norm = self.gradient_norm()
        if math.isfinite(norm):
            clip = min(1.0, self._settings.max_grad_norm / (norm + 1e-6))
            for name, grad in grads.items():
                self._masters[name].grad = grad.float().mul_(clip)
            for optimizer in {id(owner): owner for owner in self._owners.values()}.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            self._publish()
        self.zero_grad()
        return norm

    def gradient_norm(self) -> float:
        """The L2 norm of all gradients together, over all shards."""
        norms = [own_part(p.grad).float().norm().double() for p in self._parameters.values() if p.grad is not None]
        return math.sqrt(self._over_shards(float(torch.stack(norms).square().sum()) if norms else 0.0))

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
        """Masters, moments and step counts, as they are: ``master.NAME``, ``exp_avg.NAME``, ...

        Always the same names; who writes into the tensors calls :meth:`state_changed`.
        """
        tensors: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            tensors[f"master.{name}"] = master.detach()
            for key, value in self._owners[name].state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def state_changed(self) -> None:
        """The tensors of :meth:`state_tensors` have new values."""
        self._publish()


def _owners(
    masters: Mapping[str, nn.Parameter], settings: OptimizerSettings, tables: Collection[str]
) -> dict[str, torch.optim.Optimizer]:
    """Which optimizer updates which master, with its state made: what they would make at their first step."""
    # A matrix of one row has nothing to orthogonalise.
    matrices = [name for name, master in masters.items() if master.ndim == 2 and min(master.shape) > 1]
    orthogonal = [name for name in matrices if settings.kind == "muon" and name not in tables]
    others = [name for name in masters if name not in orthogonal]
    owners: dict[str, torch.optim.Optimizer] = {}
    if orthogonal:
        muon = torch.optim.Muon(
            [masters[name] for name in orthogonal],
            lr=0.0,
            weight_decay=settings.weight_decay,
            momentum=MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        for name in orthogonal:
            muon.state[masters[name]]["momentum_buffer"] = torch.zeros_like(masters[name])
        owners |= dict.fromkeys(orthogonal, muon)
    if others:
        adamw = torch.optim.AdamW(
            _decay_groups([masters[name] for name in others], settings),
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        for name in others:
            state, master = adamw.state[masters[name]], masters[name]
            state["step"] = torch.zeros((), dtype=torch.float32, device=own_part(master).device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        owners |= dict.fromkeys(others, adamw)
    return owners


def _decay_groups(masters: Sequence[nn.Parameter], settings: OptimizerSettings) -> list[dict[str, object]]:
    spared = [master for master in masters if settings.decay == "matrices" and master.ndim < 2]
    decaying = [master for master in masters if settings.decay == "all" or master.ndim >= 2]
    groups = ((decaying, settings.weight_decay), (spared, 0.0))
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]
