"""The refusals that every MetadataStore words the same way."""

from __future__ import annotations

from specforge.contracts.tasks import PromptTask
from specforge.errors import ConfigError, DataError, InvalidTransition


def check_same_task(same: bool, task: PromptTask) -> None:
    if not same:
        raise DataError(
            f"prompt {task.index} (sample id {task.sample_id!r}) differs from the one recorded in this run; "
            "resume with the prompts that the run was started with, or start a new run in an empty directory"
        )


def task_gap(expected: int, task: PromptTask) -> DataError:
    return DataError(f"expected prompt index {expected}, got {task.index} (sample id {task.sample_id!r})")


def check_order_key(bound: str | None, order_key: str) -> None:
    if bound not in {None, order_key}:
        raise ConfigError(
            f"this run was started with the sample order ({bound}), got ({order_key}); "
            "resume with the same seed and prompts, or start a new run in an empty directory"
        )


def check_step(step: int) -> None:
    if step < 1:
        raise InvalidTransition(f"an ack carries the number of the optimizer step, 1 or more, got {step}")


def unknown_sample(index: int, num_tasks: int) -> InvalidTransition:
    return InvalidTransition(f"sample {index} is not registered; the run has {num_tasks} prompts")
