"""``specforge capture``: runs the target over the prompts of a run once and keeps the features."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specforge.config.run import RunConfig
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.encoding import not_finite
from specforge.data_plane.offline import Manifest
from specforge.data_plane.offline_writer import FeatureSetWriter
from specforge.errors import ConfigError, DataError, RunFailed
from specforge.inference.engine import TargetEngine
from specforge.inference.rollout import ENGINE_WIDE
from specforge.launch.compose import make_engine
from specforge.launch.inputs import RunInputs, read_run_inputs, resolve_device, resolve_dtype
from specforge.launch.lock import run_lock
from specforge.launch.plan import sample_bytes
from specforge.monitor.console import progress
from specforge.prompts.recorded import recorded_lines

FILE_OVERHEAD_BYTES = 8192
"""At most so much of a file is header, or the unused end of its last block."""
MAX_REASON_CHARS = 500
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def capture(config: RunConfig, to: Path) -> dict[str, Any]:
    """Capture what is missing in the feature set ``to``; what it holds then, as JSON data.

    Whatever stops it (a signal, a kill, a full disk), the same call goes on with the samples that are missing, and the
    bytes of the set are the same in the end. Samples that failed are tried again. More failures than
    ``control_plane.max_quarantined`` are a :class:`RunFailed`.
    """
    if config.data.features is not None:
        raise ConfigError(
            "specforge capture reads prompts from data.path, but this run has data.features; set data.path"
        )
    inputs = read_run_inputs(config)
    with run_lock(to), _full_disk_explained(inputs, to), contextlib.closing(_open(inputs, to)) as writer:
        num_kept = len(writer.entries)
        _capture_missing(inputs, writer)
        manifest = writer.finish()
    return {
        "path": str(to),
        "num_samples": manifest.num_prompts,
        "num_captured": manifest.num_captured - num_kept,
        "num_kept": num_kept,
        "num_failed": manifest.num_failed,
        "total_bytes": manifest.total_bytes,
        "target_revision": manifest.target_revision,
        "aux_layers": list(manifest.spec.aux_layers),
        "capture_dtype": manifest.spec.dtype,
    }


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


def _capture_missing(inputs: RunInputs, writer: FeatureSetWriter) -> None:
    names = set(writer.missing())
    tasks = [task for task in inputs.tasks if task.sample_id in names]
    if not tasks:
        return
    _check_space(inputs, writer, tasks)
    engine = make_engine(inputs.config, inputs.target)
    max_failed, num_failed = _max_failed(inputs), 0
    done = len(inputs.tasks) - len(tasks)
    with progress("capturing", len(inputs.tasks), "samples", done) as bar:
        for task in tasks:
            reason = _capture_one(inputs, engine, writer, task)
            if reason is not None:
                num_failed += 1
                writer.fail(task.sample_id, reason)
                if num_failed > max_failed:
                    raise RunFailed(
                        f"{num_failed} samples failed, more than control_plane.max_quarantined = {max_failed}; the "
                        f"last one, sample {task.sample_id!r}: {reason}. What was captured is kept in "
                        f"{writer.directory}: run the same command again once the cause is gone, or tolerate more"
                    )
            done += 1
            bar.update_to(done)


def _capture_one(inputs: RunInputs, engine: TargetEngine, writer: FeatureSetWriter, task: PromptTask) -> str | None:
    """Capture and store ``task``; why that failed, where it was the prompt's failure."""
    try:
        (sample,) = engine.capture([task], inputs.spec)
    except ENGINE_WIDE:
        raise
    except Exception as error:  # noqa: BLE001 - whatever one prompt does to the engine is that prompt's failure
        return f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS]
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
def _full_disk_explained(inputs: RunInputs, to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"{to}: {error.strerror}; what was captured is kept. Make room (the whole set takes up to "
            f"{_needed_bytes(inputs, inputs.tasks):,} bytes), and run the same command again"
        ) from error
