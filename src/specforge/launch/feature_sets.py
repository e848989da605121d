"""Captures prompts into a feature set: of ``specforge capture``, and of the samples that a run is evaluated on."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from specforge.contracts.tasks import PromptTask
from specforge.data_plane.encoding import not_finite
from specforge.data_plane.offline import Manifest
from specforge.data_plane.offline_writer import FeatureSetWriter
from specforge.errors import DataError, RunFailed
from specforge.inference.engine import CapturedSample, TargetEngine
from specforge.inference.rollout import is_engine_wide
from specforge.launch.inputs import RunInputs, resolve_device, resolve_dtype
from specforge.launch.plan import sample_bytes
from specforge.monitor.console import progress
from specforge.prompts.recorded import recorded_lines

FILE_OVERHEAD_BYTES = 8192
"""At most so much of a file is header, or the unused end of its last block."""
MAX_REASON_CHARS = 500
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def capture_tasks(inputs: RunInputs, to: Path, engine: Callable[[], TargetEngine]) -> tuple[Manifest, int]:
    """Capture what the feature set ``to`` lacks of ``inputs.tasks``: its manifest, and how many samples it had before.

    ``engine`` is asked for the target where a sample is missing. No other process may write to ``to``.
    More failures than ``control_plane.max_quarantined`` are a :class:`RunFailed`.
    """
    with contextlib.closing(_open(inputs, to)) as writer:
        num_kept = len(writer.entries)
        _capture_missing(inputs, writer, engine)
        manifest = writer.finish()
    return manifest, num_kept


def _open(inputs: RunInputs, to: Path) -> FeatureSetWriter:
    target, device = inputs.target, resolve_device(inputs.config.target.device)
    manifest = Manifest(
        target_revision=target.revision,
        target_path=target.path,
        target_dtype=str(resolve_dtype(inputs.config.target.dtype, device)).removeprefix("torch."),
        spec=inputs.spec,
        fingerprint=inputs.spec.fingerprint,
        hidden_size=target.hidden_size,
        prompts_sha256="",
        num_prompts=0,
    )
    return FeatureSetWriter(to, manifest, recorded_lines(inputs.tasks), [task.sample_id for task in inputs.tasks])


def _capture_missing(inputs: RunInputs, writer: FeatureSetWriter, make: Callable[[], TargetEngine]) -> None:
    names = set(writer.missing())
    tasks = [task for task in inputs.tasks if task.sample_id in names]
    if not tasks:
        return
    _check_space(inputs, writer, tasks)
    engine = make()
    max_failed, num_failed = _max_failed(inputs), 0
    done = len(inputs.tasks) - len(tasks)
    captured = engine.capture(tasks, inputs.spec)
    with progress("capturing", len(inputs.tasks), "samples", done) as bar:
        for number, task in enumerate(tasks, 1):
            try:
                sample = next(captured)
            except Exception as error:
                if is_engine_wide(error):
                    raise
                reason: str | None = f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS]
                captured = engine.capture(tasks[number:], inputs.spec)  # an iterator that raised is over
            else:
                reason = _store(writer, task, sample)
            if reason is not None:
                num_failed += 1
                writer.fail(task.sample_id, reason)
                if num_failed > max_failed:
                    raise RunFailed(
                        f"{num_failed} samples failed, more than control_plane.max_quarantined = {max_failed}; the "
                        f"last one, sample {task.sample_id!r}: {reason}"
                    )
            done += 1
            bar.update_to(done)


def _store(writer: FeatureSetWriter, task: PromptTask, sample: CapturedSample) -> str | None:
    """Put ``sample`` into the set; why not, where its features are damaged."""
    damaged = not_finite(sample.tensors)
    if damaged is not None:
        return f"the target gave NaN or infinite values in feature {damaged!r}"
    writer.add(task.sample_id, task.num_tokens, task.loss_spans, sample.tensors)
    return None


def _max_failed(inputs: RunInputs) -> int:
    tolerated = inputs.config.control_plane.max_quarantined
    return tolerated if isinstance(tolerated, int) else math.floor(tolerated * len(inputs.tasks))


def _needed_bytes(inputs: RunInputs, tasks: Sequence[PromptTask]) -> int:
    """What the files of ``tasks`` take on the disk, at most."""
    return sum(sample_bytes(inputs.target, inputs.spec, task.num_tokens) + FILE_OVERHEAD_BYTES for task in tasks)


def _check_space(inputs: RunInputs, writer: FeatureSetWriter, tasks: Sequence[PromptTask]) -> None:
    needed, free = _needed_bytes(inputs, tasks), shutil.disk_usage(writer.directory).free
    if needed > free:
        raise DataError(
            f"{writer.directory}: the features of {len(tasks):,} samples take up to {needed:,} bytes, but {free:,} are "
            f"free there; choose another directory, make room, or lower data.limit or data.max_length"
        )


@contextlib.contextmanager
def full_disk_explained(inputs: RunInputs, to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"{to}: {error.strerror}; what was captured is kept. Make room (the whole set takes up to "
            f"{_needed_bytes(inputs, inputs.tasks):,} bytes), and run the same command again"
        ) from error


@contextlib.contextmanager
def failures_explained(to: Path) -> Iterator[None]:
    try:
        yield
    except RunFailed as error:
        raise RunFailed(
            f"{error}. What was captured is kept in {to}: run the same command again once the cause is gone, or "
            "tolerate more"
        ) from error
