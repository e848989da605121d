"""``specforge capture``: runs the target over the prompts of a run once and keeps the features."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from specforge.config.run import RunConfig
from specforge.errors import ConfigError
from specforge.launch.engines import open_engine
from specforge.launch.feature_sets import capture_tasks, failures_explained, full_disk_explained
from specforge.launch.inputs import read_run_inputs
from specforge.launch.lock import run_lock


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
    if config.data.generate is not None:
        raise ConfigError(
            "specforge capture runs the target over answers that are there, but this run has data.generate; write them "
            "with specforge regenerate, then capture that file"
        )
    inputs = read_run_inputs(config)
    with run_lock(to), full_disk_explained(inputs, to), failures_explained(to), contextlib.ExitStack() as resources:
        manifest, num_kept = capture_tasks(inputs, to, lambda: open_engine(config, inputs.target, resources))
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
