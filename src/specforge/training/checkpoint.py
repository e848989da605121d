"""Checkpoints: complete or absent, never torn. The checkpoint is the truth that the ledger is reconciled to.

    RUN_DIR/checkpoints/step-00000100/
        draft.safetensors       the draft under its served names, in training precision
        optimizer.safetensors   fp32 masters and moments
        state.json              step, data position, identity, the ledger's state, and size and SHA-256 of the two files

A checkpoint is written to a temporary directory, synced, and renamed; ``state.json`` is checked against the files on
load, so a damaged checkpoint is skipped with a warning and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from specforge.errors import DraftError
from specforge.faults import fault_point

_NAME = re.compile(r"step-(\d{8})")
_FILES = ("draft.safetensors", "optimizer.safetensors")
FORMAT_VERSION = 2


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
    """What ``state.json`` says; ``files`` are the sizes and hashes of the files beside it, ``ledger`` what the ledger
    wanted kept.
    """

    path: Path
    position: TrainPosition
    provenance: Provenance
    ledger: dict[str, Any]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint."""

    path: Path
    position: TrainPosition
    provenance: Provenance
    ledger: dict[str, Any]
    draft: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


class Checkpointer:
    """Writes, rotates and finds checkpoints below one directory."""

    def __init__(self, directory: Path, keep_last: int = 2) -> None:
        self._directory = directory
        self._keep_last = max(1, keep_last)

    def save(
        self,
        position: TrainPosition,
        tensors: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
        provenance: Provenance,
        ledger: dict[str, Any],
    ) -> Path:
        """Write (draft, optimizer) ``tensors`` and the ``ledger``'s JSON; complete on disk when it returns."""
        self._directory.mkdir(parents=True, exist_ok=True)
        final = self._directory / f"step-{position.step:08d}"
        if _is_complete(final, position, ledger):  # a resumed run reached this step again: the same bits are there
            return final
        partial = self._directory / f".{final.name}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files: dict[str, dict[str, Any]] = {}
        for name, content in zip(_FILES, tensors, strict=True):
            safetensors.torch.save_file({key: value.contiguous() for key, value in content.items()}, partial / name)
            files[name] = {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
            _sync(partial / name)
        state = {
            "format": FORMAT_VERSION,
            "position": asdict(position),
            **asdict(provenance),
            "ledger": ledger,
            "files": files,
        }
        (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        _sync(partial / "state.json")
        _sync(partial)
        fault_point("checkpoint.written")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(self._directory)
        fault_point("checkpoint.renamed")
        self._rotate(final)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or ``None``. Damaged ones are named in a warning."""
        for path in reversed(list_checkpoints(self._directory)):
            try:
                return load_checkpoint(path)
            except DraftError as error:
                warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
        return None

    def newest_state(self) -> CheckpointState | None:
        """The state of the newest checkpoint that has a readable one; its tensors are not looked at."""
        for path in reversed(list_checkpoints(self._directory)):
            with contextlib.suppress(DraftError):
                return read_state(path)
        return None

    def _rotate(self, newest: Path) -> None:
        # Those above the newest one are damaged: training came back to reach it.
        older = [path for path in list_checkpoints(self._directory) if path.name < newest.name]
        for path in older[: max(0, len(older) + 1 - self._keep_last)]:
            shutil.rmtree(path)
        for leftover in self._directory.glob(".step-*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories in step order."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def read_state(path: Path) -> CheckpointState:
    """``state.json`` of the checkpoint in ``path``; anything wrong with it is a :class:`DraftError`."""
    state_file = path / "state.json"
    try:
        state = json.loads(state_file.read_text())
    except (OSError, ValueError) as error:
        raise DraftError(f"{state_file} is not a readable checkpoint state: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise DraftError(f"{state_file}: this build reads checkpoint format {FORMAT_VERSION}")
    try:
        position = TrainPosition(**state["position"])
        provenance = Provenance(state["identity"], state["draft_config"], state["target"])
        ledger, files = state["ledger"], {name: state["files"][name] for name in _FILES}
    except (KeyError, TypeError) as error:
        raise DraftError(f"{state_file} is not a whole checkpoint state: {error}") from None
    if not isinstance(ledger, dict):
        raise DraftError(f"{state_file}: expected an object under 'ledger', got {type(ledger).__name__}")
    return CheckpointState(path, position, provenance, ledger, files)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; anything wrong with it is a :class:`DraftError` naming the file."""
    state = read_state(path)
    for name in _FILES:
        file, expected = path / name, state.files[name]
        if not file.is_file() or file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise DraftError(f"{file} is missing, truncated or changed since the checkpoint was written")
    draft, optimizer = (safetensors.torch.load_file(path / name) for name in _FILES)
    return Checkpoint(path, state.position, state.provenance, state.ledger, draft, optimizer)


def weights_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_complete(path: Path, position: TrainPosition, ledger: dict[str, Any]) -> bool:
    try:
        found = load_checkpoint(path)
    except DraftError:
        return False
    return found.position == position and found.ledger == json.loads(json.dumps(ledger))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
