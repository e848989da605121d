"""``specforge export`` and the demo's export: a checkpoint becomes what an engine loads, checked from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specforge.algorithms.parts.tables import load_target_tables
from specforge.contracts.capture import TargetInfo
from specforge.contracts.codec import from_json
from specforge.errors import DraftError
from specforge.export.draft import FORMATS, ReloadCheck, verify_export, write_export
from specforge.export.provenance import TrainingRecord, measured_in
from specforge.inference.target import read_target_info
from specforge.launch.drafts import check_fits, find_checkpoint, read_draft
from specforge.training.checkpoint import read_state


def export_draft(
    checkpoint: Path, to: str, out: Path, dtype: str | None = None, report: Path | None = None
) -> dict[str, Any]:
    """Export the draft in ``checkpoint`` (a checkpoint or a run) to ``out``; what was written, as JSON data.

    Reads the target that the draft was trained on, where the checkpoint says it is, for the comparison of logits.
    ``dtype`` ``None`` is the format's own. ``report`` is a file with the output of ``specforge eval --json``: the model
    card takes the accepted length from it.

    A directory that does not pass the comparison is not put in the place of an earlier export.
    """
    if to not in FORMATS:
        raise DraftError(f"cannot export to {to!r}; the formats are: {', '.join(FORMATS)}")
    path = find_checkpoint(checkpoint)
    state = read_state(path)
    recorded = from_json(TargetInfo, state.provenance.target)
    step, identity = state.position.step, state.provenance.identity
    measured = None if report is None else measured_in(report, identity["algorithm"]["name"], recorded, step)
    training = TrainingRecord.of(step, identity, measured)
    target = read_target_info(recorded.path)
    trained = read_draft(path)
    check_fits(path, trained.config, target, trained.target_revision)
    checks: list[ReloadCheck] = []

    def verify(directory: Path) -> None:
        tables = load_target_tables(target.path)
        checks.append(verify_export(directory, trained.build(tables), tables))

    written = write_export(trained, target, FORMATS[to], out, dtype, training, verify=verify)
    (check,) = checks
    return {
        "path": str(written.path),
        "format": to,
        "algorithm": trained.options["name"],
        "dtype": written.dtype,
        "num_tensors": written.num_tensors,
        "num_bytes": written.num_bytes,
        "reload_difference_to_rounded": check.difference_to_rounded,
        "reload_difference_to_original": check.difference_to_original,
    }


def served_format(algorithm: str) -> str:
    """The first format that can be written of ``algorithm``: that of a serving engine where there is one."""
    return next(name for name, to in FORMATS.items() if to.writes(algorithm))
