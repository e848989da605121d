"""EAGLE-3: the layer at inference, on a few rows at a time.

Legend: R rows, H hidden size, I MLP size, n query heads, m key/value heads, d size of a query or key head, e of a value
head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.projections import DraftAttention, GroupedQueryAttention, NormedGroupedQueryAttention

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Heads:
    """What a pass attends with: ``queries`` [R, n, d], ``keys`` [R, m, d], ``values`` [R, m, e], and the ``residual``
    [R, H] that the attention is added to.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    residual: Tensor


class LayerStep(Protocol):
    """The layer around its attention."""

    def angles(self, positions: Tensor) -> Angles:
        """Rotary angles of ``positions`` [R] in the layer's own form, two tensors with R rows."""

    def project(self, embedded: Tensor, hidden: Tensor, angles: Angles) -> Heads:
        """From token embeddings and hidden states, [R, H] each; ``angles`` of every row, or of one for all."""

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP onto ``residual`` [R, H], with ``attended`` [R, n*e]: the layer's output [R, H]."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A step, and the layer's parameters that it was read from with their versions at that time.

    The parameters are held, so that no other tensor can be taken for one of them.
    """

    step: LayerStep
    versions: tuple[tuple[Tensor, int, int], ...]


_READ: WeakKeyDictionary[Eagle3Draft, _Read] = WeakKeyDictionary()


def shared_step(draft: Eagle3Draft) -> LayerStep:
    """The step of ``draft`` with its weights as they are now: the same one until they change."""
    parameters = list(draft.midlayer.parameters())
    if any(parameter.is_inference() for parameter in parameters):  # these do not count their changes
        return layer_step(draft)
    versions = tuple((parameter, parameter.data_ptr(), parameter._version) for parameter in parameters)
    known = _READ.get(draft)
    if known is None or len(known.versions) != len(versions) or not all(map(_is_same, known.versions, versions)):
        known = _READ[draft] = _Read(layer_step(draft), versions)
    return known.step


def _is_same(left: tuple[Tensor, int, int], right: tuple[Tensor, int, int]) -> bool:
    return left[0] is right[0] and left[1:] == right[1:]


def layer_step(draft: Eagle3Draft) -> LayerStep:
    """The fastest form that knows the draft's architecture; it holds the weights as they are now."""
    attention = draft.midlayer.self_attn
    if type(attention) in (GroupedQueryAttention, NormedGroupedQueryAttention):
        assert isinstance(attention, GroupedQueryAttention)
        return JoinedStep.of(draft, attention)
    return ModuleStep(draft, attention)


class ModuleStep:
    """Any architecture, through its own module."""

    def __init__(self, draft: Eagle3Draft, attention: DraftAttention) -> None:
        self._layer, self._attention = draft.midlayer, attention
        self._inputs = attention.input_weight().detach()

    def angles(self, positions: Tensor) -> Angles:
        return self._attention.rotary(positions)

    def project(self, embedded: Tensor, hidden: Tensor, angles: Angles) -> Heads:
        layer, attention = self._layer, self._attention
        normed = layer.hidden_norm(hidden)
        inputs = torch.cat((layer.input_layernorm(embedded), normed), dim=-1)
        projected, split = F.linear(inputs, self._inputs), attention.num_query_features
        keys, values = attention.keys_values(projected[:, split:], angles)
        residual = normed if layer.norm_before_residual else hidden
        return Heads(attention.queries(projected[:, :split], angles), keys, values, residual)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        residual = residual + self._attention.o_proj(attended)
        output: Tensor = residual + self._layer.mlp(self._layer.post_attention_layernorm(residual))
        return output


@dataclass(frozen=True, slots=True)
class JoinedStep:
    """Grouped-query attention with the weights as a step multiplies them: from the right, [in, out], joined where they
    read the same input. One row costs as much as its number of operations, hence the few.
    """

    attention: GroupedQueryAttention
    norm_before_residual: bool
    eps: Tensor  # scalar, fp32
    input_norms: Tensor  # [2, H]: of the token, of the hidden state
    qkv: Tensor  # [2H, (n + 2m) * d]
    head_norms: Tensor | None  # [n + m, d]
    output: Tensor  # [n * d, H]
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [H, 2I]
    down: Tensor  # [I, H]

    @classmethod
    def of(cls, draft: Eagle3Draft, attention: GroupedQueryAttention) -> JoinedStep:
        layer, mlp = draft.midlayer, draft.midlayer.mlp
        head_norms = None
        if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
            norms = (
                attention.q_norm.weight.expand(attention.num_heads, -1),
                attention.k_norm.weight.expand(attention.num_groups, -1),
            )
            head_norms = torch.cat(norms).detach()
        return cls(
            attention=attention,
            norm_before_residual=layer.norm_before_residual,
            eps=torch.tensor(draft.config.rms_norm_eps, device=draft.fc.weight.device),
            input_norms=torch.stack((layer.input_layernorm.weight, layer.hidden_norm.weight)).detach(),
            qkv=attention.input_weight().detach().t(),
            head_norms=head_norms,
            output=attention.o_proj.weight.detach().t(),
            post_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).detach().t(),
            down=mlp.down_proj.weight.detach().t(),
        )

    def angles(self, positions: Tensor) -> Angles:
        cos, sin = self.attention.rotary(positions)
        # the half that a head is rolled by enters its first half with a minus
        joined = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return joined[0].unsqueeze(1).to(self.qkv.dtype), joined[1].unsqueeze(1).to(self.qkv.dtype)

    def project(self, embedded: Tensor, hidden: Tensor, angles: Angles) -> Heads:
        num_heads, num_groups = self.attention.num_heads, self.attention.num_groups
        inputs = self._normalise(torch.stack((embedded, hidden), dim=1), self.input_norms)
        heads = (inputs.flatten(1) @ self.qkv).unflatten(-1, (-1, self.attention.head_dim))
        turning, values = heads.split((num_heads + num_groups, num_groups), dim=1)
        if self.head_norms is not None:
            turning = self._normalise(turning, self.head_norms)
        turned = torch.addcmul(turning * angles[0], turning.roll(turning.shape[2] // 2, dims=2), angles[1])
        residual = inputs[:, 1] if self.norm_before_residual else hidden
        return Heads(turned[:, :num_heads], turned[:, num_heads:], values, residual)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        residual = torch.addmm(residual, attended, self.output)
        gate, up = (self._normalise(residual, self.post_norm) @ self.gate_up).chunk(2, dim=-1)
        return torch.addmm(residual, F.silu(gate) * up, self.down)

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension; the quotient is cast back before the weight, as ``parts.norm`` does."""
        wide = x.float()
        squares = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
        return (wide * torch.add(self.eps, squares, alpha=1.0 / x.shape[-1]).rsqrt_()).to(x.dtype).mul_(weight)
