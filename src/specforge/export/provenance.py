"""How an exported draft was trained and how good it was measured to be, for its model card and ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specforge.errors import DraftError

_RUN_KEYS = (
    "seed", "num_epochs", "global_batch_size", "micro_batch_tokens", "total_steps", "optimizer", "lr", "weight_decay",
    "betas", "schedule", "warmup_ratio", "min_lr_ratio", "max_grad_norm", "dtype", "capture_dtype", "order", "shuffle",
)  # fmt: skip
"""What a checkpoint's identity says of the run, beside the algorithm's options, the target and the data."""


@dataclass(frozen=True, slots=True)
class Measured:
    """An accepted length by ``specforge eval``: over ``num_rounds`` rounds of greedy decoding of ``num_prompts``."""

    accepted_length: float
    num_rounds: int
    num_prompts: int


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
        measured = self.measured
        return rows | {
            "accepted length": f"{measured.accepted_length:.3f} tokens a round ({measured.num_rounds:,} rounds, "
            f"{measured.num_prompts:,} prompts, greedy)"
        }


def measured_in(report: Path) -> Measured:
    """The accepted length in a file with the output of ``specforge eval --json``."""
    hint = "give a file with the output of specforge eval --json on the draft"
    try:
        values = json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DraftError(f"{report} cannot be read ({error}); {hint}") from None
    if not isinstance(values, dict):
        raise DraftError(f"{report} holds no JSON object; {hint}")
    length, rounds, prompts = (
        values.get(name) for name in ("accepted_length_mean", "num_rounds", "num_prompts_compared")
    )
    if not isinstance(length, int | float) or isinstance(length, bool) or length < 1.0:
        raise DraftError(
            f"{report}: expected accepted_length_mean to be a number of at least 1, got {length!r}; {hint}"
        )
    if not isinstance(rounds, int) or not isinstance(prompts, int) or rounds < 1 or prompts < 1:
        raise DraftError(
            f"{report}: expected num_rounds and num_prompts_compared above 0, got {rounds!r} and {prompts!r} (sampled "
            f"decoding compares nothing); {hint}, decoded greedily"
        )
    return Measured(float(length), rounds, prompts)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    )
