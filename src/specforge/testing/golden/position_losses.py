"""Per-position losses of speculators and the names that its vectors give them.

Legend: M rows, W vocabulary of the draft.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.testing.golden.report import NotBuilt


def loss_terms(loss_fn: str | dict[str, float]) -> dict[str, float]:
    """The terms of ``loss_fn`` with their factors: a name, or an object (or its JSON) of names and factors."""
    if isinstance(loss_fn, str):
        loss_fn = json.loads(loss_fn) if loss_fn.lstrip().startswith("{") else {loss_fn: 1.0}
    if unknown := set(loss_fn) - set(POSITION_LOSSES):
        raise NotBuilt(f"the losses {sorted(unknown)}")
    return dict(loss_fn)


def _kl(draft: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(draft, -1), F.log_softmax(teacher, -1), reduction="none", log_target=True).sum(-1)


def _reverse_kl(draft: Tensor, teacher: Tensor) -> Tensor:
    return _kl(teacher, draft)


def overlap(draft: Tensor, teacher: Tensor) -> Tensor:
    """Chance that a token drawn from the draft is accepted, [..] of logits [.., W]."""
    return torch.minimum(torch.softmax(draft, -1), torch.softmax(teacher, -1)).sum(-1)


def _jsd(draft: Tensor, teacher: Tensor) -> Tensor:
    q, p = F.log_softmax(draft, -1), F.log_softmax(teacher, -1)
    mix = torch.logaddexp(q, p) - torch.log(torch.tensor(2.0))
    return 0.5 * ((p.exp() * (p - mix)).sum(-1) + (q.exp() * (q - mix)).sum(-1))


def _lk_hybrid(draft: Tensor, teacher: Tensor) -> Tensor:
    accepted = overlap(draft, teacher)
    blend = torch.exp(-3.0 * accepted.detach())
    return blend * _kl(draft, teacher) + (1 - blend) * (1 - accepted)


POSITION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_div": _kl,
    "reverse_kl": _reverse_kl,
    "rkl": _reverse_kl,
    "jsd": _jsd,
    "ce": lambda draft, teacher: F.cross_entropy(draft, teacher.argmax(-1), reduction="none"),
    "tv": lambda draft, teacher: 1 - overlap(draft, teacher),
    "nla": lambda draft, teacher: -overlap(draft, teacher).clamp(min=1e-5).log(),
    "lk_hybrid": _lk_hybrid,
}
"""Per-row losses [M] of draft and teacher logits [M, W]."""
