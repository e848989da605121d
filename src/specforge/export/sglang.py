"""Exports an EAGLE-3 draft in the format that SGLang loads (vLLM takes the same directory), and checks it.

``model.safetensors`` + ``config.json`` + a model card.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.algorithms.base import TargetTables
from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.eagle3.proposer import Eagle3Proposer
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.contracts.capture import TargetInfo
from specforge.errors import DraftError
from specforge.export.eagle3_config import PROVENANCE_KEY, draft_config, refuse_unservable, served_config
from specforge.export.eagle3_tensors import check_tensors, served_dtype, served_shapes
from specforge.export.model_card import model_card

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FILES = frozenset({"config.json", "model.safetensors", "README.md"})

_NUM_CHECK_ROWS = 12
_NUM_CHECK_STEPS = 4


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written. ``num_bytes`` is the size of the weights file."""

    path: Path
    num_tensors: int
    num_bytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class ReloadCheck:
    """Logits of the reloaded draft against the original on random inputs, largest absolute differences.

    ``difference_to_rounded`` (the original rounded to the export's dtype) is 0 for a sound export;
    ``difference_to_original`` is what the rounding itself costs.
    """

    difference_to_rounded: float
    difference_to_original: float

    @property
    def identical(self) -> bool:
        return self.difference_to_rounded == 0.0


def export_sglang(
    state: Mapping[str, Tensor], config: Eagle3DraftConfig, target: TargetInfo, out: Path, dtype: str = "bfloat16"
) -> ExportReport:
    """Write the draft's ``served_state()`` to the directory ``out``, whole or not at all; an older export is replaced.

    Raises :class:`DraftError` for options or tensors that SGLang would not serve, and for an ``out`` that holds
    anything else.
    """
    if dtype not in DTYPES:
        raise DraftError(f"cannot export weights as {dtype!r}; choose one of {', '.join(DTYPES)}")
    refuse_unservable(config)
    check_tensors(state, config, None)
    _refuse_foreign(out)
    tensors = {
        name: state[name].detach().cpu().to(served_dtype(name, DTYPES[dtype]), copy=True).contiguous()
        for name in served_shapes(config)
    }
    served = served_config(config, target, dtype)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DraftError(f"{out} cannot be made ({error.strerror}); choose another directory for the export") from None
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(served, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(model_card(config, target, dtype), encoding="utf-8")
        num_bytes = (partial / "model.safetensors").stat().st_size
        _sync(partial)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportReport(out, len(tensors), num_bytes, dtype)


def load_exported_eagle3(directory: Path) -> tuple[Eagle3DraftConfig, dict[str, Tensor]]:
    """Config and tensors of an export, as they are on disk.

    Strict on unknown and missing names, shapes, dtypes and the vocabulary maps: a :class:`DraftError` otherwise.
    """
    served = _read_json(directory / "config.json")
    config = draft_config(served, directory / "config.json")
    dtype = DTYPES.get(str(served.get("dtype")))
    if dtype is None:
        raise DraftError(f"{directory}/config.json: expected dtype to be one of {', '.join(DTYPES)}; export again")
    path = directory / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DraftError(f"{path} cannot be read ({error}); export the draft again") from None
    check_tensors(state, config, dtype)
    return config, state


def verify_export(directory: Path, draft: Eagle3Draft, tables: TargetTables) -> ReloadCheck:
    """Reload the export and compare logits on random inputs with ``draft``, the one that was exported.

    Raises :class:`DraftError` unless the reloaded draft equals the rounded original bit for bit.
    """
    config, state = load_exported_eagle3(directory)
    dtype = state["fc.weight"].dtype
    # from the configuration on disk alone, so that a wrong key in it shows
    reloaded = Eagle3Draft(config, target_ids(state["d2t"])).to(draft.fc.weight)
    reloaded.load_state_dict(state)
    rounded = copy.deepcopy(draft)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype))
    found = _probe(reloaded, tables)
    check = ReloadCheck(
        difference_to_rounded=float((found - _probe(rounded, tables)).abs().max()),
        difference_to_original=float((found - _probe(draft, tables)).abs().max()),
    )
    if not check.identical or not torch.equal(reloaded.d2t, draft.d2t):
        raise DraftError(
            f"{directory} does not give the logits of the draft it was exported from (largest difference "
            f"{check.difference_to_rounded:g}); export the draft again"
        )
    return check


@torch.no_grad()
def _probe(draft: Eagle3Draft, tables: TargetTables) -> Tensor:
    """Logits [steps, W] of a chain decoded from random features and tokens: a prefill, then single steps."""
    config = draft.config
    generator = torch.Generator().manual_seed(0)
    aux = torch.randn(_NUM_CHECK_ROWS, len(config.aux_layers) * config.target_hidden_size, generator=generator)
    tokens = torch.randint(0, config.vocab_size, (_NUM_CHECK_ROWS + _NUM_CHECK_STEPS,), generator=generator).tolist()
    proposer = Eagle3Proposer(draft, tables)
    rows = [proposer.append_true_rows(aux.to(draft.fc.weight), tokens[:_NUM_CHECK_ROWS])]
    rows += [proposer.speculate(token) for token in tokens[_NUM_CHECK_ROWS:]]
    return torch.stack([row.float() for row in rows])


def _read_json(path: Path) -> dict[str, Any]:
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
    if not out.is_dir():
        raise DraftError(f"{out} is a file; choose another directory for the export")
    names = {entry.name for entry in out.iterdir()}
    if names and not (names <= FILES and "config.json" in names and PROVENANCE_KEY in _read_json(out / "config.json")):
        raise DraftError(f"{out} holds files that are not an export of ours; choose an empty or a new directory")


def _replace(partial: Path, out: Path) -> None:
    """Put ``partial`` in the place of ``out``. A crash between the two renames leaves the old export beside it."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)


def _sync(directory: Path) -> None:
    """Contents on disk before the rename makes them visible."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
