"""Counts of tokens under the loss. Which ids a pruned draft vocabulary keeps is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.contracts.tasks import PromptTask
from specforge.errors import DataError


def count_loss_tokens(tasks: Iterable[PromptTask], vocab_size: int) -> list[int]:
    """How often each target id is under the loss, [vocab_size]. Streams: memory does not grow with the tasks."""
    counts = [0] * vocab_size
    for task in tasks:
        for start, end in task.loss_spans:
            for token_id in task.input_ids[start:end]:
                if token_id >= vocab_size:
                    raise DataError(
                        f"sample {task.sample_id} has the token id {token_id}, the target knows {vocab_size} "
                        "ids; the tokenizer and the target do not belong together"
                    )
                counts[token_id] += 1
    return counts
