"""``specforge regenerate``: the target answers the prompts of a run, into a file of tokens that runs train on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge.config.run import RunConfig
from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.errors import ConfigError, PromptRefused, RunFailed, SpecForgeError
from specforge.inference.engine import Generation
from specforge.inference.responses import Generates, record_responses
from specforge.inference.rollout import ENGINE_WIDE
from specforge.launch.engines import open_engine
from specforge.launch.inputs import (
    check_vocabulary,
    read_target_inputs,
    read_tasks,
    tasks_sha256,
    writer_of,
)
from specforge.launch.lock import run_lock
from specforge.monitor.console import progress
from specforge.prompts.recorded import read_recorded
from specforge.prompts.responses import ResponseOptions


def regenerate(config: RunConfig, to: Path, batch_size: int = 1) -> dict[str, Any]:
    """Write what is missing of the file ``to``; what it holds then, as JSON data.

    Whatever stops it (a signal, a kill, a full disk), the same call goes on with the prompts that are missing, and the
    file is the same in the end. Until it is whole it is in ``TO.partial/``; ``TO.origin.json`` says what it is made of.
    """
    options = ResponseOptions.of_run(config.data.generate, config.seed)
    if options is None:
        raise ConfigError(
            "specforge regenerate answers prompts, but this run has no data.generate; set data.generate, for example "
            "data.generate.max_new_tokens=512"
        )
    inputs = read_target_inputs(config)
    tasks = read_tasks(config, inputs)
    check_vocabulary(config, tasks, inputs.target)
    origin = {
        "data_sha256": tasks_sha256(tasks),
        "num_samples": len(tasks),
        "generate": {**options.identity(), **writer_of(config)},
        "target_revision": inputs.target.revision,
        "batch_size": batch_size,
    }
    responses = Responses(to, origin)
    with responses.held(), contextlib.ExitStack() as resources:
        ask = Asking(options, batch_size, _num_at_once(config))
        num_kept = responses.record(tasks, ask, lambda: open_engine(config, inputs.target, resources))
    return {"path": str(to), "num_generated": len(tasks) - num_kept, "num_kept": num_kept, **_counted(to), **origin}


@dataclass(frozen=True, slots=True)
class Asking:
    """``batch_size`` prompts are one call of the engine, of which there are ``num_at_once`` at a time."""

    options: ResponseOptions
    batch_size: int
    num_at_once: int


class Responses:
    """The file ``path``, made of what ``origin`` says, and the directory in which it grows."""

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        self._path, self._origin = path, origin
        self._partial = path.with_name(f"{path.name}.partial")
        self._origin_file = path.with_name(f"{path.name}.origin.json")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No other process writes meanwhile. Of a file that is whole nothing but the file is left behind."""
        with run_lock(self._partial):
            try:
                yield
            finally:
                if self._path.exists():
                    shutil.rmtree(self._partial, ignore_errors=True)  # who waited for the lock may have been faster

    def record(self, tasks: list[PromptTask], ask: Asking, make: Callable[[], Generates]) -> int:
        """Write what is missing; how many responses were there before. ``make`` is called where one is missing."""
        if self._path.exists():
            self._check(self._origin_file)
            return len(tasks)
        started = self._partial / "origin.json"
        if started.exists():
            self._check(started)
        else:
            _write(started, self._origin)
        growing = self._partial / "responses.jsonl"
        recorded = record_responses(_Made(make), tasks, growing, ask.options, ask.batch_size, ask.num_at_once)
        done = num_kept = next(recorded)
        with progress("responses", len(tasks), "prompts", num_kept) as bar:
            try:
                for done in recorded:
                    bar.update_to(done)
            except Exception as error:
                if isinstance(error, (SpecForgeError, OSError, *ENGINE_WIDE)) and not isinstance(error, PromptRefused):
                    raise
                raise RunFailed(
                    f"the target could not answer {_named(tasks[done : done + ask.batch_size])} "
                    f"({type(error).__name__}: {error}). What was written is kept: run the same command again once "
                    "the cause is gone"
                ) from error
        _write(self._origin_file, self._origin)
        growing.replace(self._path)
        _sync(self._path.parent)
        return num_kept

    def _check(self, file: Path) -> None:
        """Refuse to go on with, or to take for ours, what was made of something else."""
        try:
            found = json.loads(file.read_text())
        except (FileNotFoundError, ValueError):
            raise ConfigError(
                f"{self._path} is there, but {file} does not say that specforge regenerate wrote it; choose another "
                "--to, or move it away"
            ) from None
        for key in sorted({*found, *self._origin}):
            if found.get(key) != self._origin.get(key):
                raise ConfigError(
                    f"{self._path} was begun with {key} = {found.get(key)!r}, but this run has "
                    f"{self._origin.get(key)!r}; choose another --to, or the configuration that it was begun with"
                )


class _Made:
    """A target that is loaded when it is first asked."""

    def __init__(self, make: Callable[[], Generates]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._engine: Generates | None = None

    def generate(self, prompts: Sequence[Sequence[int]], options: Generate) -> list[Generation]:
        with self._lock:
            self._engine = self._engine or self._make()
        return self._engine.generate(prompts, options)


def _num_at_once(config: RunConfig) -> int:
    """Of the run's servers, which work on several requests each; a target in this process has one thread."""
    servers = config.target.servers
    return 1 if servers is None else servers.max_in_flight * max(1, len(servers.urls))


def _named(tasks: Sequence[PromptTask]) -> str:
    first, last = tasks[0].sample_id, tasks[-1].sample_id
    return f"sample {first}" if len(tasks) == 1 else f"one of the samples {first} to {last}"


def _counted(path: Path) -> dict[str, int]:
    tasks = read_recorded(path)
    return {
        "num_tokens": sum(task.num_tokens for task in tasks),
        "num_loss_tokens": sum(task.num_loss_tokens for task in tasks),
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    """Write, sync and rename, so that nobody ever sees half a file."""
    partial = path.with_name(f".{path.name}.new")
    with partial.open("w") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
