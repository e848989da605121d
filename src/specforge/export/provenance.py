"""How an exported draft was trained and how good it was measured to be, for its model card and ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specforge.contracts.capture import TargetInfo
from specforge.errors import DraftError

_RUN_KEYS = (
    "seed", "num_epochs", "global_batch_size", "micro_batch_tokens", "total_steps", "optimizer", "lr", "weight_decay",
    "betas", "schedule", "warmup_ratio", "min_lr_ratio", "max_grad_norm", "dtype", "capture_dtype", "order", "shuffle",
)  # fmt: skip
"""What a checkpoint's identity says of the run, beside the algorithm's options, the target and the data."""


@dataclass(frozen=True, slots=True)
class Measured:
    """An accepted length by ``specforge eval``: over ``num_rounds`` rounds of greedy decoding of ``num_prompts``.

    A round proposed a chain of ``num_proposals`` tokens, or the ``tree`` where there is one; ``prompts`` are names of
    files, without their directories.
    """

    accepted_length: float
    num_rounds: int
    num_prompts: int
    num_proposals: int
    tree: Mapping[str, int] | None
    prompts: tuple[str, ...]

    def __str__(self) -> str:
        shape = f"chains of {self.num_proposals} proposals" if self.tree is None else f"trees of {_listed(self.tree)}"
        return (
            f"{self.accepted_length:.3f} tokens a round ({self.num_rounds:,} rounds, {self.num_prompts:,} prompts of "
            f"{', '.join(self.prompts)}; {shape}, greedy)"
        )


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """``step`` is the optimizer step of the checkpoint, ``run`` a summary of the run's configuration, ``options`` those
    of the algorithm; ``data_sha256`` hashes the tokens and loss spans that were trained on, in order.
    """

    step: int
    data_sha256: str | None
    options: Mapping[str, Any]
    run: Mapping[str, Any]
    measured: Measured | None = None

    @classmethod
    def of(cls, step: int, identity: Mapping[str, Any], measured: Measured | None = None) -> TrainingRecord:
        """From what a checkpoint says of itself. No path is part of an identity."""
        run = {name: identity[name] for name in _RUN_KEYS if name in identity}
        return cls(step, identity.get("data_sha256"), identity["algorithm"], run, measured)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; the options are beside it already."""
        values = asdict(self)
        del values["options"]
        return values

    def rows(self) -> dict[str, str]:
        """Titles and values of the model card's table."""
        options = {name: value for name, value in self.options.items() if name != "name" and value is not None}
        rows = {
            "checkpoint": f"step {self.step:,}",
            "data": f"sha256 `{self.data_sha256}`" if self.data_sha256 else "not recorded",
            "run": _listed(self.run),
            "algorithm": _listed(options),
        }
        if self.measured is None:
            return rows | {"accepted length": "not measured; `specforge eval` measures it"}
        return rows | {"accepted length": str(self.measured)}


def measured_in(report: Path, algorithm: str, target: TargetInfo, step: int) -> Measured:
    """The accepted length in a file with the output of ``specforge eval --json``.

    Raises :class:`DraftError` for what is no such file, and for one that is not of the draft that an ``algorithm``
    trained for ``target`` in ``step`` optimizer steps.
    """
    hint = "give a file with the output of specforge eval --json on the draft"
    try:
        values = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DraftError(f"{report} cannot be read ({error}); {hint}") from None
    if not isinstance(values, dict):
        raise DraftError(f"{report} holds no JSON object; {hint}")
    length = values.get("accepted_length_mean")
    counts: list[Any] = [values.get(name) for name in ("num_rounds", "num_prompts", "num_prompts_compared")]
    if not isinstance(length, int | float) or isinstance(length, bool) or length < 1.0:
        raise DraftError(
            f"{report}: expected accepted_length_mean to be a number of at least 1, got {length!r}; {hint}"
        )
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise DraftError(
            f"{report}: expected num_rounds, num_prompts and num_prompts_compared above 0, got "
            f"{', '.join(map(repr, counts))} (sampled decoding compares nothing); {hint}, decoded greedily"
        )
    settings = values.get("settings")
    if not isinstance(settings, dict) or not {"num_proposals", "tree", "prompts"} <= settings.keys():
        raise DraftError(f"{report} does not say what was run (settings); {hint}")
    _check_same_draft(report, values, algorithm, target, step)
    names = tuple(Path(name).name for name in settings["prompts"])
    rounds, prompts, _ = counts
    return Measured(float(length), rounds, prompts, settings["num_proposals"], settings["tree"], names)


def _check_same_draft(report: Path, values: Mapping[str, Any], algorithm: str, target: TargetInfo, step: int) -> None:
    """Refuse a report that is of another draft than the one that is exported, or of a decoder that lost tokens."""
    settings = values["settings"]
    revision, its_step = settings.get("target_revision"), settings.get("draft_step")
    found: list[tuple[str, Any, Any]] = [("algorithm", settings.get("algorithm"), algorithm)]
    if revision is not None:
        found.append(("target revision", revision, target.revision))
    else:
        found.append(("target", Path(str(values.get("target"))).name, Path(target.path).name))
    if its_step is not None:
        found.append(("step", its_step, step))
    for what, theirs, ours in found:
        if theirs != ours:
            raise DraftError(
                f"{report} is an evaluation of another draft: its {what} is {theirs}, that of the draft to export is "
                f"{ours}; evaluate this one, or export without a report"
            )
    if values.get("lossless") is False:
        raise DraftError(
            f"{report} says that speculative output was not that of the target (lossless: false), so its accepted "
            "length means nothing; find out why, and export without a report"
        )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    )
