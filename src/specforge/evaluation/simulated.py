"""What training says about a draft on the target's own greedy text: the estimate beside real decoding.

Decoding does not start a round at every token: it skips what it accepted, so rounds start where the draft is weak more
often than rows of a text are there. On an uneven text the mean over all supervised rows, which training logs, is
therefore too high; over the rows at which rounds start it is what decoding would find.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge.algorithms.base import Algorithm, DraftModel, Runs, StepContext, TargetTables
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.refs import Slot
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.tensors import materialised
from specforge.inference.engine import CapturedSample
from specforge.training.metrics import StepSums


class CapturingEngine(Protocol):
    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterable[CapturedSample]: ...


@dataclass(frozen=True, slots=True)
class Simulated:
    """``simulated_acc_len``: 1 + the leading run of correct positions, mean over the supervised rows at which rounds of
    greedy decoding start, ``None`` without such a round. ``scalars``: the metrics of a training step over all
    supervised rows, of the same name too.
    """

    simulated_acc_len: float | None
    num_rounds: int
    scalars: dict[str, float]


def simulate(
    engine: CapturingEngine,
    algorithm: Algorithm,
    draft: DraftModel,
    tables: TargetTables,
    spec: CaptureSpec,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_new_tokens: int,
) -> Simulated:
    """Forward passes of the training over ``texts``, with every position supervised and no learning.

    ``texts`` are (prompt, answer) token ids, the answer being the target's greedy one of at most ``max_new_tokens``.
    ``spec`` should not round: the proposer reads features as the target computed them.
    """
    context = StepContext(global_step=1, total_steps=1, seed=0, exhaustive=True)
    tasks = [
        PromptTask(str(index), index, (*prompt, *answer), ((len(prompt), len(prompt) + len(answer)),))
        for index, (prompt, answer) in enumerate(texts)
    ]
    sums, weight, lengths = StepSums(), 0.0, list[int]()
    with torch.no_grad():
        for task, captured in zip(tasks, engine.capture(tasks, spec), strict=True):
            batch = batch_of(task, {name: materialised(source) for name, source in captured.tensors.items()})
            output = algorithm.forward_loss(draft, tables, batch, context)
            sums.add(output)
            weight += algorithm.supervised_weight(batch, context)
            lengths += rounds_of(output.runs, task, output.correct.numel(), max_new_tokens)
    mean = 1.0 + sum(lengths) / len(lengths) if lengths else None
    return Simulated(mean, len(lengths), sums.scalars(weight))


def rounds_of(runs: Runs, task: PromptTask, num_proposals: int, max_new_tokens: int) -> list[int]:
    """Runs of the rows at which decoding ``task`` starts a round, from the first token of its answer on.

    Rounds that the length limit cuts do not count; what lies behind a stop token is not accepted. As in real decoding.
    """
    run_at = dict(zip(runs.anchors.tolist(), runs.lengths.tolist(), strict=True))
    found, anchor = [], task.loss_spans[0][0]
    end = anchor + max_new_tokens
    while anchor < task.num_tokens - 1 and end - anchor - 1 > num_proposals:
        run = min(run_at.get(anchor, 0), task.num_tokens - anchor - 2)
        found.append(run)
        anchor += 1 + run
    return found


def batch_of(task: PromptTask, features: dict[str, Tensor]) -> TrainBatch[Tensor]:
    """One sample as a batch of its own. ``features`` as captured, with the token ids."""
    ids = features.pop("input_ids").to(torch.int64)
    mask = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for start, end in task.loss_spans:
        mask[start:end] = True
    return TrainBatch(
        input_ids=ids,
        loss_mask=mask,
        position_ids=torch.arange(len(ids), device=ids.device),
        document_ids=torch.zeros_like(ids),
        features=features,
        lengths=(len(ids),),
        sample_ids=(task.sample_id,),
        slots=(Slot(0, task.index),),
    )
