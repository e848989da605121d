"""RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``y = weight * x / sqrt(mean(x**2) + eps)`` over the last dimension.

    The mean is taken in fp32 and the quotient cast back to the dtype of ``x`` before the weight is applied.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            wide = x.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return normed.to(x.dtype) * self.weight
        if not torch.is_grad_enabled():
            return _normalise(x, self.weight, self.eps)[0]
        output: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return output


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and the inverse root mean square [.., 1]."""
    wide = x.float()
    inverse = _dot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return (wide * inverse).to(x.dtype).mul_(weight), inverse


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums over the last dimension in the operands' own precision: autocast would take ``vecdot`` down to its own."""
    with torch.autocast(a.device.type, enabled=False):
        products: Tensor = torch.linalg.vecdot(a, b)
        return products


class _RMSNorm(torch.autograd.Function):
    """Written out, because a CPU spends more on the passes of the composed form than on the layer's products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output, inverse = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        upstream_wide = upstream[0].float()
        weighted = upstream_wide * weight.float()
        grad_weight = (upstream_wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        projection = _dot(weighted, normed).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = weighted.addcmul_(normed, projection, value=-1.0).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, None
