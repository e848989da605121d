"""``specforge export`` and the demo's export: a checkpoint becomes what an engine loads, checked from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts.tables import load_target_tables
from specforge.contracts.capture import TargetInfo
from specforge.contracts.codec import from_json
from specforge.errors import DraftError
from specforge.export.sglang import export_sglang, verify_export
from specforge.inference.target import read_target_info
from specforge.launch.drafts import find_checkpoint, load_draft
from specforge.training.checkpoint import read_state


def export_draft(checkpoint: Path, to: str, out: Path) -> dict[str, Any]:
    """Export the draft in ``checkpoint`` (a checkpoint or a run) to ``out``; what was written, as JSON data.

    Reads the target that the draft was trained on, where the checkpoint says it is, for the comparison of logits.
    """
    if to != "sglang":
        raise DraftError(f"cannot export to {to!r}; the formats are: sglang")
    path = find_checkpoint(checkpoint)
    recorded = from_json(TargetInfo, read_state(path).provenance.target)
    target = read_target_info(recorded.path)
    tables = load_target_tables(target.path)
    loaded = load_draft(path, target, tables)
    assert isinstance(loaded.draft, Eagle3Draft)
    assert isinstance(loaded.config, Eagle3DraftConfig)
    report = export_sglang(loaded.draft.served_state(), loaded.config, target, out)
    check = verify_export(out, loaded.draft, tables)
    if not check.identical:
        raise DraftError(
            f"{out} does not give the logits of the draft that was exported "
            f"(largest difference {check.difference_to_rounded:g}); do not serve it"
        )
    return {
        "path": str(report.path),
        "format": to,
        "dtype": report.dtype,
        "num_tensors": report.num_tensors,
        "num_bytes": report.num_bytes,
        "reload_difference_to_rounded": check.difference_to_rounded,
        "reload_difference_to_original": check.difference_to_original,
    }
