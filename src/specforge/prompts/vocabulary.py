"""Counts of tokens under the loss. Which ids a pruned draft vocabulary keeps is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.contracts.tasks import PromptTask
from specforge.errors import DataError


def count_loss_tokens(tasks: Iterable[PromptTask], vocab_size: int, num_tokens: int | None = None) -> list[int]:
    """How often each target id is under the loss, [vocab_size]. Streams: memory does not grow with the tasks.

    ``num_tokens`` is how many ids the tokenizer knows (``None``: unknown); a target's table may have more rows. An id
    beyond either is a :class:`DataError`.
    """
    counts = [0] * vocab_size
    limit = vocab_size if num_tokens is None else min(num_tokens, vocab_size)
    for task in tasks:
        for start, end in task.loss_spans:
            for token_id in task.input_ids[start:end]:
                if token_id >= limit:
                    what = "target" if limit == vocab_size else "target's tokenizer"
                    raise DataError(
                        f"sample {task.sample_id} has the token id {token_id}, the {what} knows {limit} "
                        "ids; the tokenizer and the target do not belong together: tokenize the samples with this "
                        "target's own"
                    )
                counts[token_id] += 1
    return counts
