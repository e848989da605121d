"""The directory of an exported draft: ``config.json``, ``model.safetensors`` and a model card. Whole, or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.errors import DraftError

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PROVENANCE_KEY = "specforge"
"""Key of ``config.json`` under which an export says where it comes from."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What an exported directory holds: the JSON object of its configuration, and its tensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def write_artifact(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
    verify: Callable[[Path], None] | None = None,
) -> int:
    """Write to ``out``, replacing an earlier export; the size of the weights in bytes. A link stays, and leads to what
    was written.

    ``verify`` gets the whole directory before it is put in its place, and raises a :class:`DraftError` to keep the
    earlier export. :class:`DraftError` too for an ``out`` that holds anything else, or that cannot be written.
    """
    try:
        place = out.resolve()
        _refuse_foreign(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.parent / f".{place.name}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise DraftError(f"{out} cannot be made ({_reason(error)}); choose another directory for the export") from None
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        num_bytes = (partial / WEIGHTS).stat().st_size
        _sync(partial)
        if verify is not None:
            verify(partial)
        _replace(partial, place)
    except (OSError, SafetensorError) as error:
        raise DraftError(
            f"{out} cannot be written ({_reason(error)}); what was there is still there, choose another directory"
        ) from None
    except DraftError as error:
        raise DraftError(str(error).replace(str(partial), str(out))) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def read_artifact(directory: Path) -> Artifact:
    """What :func:`write_artifact` wrote; anything that cannot be read is a :class:`DraftError`."""
    config = read_config(directory)
    path = directory / WEIGHTS
    try:
        return Artifact(directory, config, load_file(path))
    except (OSError, SafetensorError) as error:
        raise DraftError(f"{path} cannot be read ({error}); export the draft again") from None


def read_config(directory: Path) -> dict[str, Any]:
    """The JSON object in ``config.json``."""
    path = directory / CONFIG
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DraftError(f"{path} does not exist; give a directory that specforge export wrote") from None
    except (OSError, ValueError) as error:
        raise DraftError(f"{path} cannot be read ({error}); export the draft again") from None
    if not isinstance(value, dict):
        raise DraftError(f"{path} holds no JSON object; export the draft again")
    return value


def _refuse_foreign(out: Path) -> None:
    if not out.exists():
        return
    if out in (Path.cwd(), *Path.cwd().parents):
        raise DraftError(f"{out} is the directory that this command runs in; choose a new directory for the export")
    if out.is_mount():
        raise DraftError(f"{out} is a mount point, which cannot be replaced; choose a directory below it")
    if not out.is_dir():
        raise DraftError(f"{out} is a file; choose another directory for the export")
    names = {entry.name for entry in out.iterdir()}
    ours = names <= {CONFIG, WEIGHTS, CARD} and CONFIG in names and PROVENANCE_KEY in read_config(out)
    if names and not ours:
        raise DraftError(f"{out} holds files that are not an export of ours; choose an empty or a new directory")


def _replace(partial: Path, out: Path) -> None:
    """Put ``partial`` in the place of ``out``. A crash between the two renames leaves the old export beside it."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _sync(directory: Path) -> None:
    """Contents on disk before the rename makes them visible."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
