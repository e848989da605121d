"""Finds and loads a draft: from a run directory, a checkpoint, or an export."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from specforge.algorithms.base import Algorithm, DraftModel, TargetTables
from specforge.algorithms.catalog import algorithm_type
from specforge.algorithms.draft_config import DraftConfig
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import DraftError
from specforge.export.artifact import WEIGHTS
from specforge.export.draft import TrainedDraft, read_export
from specforge.training.checkpoint import (
    DRAFT_WEIGHTS,
    STATE_FILE,
    list_checkpoints,
    read_draft_tensors,
    read_state,
    verified,
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft with what belongs to it. ``revision`` names the target it was trained on (``None``: not recorded)."""

    path: Path
    algorithm: Algorithm
    config: DraftConfig
    draft: DraftModel
    spec: CaptureSpec
    revision: str | None


def find_checkpoint(path: Path) -> Path:
    """``path`` itself when it is a checkpoint (a link such as ``latest`` or ``best`` leads to one), else the newest
    checkpoint of the run in ``path`` whose draft is whole; damaged ones are named in a warning.
    """
    if (path / STATE_FILE).exists():
        return path.resolve()
    for directory in (path / "checkpoints", path / "train" / "checkpoints"):
        for checkpoint in reversed(list_checkpoints(directory)):
            try:
                verified(read_state(checkpoint), DRAFT_WEIGHTS)
            except DraftError as error:
                _LOG.warning("skipping a damaged checkpoint: %s", error)
            else:
                return checkpoint
    raise DraftError(
        f"{path} holds no checkpoint: expected a run directory, or one of its checkpoints/step-... directories"
    )


def read_draft(path: Path) -> TrainedDraft:
    """What is on disk in ``path``: a run directory (its newest checkpoint), a checkpoint, or an export."""
    if not path.is_dir():
        raise DraftError(f"{path} is not a directory; give a run directory, a checkpoint or an exported draft")
    if (path / WEIGHTS).exists():
        return read_export(path)
    checkpoint = read_state(find_checkpoint(path))
    identity = checkpoint.provenance.identity
    config_type = algorithm_type(identity["algorithm"]["name"]).config_type
    return TrainedDraft(
        identity["algorithm"],
        config_type.from_dict(checkpoint.provenance.draft_config),
        read_draft_tensors(checkpoint),
        identity["capture_dtype"],
        identity["target_revision"],
    )


def load_draft(path: Path, target: TargetInfo, tables: TargetTables) -> LoadedDraft:
    """Load the draft in ``path`` for ``target``; a draft of another target is refused with what differs."""
    found = read_draft(path)
    check_fits(path, found.config, target, found.target_revision)
    algorithm = found.algorithm()
    spec = algorithm.capture_spec(found.config, found.capture_dtype)
    return LoadedDraft(path, algorithm, found.config, found.build(tables), spec, found.target_revision)


def check_fits(path: Path, config: DraftConfig, target: TargetInfo, revision: str | None) -> None:
    """Refuse a draft that was made for another target."""
    if revision is not None and revision != target.revision:
        raise DraftError(
            f"{path} was trained on target revision {revision[:12]}, but {target.path} is {target.revision[:12]}; "
            "give the target directory that the draft was trained on"
        )
    for what, ours, theirs in (
        ("hidden size", target.hidden_size, config.target_hidden_size),
        ("vocabulary", target.vocab_size, config.vocab_size),
        ("number of layers", target.num_layers, config.target_num_layers),
    ):
        if ours != theirs:
            raise DraftError(f"{path} is a draft for a target with {what} {theirs}, but {target.path} has {ours}")
