"""Writes checkpoints beside the training, finds them again, and rotates them.

A save copies what this rank holds and returns; a thread writes the copy with ``torch.distributed.checkpoint``, a file a
rank. When all ranks have theirs on disk the leader writes ``state.json``, renames the directory and drops old ones. A
process that is killed at any moment leaves the checkpoint before it, whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from specforge.errors import DraftError, RunFailed
from specforge.faults import fault_point
from specforge.training.checkpoint import (
    BEST,
    DRAFT_CONFIG,
    DRAFT_WEIGHTS,
    FORMAT_VERSION,
    LATEST,
    SHARDS,
    STATE_FILE,
    CheckpointState,
    Provenance,
    TrainPosition,
    checkpoint_path,
    fingerprint,
    list_checkpoints,
    newest_whole,
    read_state,
)
from specforge.training.ranks import Ranks

_LOG = logging.getLogger(__name__)

SETTLE_S = 20.0
"""How long the write of a failed run's last checkpoint may take on."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one checkpoint is made of. Tensors may change again as soon as ``save`` has returned.

    ``draft``, ``ledger`` and ``evaluation`` are the leader's; nobody looks at those of the others. ``training_state``
    are this rank's (shards of) masters and moments; ``best``: it is the best so far.
    """

    position: TrainPosition
    provenance: Provenance
    draft: Mapping[str, Tensor]
    training_state: Mapping[str, Tensor]
    ledger: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    best: bool = False


class Checkpointer:
    """Checkpoints below one directory, which all ranks see. Every rank makes the same calls.

    ``keep_last`` of them are kept, besides the best one and those at multiples of ``keep_every`` steps.
    """

    def __init__(
        self, directory: Path, keep_last: int = 2, keep_every: int | None = None, ranks: Ranks | None = None
    ) -> None:
        self.directory = directory
        self._keep_last = max(1, keep_last)
        self._keep_every = keep_every
        self._ranks = ranks or Ranks()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, snapshot: Snapshot, on_durable: Callable[[], None] = lambda: None) -> float:
        """Start to write ``snapshot``; the seconds for which it held the training up.

        ``on_durable`` is called in another thread of the leader when the checkpoint is complete on disk. Waits for the
        save before this one, and raises what that one failed with.
        """
        started = time.perf_counter()
        self.wait()
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in snapshot.training_state.items()}
        draft = {}
        if self._ranks.is_leader:
            draft = {name: tensor.detach().to("cpu", copy=True) for name, tensor in snapshot.draft.items()}
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, draft, state, on_durable), name="checkpoint", daemon=True
        )
        self._thread.start()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Until nothing is being written; raises :class:`RunFailed` when a write failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def settle(self) -> None:
        """For a run that failed already: let a write end that can, and say nothing of one that cannot."""
        if self._thread is not None:
            self._thread.join(SETTLE_S)

    def check(self) -> None:
        """Raise what a write failed with, if one has."""
        if self._failure is not None:
            self.wait()

    def latest(self) -> CheckpointState | None:
        """The newest whole checkpoint, as the leader finds it; the mark of the best one is mended where a kill left it
        behind. Raises :class:`DraftError` where there are checkpoints and none is whole.
        """
        found = newest_whole(self.directory) if self._ranks.is_leader else None
        if found is not None and found.best:
            _point(self.directory / BEST, found.path)
        name = self._ranks.main.broadcast(b"" if found is None else found.path.name.encode()).decode()
        return read_state(self.directory / name) if name else None

    def load(self, state: CheckpointState, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors``, whole ones or this rank's shards, whatever number of ranks wrote them.

        Names or shapes that differ from what was saved are a :class:`DraftError`.
        """
        reader = HuggingFaceStorageReader(str(state.path / SHARDS))
        found = reader.read_metadata().state_dict_metadata
        saved = {name: entry.size for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        for name in sorted(set(saved) ^ set(tensors)):
            has, lacks = ("the checkpoint", "this run") if name in saved else ("this run", "the checkpoint")
            raise DraftError(f"{state.path}: {has} has the training state {name!r}, {lacks} does not")
        for name, tensor in tensors.items():
            if tuple(saved[name]) != tuple(tensor.shape):
                raise DraftError(
                    f"{state.path}: {name!r} has shape {list(saved[name])}, this run's has {list(tensor.shape)}"
                )
        _allow_single_process()
        group = self._ranks.main.group
        try:
            load_distributed(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
        except CheckpointException as error:  # a BaseException, which no boundary would explain
            raise DraftError(f"{state.path}: the training state cannot be read ({error})") from error

    # In the thread

    def _run(
        self, snapshot: Snapshot, draft: dict[str, Tensor], state: dict[str, Tensor], on_durable: Callable[[], None]
    ) -> None:
        try:
            self._write(snapshot, draft, state)
            if self._ranks.is_leader:
                on_durable()
        except BaseException as error:  # noqa: BLE001 - the thread boundary: the training thread raises it
            self._failure = error

    def _write(self, snapshot: Snapshot, draft: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        final = checkpoint_path(self.directory, snapshot.position.step)
        partial = final.with_name(f".{final.name}.partial")
        step = snapshot.position.step
        self._agree(step, lambda: _empty(partial) if self._ranks.is_leader else {})
        own = self._agree(step, lambda: self._write_own(partial, snapshot, draft, state))
        files = {name: found for part in own for name, found in part.items()}
        self._agree(step, lambda: self._publish(partial, final, snapshot, files) if self._ranks.is_leader else {})

    def _agree(self, step: int, work: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """What ``work`` gives on each rank; raises on all of them where one failed."""
        try:
            mine: dict[str, Any] = {"done": work()}
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - the others wait for a word of this rank
            mine = {"failed": _causes(error, self._ranks.rank)}
        answers = [json.loads(text) for text in self._ranks.background.collect(json.dumps(mine).encode())]
        failed = {cause: None for answer in answers for cause in answer.get("failed", [])}
        if failed:
            raise RunFailed(
                f"the checkpoint of step {step} could not be written ({'; '.join(failed)}); checkpoints before it are "
                "untouched: make room or repair the disk, then resume the run"
            )
        return [answer["done"] for answer in answers]

    def _write_own(
        self, partial: Path, snapshot: Snapshot, draft: dict[str, Tensor], state: dict[str, Tensor]
    ) -> dict[str, Any]:
        """This rank's files; their sizes and hashes by path."""
        _allow_single_process()
        group = self._ranks.background.group
        writer = HuggingFaceStorageWriter(str(partial / SHARDS), save_distributed=True)
        save_distributed(state, storage_writer=writer, process_group=group, no_dist=group is None)
        written = sorted((partial / SHARDS).glob(f"shard-{self._ranks.rank + 1:05d}-*"))
        if self._ranks.is_leader:
            weights, config = partial / DRAFT_WEIGHTS, partial / DRAFT_CONFIG
            weights.parent.mkdir()
            safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in draft.items()}, weights)
            config.write_text(json.dumps(snapshot.provenance.draft_config, indent=1) + "\n")
            written += [weights, config]
        for path in written:
            _sync(path)
        return {str(path.relative_to(partial)): fingerprint(path) for path in written}

    def _publish(self, partial: Path, final: Path, snapshot: Snapshot, files: dict[str, Any]) -> dict[str, Any]:
        state = {
            "format": FORMAT_VERSION,
            "position": asdict(snapshot.position),
            **asdict(snapshot.provenance),
            "ledger": snapshot.ledger,
            "evaluation": snapshot.evaluation,
            "best": snapshot.best,
            "files": files,
        }
        (partial / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
        for path in (partial / STATE_FILE, *(partial / name for name in (SHARDS, "draft")), partial):
            _sync(path)
        fault_point("checkpoint.written")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if snapshot.best:
            _point(self.directory / BEST, final)
        _point(self.directory / LATEST, final)
        _sync(self.directory)
        fault_point("checkpoint.renamed")
        self._rotate(final)
        return {}

    def _rotate(self, newest: Path) -> None:
        # Those above the newest one are damaged: training came back to reach it.
        older = [path for path in list_checkpoints(self.directory) if path.name < newest.name]
        best = (self.directory / BEST).resolve().name
        every = self._keep_every
        for path in older[: max(0, len(older) + 1 - self._keep_last)]:
            if path.name != best and not (every and int(path.name.removeprefix("step-")) % every == 0):
                _remove(path)
        for leftover in self.directory.glob(".step-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)


def _empty(directory: Path) -> dict[str, Any]:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / SHARDS).mkdir()
    return {}


def _remove(old: Path) -> None:
    """One that somebody reads from a mount may stay; the next rotation tries again."""
    try:
        shutil.rmtree(old)
    except OSError as error:
        _LOG.warning("the old checkpoint %s is not removed: %s", old, error)


def _causes(error: BaseException, rank: int) -> list[str]:
    """A line for each rank that failed, as ``error`` of ``rank`` says it."""
    failures = {rank: error}
    if isinstance(error, CheckpointException):
        failures = {index: wrapped[0] for index, wrapped in error.failures.items()}
    return [f"rank {index}: {type(cause).__name__}: {str(cause).splitlines()[0]}" for index, cause in failures.items()]


def _point(link: Path, to: Path) -> None:
    """Make or move the link ``link``, at once."""
    moved = link.with_name(f".{link.name}.moved")
    with contextlib.suppress(FileNotFoundError):
        moved.unlink()
    moved.symlink_to(to.name)
    moved.replace(link)


def _allow_single_process() -> None:
    """One process is no mistake; a filter that is set again changes nothing."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
