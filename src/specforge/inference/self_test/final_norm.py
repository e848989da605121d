"""A target's final norm, read from its directory without its code.

Whether the weight is a factor or is added to one, and whether the mean is removed, depends on the architecture. Here
nothing depends on a list of architectures: all ways are tried, and what is captured says which of them it fits.

Legend: S rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specforge.algorithms.parts.tables import read_tensor, weight_files
from specforge.contracts.capture import TargetInfo
from specforge.errors import TargetError

NAMES = ("norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm", "final_norm", "embedding_norm", "ln_out")
SIDE_TOWERS = frozenset({"vision_tower", "visual", "vision_model", "audio_tower", "audio_model", "mtp"})
SMALL = 1e-3
"""Channels whose weight is smaller, relative to the largest one, say nothing of what was divided."""


@dataclass(frozen=True, slots=True)
class PossibleNorm:
    """One way in which the norm may work: ``gain`` and ``bias`` [H] fp32, and whether the mean is removed first."""

    kind: str
    gain: Tensor
    bias: Tensor
    centred: bool
    eps: float

    def __call__(self, states: Tensor) -> Tensor:
        """States [S, H] fp32 after the norm."""
        centred = states - states.mean(dim=1, keepdim=True) if self.centred else states
        return centred * (centred.square().mean(dim=1, keepdim=True) + self.eps).rsqrt() * self.gain + self.bias

    def undone(self, states: Tensor) -> Tensor:
        """``states`` [S, H] without gain and bias; 0 where the gain is too small to say."""
        usable = self.gain.abs() > SMALL * self.gain.abs().max()
        return torch.where(usable, (states - self.bias) / torch.where(usable, self.gain, 1.0), 0.0)

    def deviation(self, states: Tensor) -> Tensor:
        """By how much each row [S] of ``states`` misses what every output of this norm has without gain and bias: a
        root mean square of 1, and with it a mean of 0 where the mean is removed.
        """
        plain = self.undone(states)
        usable = (self.gain.abs() > SMALL * self.gain.abs().max()).sum()
        size = (plain.square().sum(dim=1) / usable).sqrt()
        mean = plain.sum(dim=1).abs() / usable if self.centred else torch.zeros_like(size)
        return torch.maximum((size - 1.0).abs(), mean)


def read_final_norms(directory: Path, target: TargetInfo) -> list[PossibleNorm]:
    """The ways in which the final norm may work; none where its weight is not found."""
    try:
        files = weight_files(directory)
    except TargetError:
        return []
    names = [name for name in files if _is_final_norm(name)]
    found = min(names, key=lambda name: (name.count("."), name), default=None)
    if found is None:
        return []
    weight = read_tensor(files, found).float()
    if weight.shape != (target.hidden_size,):
        return []
    bias_name = found.removesuffix("weight") + "bias"
    bias = read_tensor(files, bias_name).float() if bias_name in files else torch.zeros_like(weight)
    eps = target.rms_norm_eps
    return [
        PossibleNorm("RMS norm", weight, bias, False, eps),
        PossibleNorm("RMS norm, 1 + weight", 1.0 + weight, bias, False, eps),
        PossibleNorm("layer norm", weight, bias, True, eps),
        PossibleNorm("layer norm, 1 + weight", 1.0 + weight, bias, True, eps),
    ]


def best_fit(norms: Sequence[PossibleNorm], states: Tensor) -> tuple[PossibleNorm, float]:
    """The norm that ``states`` [S, H] look most like an output of, and the deviation of a usual row."""
    fits = [(float(norm.deviation(states).median()), norm) for norm in norms]
    deviation, norm = min(fits, key=lambda fit: fit[0])
    return norm, deviation


def _is_final_norm(name: str) -> bool:
    *path, module, kind = name.split(".") if name.count(".") else ("", "", "")
    inside = any(part.isdigit() or part in SIDE_TOWERS for part in path)
    return kind == "weight" and module in NAMES and not inside
