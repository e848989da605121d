"""Checkpoints on disk: complete or absent, never torn. The checkpoint is the truth that the ledger is reconciled to.

    RUN_DIR/checkpoints/step-00000100/
        draft/model.safetensors, draft/config.json    the draft under its served names, in training precision
        shards/*.safetensors                          fp32 masters and moments, a file a rank (DCP's safetensors layout)
        state.json                                    step, data position, identity, the ledger's state, the last
                                                      evaluation, and size and SHA-256 of the other files
    RUN_DIR/checkpoints/latest, best                  links to two of them

A checkpoint is written to a temporary directory, synced, and renamed; ``state.json`` is checked against the files on
load, so a damaged checkpoint is skipped with a warning and the one before it is used. Nothing is ever unpickled.
Written by :mod:`specforge.training.checkpointer`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from specforge.errors import DraftError

FORMAT_VERSION = 3
DRAFT_WEIGHTS, DRAFT_CONFIG, SHARDS, STATE_FILE = "draft/model.safetensors", "draft/config.json", "shards", "state.json"
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step-(\d{8})")


class UnknownFormat(DraftError):
    """A checkpoint that another version wrote: not damaged, and not to be replaced."""


@dataclass(frozen=True, slots=True)
class TrainPosition:
    """Where training stands: completed optimizer steps, updates dropped for non-finite gradients, samples left out of
    the loss for non-finite features, and ``num_slots``: in strict order every slot of the run below that number was
    trained, or skipped for good (its prompt is quarantined); in arrival order so many slots were trained.
    """

    step: int = 0
    num_slots: int = 0
    num_skipped_updates: int = 0
    num_nonfinite_samples: int = 0


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a checkpoint says about itself, as JSON data.

    ``identity`` is what must agree between the run that wrote it and the run that resumes; ``draft_config`` is the
    draft's architecture; ``target`` is the encoded ``TargetInfo`` that it was trained on.
    """

    identity: dict[str, Any]
    draft_config: dict[str, Any]
    target: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """What ``state.json`` says. ``files`` are the sizes and hashes of the files beside it, by path; ``ledger`` is what
    the ledger wanted kept; ``evaluation`` the metrics of the draft at this step, empty where it was not evaluated;
    ``best``: it was the best of the run when it was written.
    """

    path: Path
    position: TrainPosition
    provenance: Provenance
    ledger: dict[str, Any]
    evaluation: dict[str, Any]
    best: bool
    files: dict[str, dict[str, Any]]


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories in step order."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def newest_whole(directory: Path) -> CheckpointState | None:
    """The newest checkpoint in ``directory`` that is whole; ``None`` where there is no checkpoint.

    Damaged ones are named in a warning. Raises :class:`DraftError` where all are damaged, or the newest is of another
    format: going on from the start would replace them.
    """
    found = list_checkpoints(directory)
    for path in reversed(found):
        try:
            return verified(read_state(path))
        except UnknownFormat:
            raise
        except DraftError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
    if found:
        raise DraftError(
            f"none of the {len(found)} checkpoints in {directory} is whole; restore one, or move the directory away to "
            "begin anew"
        )
    return None


def newest_state(directory: Path) -> CheckpointState | None:
    """The state of the newest checkpoint that has a readable one; its tensors are not looked at."""
    for path in reversed(list_checkpoints(directory)):
        with contextlib.suppress(DraftError):
            return read_state(path)
    return None


def best_state(directory: Path) -> CheckpointState | None:
    """The state of the checkpoint that is marked as the best, if one is and its draft is whole."""
    try:
        return verified(read_state((directory / BEST).resolve(strict=True)), DRAFT_WEIGHTS)
    except FileNotFoundError:
        return None
    except DraftError as error:
        warnings.warn(f"the best checkpoint is damaged: {error}", stacklevel=2)
        return None


def read_state(path: Path) -> CheckpointState:
    """``state.json`` of the checkpoint in ``path``; anything wrong with it is a :class:`DraftError`."""
    state_file = path / STATE_FILE
    try:
        state = json.loads(state_file.read_text())
    except (OSError, ValueError) as error:
        raise DraftError(f"{state_file} is not a readable checkpoint state: {error}") from None
    if not isinstance(state, dict):
        raise DraftError(f"{state_file} holds no JSON object")
    if state.get("format") != FORMAT_VERSION:
        raise UnknownFormat(
            f"{state_file} has checkpoint format {state.get('format')}, this build reads {FORMAT_VERSION}; resume with "
            "the version that wrote it, or choose another run_dir"
        )
    try:
        position = TrainPosition(**state["position"])
        provenance = Provenance(state["identity"], state["draft_config"], state["target"])
        ledger, evaluation, files = state["ledger"], state["evaluation"], state["files"]
        best = bool(state["best"])
    except (KeyError, TypeError) as error:
        raise DraftError(f"{state_file} is not a whole checkpoint state: {error}") from None
    for key, value in (("ledger", ledger), ("evaluation", evaluation), ("files", files)):
        if not isinstance(value, dict):
            raise DraftError(f"{state_file}: expected an object under {key!r}, got {type(value).__name__}")
    return CheckpointState(path, position, provenance, ledger, evaluation, best, files)


def verified(state: CheckpointState, below: str = "") -> CheckpointState:
    """``state``, after every one of its files whose path starts with ``below`` was compared with its size and hash."""
    for name, expected in state.files.items():
        file = state.path / name
        try:
            sound = not name.startswith(below) or (file.is_file() and fingerprint(file) == expected)
        except OSError as error:
            raise DraftError(f"{file} cannot be read ({error.strerror})") from error
        if not sound:
            raise DraftError(f"{file} is missing, truncated or changed since the checkpoint was written")
    if DRAFT_WEIGHTS not in state.files:
        raise DraftError(f"{state.path / STATE_FILE} lists no {DRAFT_WEIGHTS}: it is no whole checkpoint")
    return state


def read_draft_tensors(state: CheckpointState) -> dict[str, torch.Tensor]:
    """The draft's served tensors, after a check of their file."""
    path = verified(state, DRAFT_WEIGHTS).path / DRAFT_WEIGHTS
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise DraftError(f"{path} cannot be read ({error})") from None


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as JSON data."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def weights_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
