"""Runs over captured features (``data.features``): which prompts they have, and whether every byte is as it was."""

from __future__ import annotations

import logging

from specforge.config.run import RunConfig
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.offline import (
    INDEX_FILE,
    PROMPTS_FILE,
    FailedSample,
    FeatureSet,
    check_files,
    check_prompts,
    check_same_capture,
    read_manifest,
)
from specforge.errors import DataError
from specforge.monitor.console import progress
from specforge.prompts.recorded import read_recorded

_LOG = logging.getLogger(__name__)


def read_feature_prompts(config: RunConfig, target: TargetInfo, spec: CaptureSpec) -> list[PromptTask]:
    """The prompts of ``data.features``, first ``data.limit`` of them, with the ids of the run that captured them.

    Raises :class:`DataError` for a set that is incomplete, of another target or of another capture spec, and for
    prompts that the options of ``data`` would cut or skip. Reads no features: see :func:`verify_features`.
    """
    directory, options = config.data.features, config.data
    assert directory is not None
    check_same_capture(directory, read_manifest(directory), (target.path, target.revision), spec)
    tasks = read_recorded(directory / PROMPTS_FILE, options.limit)
    longest = max(task.num_tokens for task in tasks)
    if longest > options.max_length:
        raise DataError(
            f"{directory / PROMPTS_FILE}: data.max_length is {options.max_length}, but the features have samples of up "
            f"to {longest} tokens, which cannot be cut any more; set data.max_length to {longest} or more, or capture "
            "again with it"
        )
    fewest = min(task.num_loss_tokens for task in tasks)
    if fewest < options.min_loss_tokens:
        raise DataError(
            f"{directory / PROMPTS_FILE}: data.min_loss_tokens is {options.min_loss_tokens}, but the features have "
            f"samples with {fewest}, which would have to be skipped; set data.min_loss_tokens to {fewest} or less, or "
            "capture again with it"
        )
    return tasks


def verify_features(config: RunConfig, tasks: list[PromptTask]) -> None:
    """Check that every sample of ``tasks`` is in ``data.features`` as it was captured; a run without it passes.

    ``data.verify`` says how much of each file is read. Raises :class:`DataError` that names the file.
    """
    directory = config.data.features
    if directory is None:
        return
    features = FeatureSet(directory)
    check_prompts(directory, features.manifest)
    missing = next((task.sample_id for task in tasks if task.sample_id not in features.entries), None)
    if missing is not None:
        raise DataError(f"{directory / INDEX_FILE}: sample {missing!r} of {PROMPTS_FILE} is not listed; capture again")
    entries = [features.entries[task.sample_id] for task in tasks]
    with progress("verifying", len(entries), "files") as bar:
        check_files(directory, entries, checksums=config.data.verify == "full", on_file=bar.update_to)
    num_failed = sum(isinstance(entry, FailedSample) for entry in entries)
    if num_failed:
        _LOG.warning("%s: %d of %d samples could not be captured", directory, num_failed, len(entries))
