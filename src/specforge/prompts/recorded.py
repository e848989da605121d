"""Prompts as recorded tokens, there and back: the same tasks with the same ids, without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from specforge.contracts.tasks import PromptTask
from specforge.errors import DataError
from specforge.prompts.sources import numbered_lines, parse_line
from specforge.prompts.tasks import check_sample_ids, make_task


def recorded_lines(tasks: Iterable[PromptTask], *, keep_ids: bool = False) -> bytes:
    """JSONL in the ``tokens`` format of ``data.format``, one line a task; equal tasks give equal bytes.

    A row has a ``sample_id`` where it would be given another one when it is read, or where ``keep_ids`` says so; a task
    without one is given one then.
    """
    lines = []
    for task in tasks:
        row: dict[str, object] = {"input_ids": task.input_ids, "loss_spans": task.loss_spans}
        if task.attributes:
            row["attributes"] = task.attributes
        own = make_task(task.index, task.input_ids, task.loss_spans).sample_id
        if task.sample_id and (keep_ids or task.sample_id != own):
            row["sample_id"] = task.sample_id
        lines.append(json.dumps(row, separators=(",", ":"), sort_keys=True))
    return "".join(line + "\n" for line in lines).encode()


def read_recorded(path: Path, limit: int | None = None) -> list[PromptTask]:
    """The tasks in ``path``, the first ``limit`` of them; nothing is cut, skipped or rendered.

    Raises :class:`DataError` that names file and line.
    """
    tasks: list[PromptTask] = []
    for number, line in numbered_lines(path):
        try:
            tokens = parse_line(line, "tokens").tokens
        except DataError as error:
            raise DataError(f"{path} line {number}: {error}") from None
        assert tokens is not None
        tasks.append(make_task(len(tasks), tokens.input_ids, tokens.loss_spans, tokens.attributes, tokens.sample_id))
        if len(tasks) == limit:
            break
    if not tasks:
        raise DataError(f"{path}: the file is empty; it should hold one JSON object a line")
    check_sample_ids(path, tasks)
    return tasks
