"""Prompts answered by the target: leased ones, whose responses the ledger records, and a file of them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.base import CaptureControl, Lease
from specforge.errors import ControlPlaneError
from specforge.inference.engine import Generation
from specforge.prompts.recorded import recorded_lines
from specforge.prompts.responses import ResponseOptions


class Generates(Protocol):
    """What is needed of a ``TargetEngine`` here."""

    def generate(self, prompts: Sequence[Sequence[int]], options: Generate) -> list[Generation]: ...


LONGEST_RESPONSE_S = 3600.0
"""A worker that writes at one response for longer is as good as dead."""
_JOIN_S = 0.5


def response(engine: Generates, task: PromptTask, options: ResponseOptions) -> tuple[int, ...]:
    """What the target answers to one prompt; it depends on that prompt alone."""
    (generation,) = engine.generate([task.input_ids], options.of(task))
    return generation.token_ids[: task.num_to_generate]


def recorded(control: CaptureControl, worker_id: str, lease: Lease, response_ids: Sequence[int]) -> Lease:
    """``lease`` with the tokens that are captured: those that the ledger has, once it was given ``response_ids``.

    ``StaleGeneration`` where the lease is over and there is no response.
    """
    found = control.record(worker_id, lease.task.sample_id, lease.generation, response_ids)
    task = replace(lease.task, input_ids=found.input_ids, loss_spans=found.loss_spans, num_to_generate=0)
    return replace(lease, task=task)


@contextlib.contextmanager
def heartbeats(control: CaptureControl, worker_id: str, lease_s: float) -> Iterator[None]:
    """Signs of life while the target writes one response, for ``LONGEST_RESPONSE_S`` at most."""
    done = threading.Event()
    give_up_at = time.monotonic() + LONGEST_RESPONSE_S

    def beat() -> None:
        # Whoever writes hears of a control plane that is gone with its next call.
        with contextlib.suppress(ControlPlaneError):
            while not done.wait(lease_s / 3) and time.monotonic() < give_up_at:
                control.heartbeat(worker_id)

    heart = threading.Thread(target=beat, name="heartbeats", daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join(_JOIN_S)


def answered(engine: Generates, tasks: Sequence[PromptTask], options: ResponseOptions) -> list[PromptTask]:
    """``tasks`` with their responses. Greedy ones are one batch of the engine, drawn ones are made one by one."""
    waiting = [task for task in tasks if task.num_to_generate]
    found: dict[int, Sequence[int]] = {}
    if options.is_greedy and len(waiting) > 1:
        longest = replace(options.of(waiting[0]), max_new_tokens=max(task.num_to_generate for task in waiting))
        generations = engine.generate([task.input_ids for task in waiting], longest)
        for task, generation in zip(waiting, generations, strict=True):
            found[task.index] = generation.token_ids[: task.num_to_generate]
    else:
        found = {task.index: response(engine, task, options) for task in waiting}
    return [task.answered(found[task.index]) if task.index in found else task for task in tasks]


def record_responses(
    engine: Generates,
    tasks: Sequence[PromptTask],
    path: Path,
    options: ResponseOptions,
    batch_size: int = 1,
    num_at_once: int = 1,
) -> Iterator[int]:
    """Append every task with its response to ``path``, as ``data.format`` tokens; yields how many are there after each
    batch. ``num_at_once`` batches are asked of the engine at a time, from threads where that is more than one.

    A batch is on disk (fsync) before the next begins. What an interrupted call left is kept in whole batches, so
    the composition of every batch, and with it every token, is the same as without the interruption.
    """
    done = _whole_batches(path, batch_size, len(tasks))
    yield done
    batches = [tasks[start : start + batch_size] for start in range(done, len(tasks), batch_size)]
    with path.open("ab") as file, contextlib.closing(_in_order(engine, batches, options, num_at_once)) as found:
        for batch in found:
            file.write(recorded_lines(batch, keep_ids=True))
            file.flush()
            os.fsync(file.fileno())
            done += len(batch)
            yield done


def _in_order(
    engine: Generates, batches: Sequence[Sequence[PromptTask]], options: ResponseOptions, num_at_once: int
) -> Generator[list[PromptTask]]:
    """Each batch answered, some ahead of the one that is waited for."""
    if num_at_once == 1:
        yield from (answered(engine, batch, options) for batch in batches)
        return
    waiting: deque[Future[list[PromptTask]]] = deque()
    pool = ThreadPoolExecutor(num_at_once, thread_name_prefix="responses")
    try:
        for batch in batches:
            waiting.append(pool.submit(answered, engine, batch, options))
            if len(waiting) > 2 * num_at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _whole_batches(path: Path, batch_size: int, num_tasks: int) -> int:
    """Cut ``path`` back to the last whole batch; the number of rows that stay."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        ends, end = [0], 0
        for line in file:
            end += len(line)
            if line.endswith(b"\n"):  # what follows the last newline was torn
                ends.append(end)
        num_rows = len(ends) - 1
        keep = num_rows if num_rows == num_tasks else num_rows - num_rows % batch_size
        file.truncate(ends[keep])
        os.fsync(file.fileno())
    return keep
