"""Finds and loads a draft: from a run directory, a checkpoint, or an export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from specforge.algorithms.base import Algorithm, DraftModel, TargetTables
from specforge.algorithms.catalog import get_algorithm
from specforge.algorithms.eagle3.config import Eagle3DraftConfig, Eagle3Options
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.errors import DraftError
from specforge.export.eagle3_config import PROVENANCE_KEY
from specforge.export.sglang import load_exported_eagle3
from specforge.training.checkpoint import Checkpointer, load_checkpoint


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft with what belongs to it. ``revision`` names the target it was trained on (``None``: not recorded)."""

    path: Path
    algorithm: Algorithm
    config: Eagle3DraftConfig
    draft: DraftModel
    spec: CaptureSpec
    revision: str | None


def find_checkpoint(path: Path) -> Path:
    """``path`` itself when it is a checkpoint, else the newest whole checkpoint of the run in ``path``."""
    if (path / "state.json").exists():
        return path
    for directory in (path / "checkpoints", path / "train" / "checkpoints"):
        checkpoint = Checkpointer(directory).latest()
        if checkpoint is not None:
            return checkpoint.path
    raise DraftError(
        f"{path} holds no checkpoint: expected a run directory, or one of its checkpoints/step-... directories"
    )


def load_draft(path: Path, target: TargetInfo, tables: TargetTables) -> LoadedDraft:
    """Load the draft in ``path`` for ``target``; a draft of another target is refused with what differs."""
    if not path.is_dir():
        raise DraftError(f"{path} is not a directory; give a run directory, a checkpoint or an exported draft")
    if (path / "model.safetensors").exists():
        config, state = load_exported_eagle3(path)
        options, revision, dtype = Eagle3Options(), _exported_revision(path), "float32"
    else:
        checkpoint = load_checkpoint(find_checkpoint(path))
        config, state = Eagle3DraftConfig.from_dict(checkpoint.provenance.draft_config), checkpoint.draft
        options = Eagle3Options.model_validate(checkpoint.provenance.identity["algorithm"])
        revision, dtype = (
            checkpoint.provenance.identity["target_revision"],
            checkpoint.provenance.identity["capture_dtype"],
        )
    check_fits(path, config, target, revision)
    algorithm = get_algorithm(options.model_copy(update={"aux_layers": config.aux_layers}))
    kept = torch.nonzero(state["t2d"]).flatten() if config.draft_vocab_size != config.vocab_size else None
    draft = algorithm.build_draft(config, tables, seed=0, kept_ids=kept)
    draft.load_state_dict({name: tensor.to(draft.state_dict()[name].dtype) for name, tensor in state.items()})
    spec = algorithm.capture_spec(target, dtype)
    return LoadedDraft(path, algorithm, config, draft.eval(), spec, revision)


def _exported_revision(path: Path) -> str | None:
    """The target revision that an export records. Its ``config.json`` was read and checked before."""
    served = json.loads((path / "config.json").read_text(encoding="utf-8"))
    revision: str | None = served[PROVENANCE_KEY].get("target_revision")
    return revision


def check_fits(path: Path, config: Eagle3DraftConfig, target: TargetInfo, revision: str | None) -> None:
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
