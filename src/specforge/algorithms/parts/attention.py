"""Attention of an unrolled draft over packed documents, exact, at the cost of the documents.

The query of row ``j`` at unroll step ``k`` sees the step-0 keys of rows ``<= j`` of its document and, of every later
step up to ``k``, the key of row ``j`` itself. The causal part is one product per document; the ``k`` diagonal columns
join it in one softmax. There is no mask over a growing cache and none over the pack.

Legend: T packed tokens, R computed rows (a subset of the tokens), n query heads, m key/value heads, g = n // m, d size
of a query or key head, e of a value head; in a group: D documents, Q rows, C columns, both padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.parts.eager import Eager


@dataclass(frozen=True, slots=True)
class DocumentGroup:
    """Documents of similar length, padded to a rectangle.

    * ``rows`` int64 [D*Q]: index into the computed rows; the places in ``padding`` [P] hold no row and are set to zero
    * ``keys`` int64 [D*C]: index into the tokens; padding points at token 0 and is hidden by ``bias``
    * ``bias`` fp32 [D, 1, 1, Q, C]: 0 where the column is visible, -inf elsewhere
    """

    num_documents: int
    rows: Tensor
    padding: Tensor
    keys: Tensor
    bias: Tensor

    @property
    def num_rows(self) -> int:
        """Q."""
        return self.bias.shape[-2]

    @property
    def num_keys(self) -> int:
        """C."""
        return self.bias.shape[-1]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """How packed rows map to the groups. ``row_slots`` [R] and ``key_slots`` [T] index the concatenated rectangles;
    a token of a document without computed rows has the slot after the last one, which stands for zero.
    """

    groups: tuple[DocumentGroup, ...]
    row_slots: Tensor
    key_slots: Tensor


def packed_layout(lengths: Sequence[int], rows: Tensor) -> PackedLayout:
    """The layout of packed documents of ``lengths``, of which ``rows`` [R] (ascending) are computed.

    Documents are grouped by the power of two above their length, so that padding costs at most a factor of four.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    bounds = torch.searchsorted(rows.cpu(), torch.tensor(starts)).tolist()
    buckets: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        if bounds[document + 1] > bounds[document]:
            buckets.setdefault(max(16, 1 << (length - 1).bit_length()), []).append(document)
    row_slots = torch.zeros(rows.numel(), dtype=torch.int64)
    key_slots = torch.zeros(starts[-1], dtype=torch.int64)
    cpu_rows, groups, row_offset, key_offset = rows.cpu(), [], 0, 0
    seen = torch.zeros(starts[-1], dtype=torch.bool)
    for _, documents in sorted(buckets.items()):
        num_rows = max(bounds[i + 1] - bounds[i] for i in documents)
        num_keys = max(lengths[i] for i in documents)
        row_index = torch.full((len(documents), num_rows), -1)
        key_index = torch.zeros(len(documents), num_keys, dtype=torch.int64)
        position = torch.zeros(len(documents), num_rows, dtype=torch.int64)
        for place, i in enumerate(documents):
            first, last, start = bounds[i], bounds[i + 1], starts[i]
            row_index[place, : last - first] = torch.arange(first, last)
            key_index[place, : lengths[i]] = torch.arange(start, start + lengths[i])
            position[place, : last - first] = cpu_rows[first:last] - start
            row_slots[first:last] = row_offset + place * num_rows + torch.arange(last - first)
            key_slots[start : start + lengths[i]] = key_offset + place * num_keys + torch.arange(lengths[i])
            seen[start : start + lengths[i]] = True
        hidden = torch.arange(num_keys) > position.unsqueeze(-1)
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]
        row_index, device = row_index.flatten(), rows.device
        groups.append(
            DocumentGroup(
                num_documents=len(documents),
                rows=row_index.clamp(min=0).to(device),
                padding=(row_index < 0).nonzero().squeeze(-1).to(device),
                keys=key_index.flatten().to(device),
                bias=bias.to(device),
            )
        )
        row_offset += len(documents) * num_rows
        key_offset += len(documents) * num_keys
    key_slots[~seen] = key_offset
    return PackedLayout(tuple(groups), row_slots.to(rows.device), key_slots.to(rows.device))


@Eager
def unrolled_attention(
    layout: PackedLayout,
    queries: Tensor,
    context: tuple[Tensor, Tensor],
    own: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention output [R, n, e] of one unroll step.

    ``queries`` [R, n, d]; ``context`` keys [T, m, d] and values [T, m, e] of step 0; ``own`` keys [R, m, d] and values
    [R, m, e] of the steps 1..k in order. Softmax in fp32, of scores divided by sqrt(d).
    """
    flat = [tensor for pair in own for tensor in pair]
    if not layout.groups:
        # no rows: every operand stays in the graph, so that the weights behind it get their zeros
        reached = torch.stack([tensor.flatten()[:0].sum() for tensor in (queries, *context, *flat)]).sum()
        return queries.new_zeros(*queries.shape[:2], context[1].shape[-1]) + reached
    output: Tensor = _UnrolledAttention.apply(layout, queries, *context, *flat)  # type: ignore[no-untyped-call]
    return output


class _UnrolledAttention(torch.autograd.Function):
    """All stored keys and values get gradients. Probabilities of the causal part are made again in the backward, a
    group at a time, so that what is kept grows with the rows and not with their square.
    """

    @staticmethod
    def forward(ctx: Any, layout: PackedLayout, queries: Tensor, keys: Tensor, values: Tensor, *own: Tensor) -> Tensor:
        rows, num_heads, size = queries.shape
        num_groups = keys.shape[1]
        grouped = queries.reshape(rows, num_groups, num_heads // num_groups, size)
        own_scores = _own_scores(grouped, own)
        parts, own_parts = [], []
        for group in layout.groups:
            probabilities = _probabilities(group, grouped, keys, own_scores)
            causal, diagonal = probabilities.split((group.num_keys, len(own) // 2), dim=-1)
            parts.append(
                _unfold_rows(group, torch.bmm(causal.to(values.dtype), _columns(group, values)), grouped.shape[2])
            )
            own_parts.append(_unfold_rows(group, diagonal, grouped.shape[2]))
        output = _gather(parts, layout.row_slots)
        own_weights = _gather(own_parts, layout.row_slots).view_as(own_scores)
        if own:
            output += torch.matmul(own_weights.to(values.dtype), _stack(own[1::2]))
        result = output.flatten(1, 2)
        ctx.layout = layout
        ctx.save_for_backward(queries, keys, values, result, own_weights, *own)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        queries, keys, values, result, own_weights, *own = ctx.saved_tensors
        layout: PackedLayout = ctx.layout
        rows, num_heads, size = queries.shape
        shape = (rows, keys.shape[1], num_heads // keys.shape[1], size)
        grouped, upstream = queries.reshape(shape), gradients[0].reshape(*shape[:3], values.shape[2])
        inner = (upstream * result.view_as(upstream)).sum(-1, keepdim=True, dtype=torch.float32)
        query_parts, key_parts, value_parts = [], [], []
        own_scores = _own_scores(grouped, own)
        for group in layout.groups:
            probabilities = _probabilities(group, grouped, keys, own_scores)
            parts = _backward_group(group, probabilities, (grouped, keys, values), upstream, inner)
            query_parts.append(parts[0])
            key_parts.append(parts[1])
            value_parts.append(parts[2])
        grad_queries = _gather(query_parts, layout.row_slots).view(shape)
        grad_own: list[Tensor] = []
        if own:
            own_keys, own_values = _stack(own[0::2]), _stack(own[1::2])
            slope = torch.matmul(upstream, own_values.transpose(-1, -2)).float().sub_(inner).mul_(own_weights)
            slope = slope.mul_(size**-0.5).to(keys.dtype)
            grad_queries += torch.matmul(slope, own_keys)
            grad_own_keys = torch.matmul(slope.transpose(-1, -2), grouped).unbind(2)
            grad_own_values = torch.matmul(own_weights.to(values.dtype).transpose(-1, -2), upstream).unbind(2)
            grad_own = [tensor for pair in zip(grad_own_keys, grad_own_values, strict=True) for tensor in pair]
        grad_keys = _gather([*key_parts, keys.new_zeros(1, *keys.shape[1:])], layout.key_slots)
        grad_values = _gather([*value_parts, values.new_zeros(1, *values.shape[1:])], layout.key_slots)
        return None, grad_queries.view_as(queries), grad_keys, grad_values, *grad_own


def _stack(steps: Sequence[Tensor]) -> Tensor:
    """k tensors [R, m, .] -> [R, m, k, .]: a row's own keys or values of the later steps."""
    return torch.stack(tuple(steps), dim=2)


def _own_scores(grouped: Tensor, own: Sequence[Tensor]) -> Tensor:
    """fp32 [R, m, g, k]: scores of a row's own later keys; ``own`` are keys and values in turn."""
    if not own:
        return grouped.new_empty(*grouped.shape[:3], 0, dtype=torch.float32)
    scores: Tensor = torch.matmul(grouped, _stack(own[0::2]).transpose(-1, -2)).float()
    return scores * float(grouped.shape[-1] ** -0.5)


def _probabilities(group: DocumentGroup, grouped: Tensor, keys: Tensor, own_scores: Tensor) -> Tensor:
    """fp32 [D*m, g*Q, C + k]: the joint softmax over the visible columns and the row's own later keys."""
    documents, num_keys = group.num_documents, group.num_keys
    folded = _fold_rows(group, grouped)
    scores = torch.bmm(folded, _columns(group, keys).transpose(1, 2)).float() * grouped.shape[-1] ** -0.5
    scores.view(documents, grouped.shape[1], grouped.shape[2], -1, num_keys).add_(group.bias)
    if own_scores.shape[-1]:
        scores = torch.cat((scores, _fold_rows(group, own_scores)), dim=-1)
    return torch.softmax(scores, dim=-1)


def _backward_group(
    group: DocumentGroup,
    probabilities: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    upstream: Tensor,
    inner: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the causal part: queries [D*Q, m, g, d], keys [D*C, m, d], values [D*C, m, e]."""
    grouped, keys, values = operands
    causal = probabilities[..., : group.num_keys]
    folded_upstream = _fold_rows(group, upstream)
    slope = torch.bmm(folded_upstream, _columns(group, values).transpose(1, 2)).float()
    slope.sub_(_fold_rows(group, inner)).mul_(causal).mul_(grouped.shape[-1] ** -0.5)
    slope = slope.to(keys.dtype)
    grad_queries = torch.bmm(slope, _columns(group, keys))
    grad_keys = torch.bmm(slope.transpose(1, 2), _fold_rows(group, grouped))
    grad_values = torch.bmm(causal.to(values.dtype).transpose(1, 2), folded_upstream)
    return (
        _unfold_rows(group, grad_queries, grouped.shape[2]),
        _unfold_columns(group, grad_keys),
        _unfold_columns(group, grad_values),
    )


def _fold_rows(group: DocumentGroup, rows: Tensor) -> Tensor:
    """[R, m, g, e] -> [D*m, g*Q, e]."""
    num_groups, per_group, size = rows.shape[1:]
    padded = rows.reshape(rows.shape[0], -1).index_select(0, group.rows).index_fill_(0, group.padding, 0)
    documents, num_rows = group.num_documents, group.num_rows
    padded = padded.view(documents, num_rows, num_groups, per_group, size).permute(0, 2, 3, 1, 4)
    return padded.reshape(documents * num_groups, per_group * num_rows, size)


def _unfold_rows(group: DocumentGroup, folded: Tensor, per_group: int) -> Tensor:
    """[D*m, g*Q, e] -> [D*Q, m, g, e]."""
    documents, size = group.num_documents, folded.shape[-1]
    num_groups = folded.shape[0] // documents
    rows = folded.reshape(documents, num_groups, per_group, group.num_rows, size).permute(0, 3, 1, 2, 4)
    return rows.reshape(documents * group.num_rows, num_groups, per_group, size)


def _columns(group: DocumentGroup, tokens: Tensor) -> Tensor:
    """[T, m, .] -> [D*m, C, .]."""
    num_groups, size = tokens.shape[1:]
    padded = tokens.reshape(tokens.shape[0], -1).index_select(0, group.keys)
    padded = padded.view(group.num_documents, -1, num_groups, size).transpose(1, 2)
    return padded.reshape(group.num_documents * num_groups, -1, size)


def _unfold_columns(group: DocumentGroup, folded: Tensor) -> Tensor:
    """[D*m, C, .] -> [D*C, m, .]."""
    documents = group.num_documents
    num_groups, size = folded.shape[0] // documents, folded.shape[-1]
    return folded.view(documents, num_groups, -1, size).transpose(1, 2).reshape(-1, num_groups, size)


def _gather(parts: list[Tensor], slots: Tensor) -> Tensor:
    """The rows ``slots`` of the concatenation of ``parts``."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.index_select(0, slots)
