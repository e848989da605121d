"""Options of evaluation during training, on samples that are not trained (held-out). Imports no tensor library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

Metric = Literal["avg_loss", "avg_acc", "simulated_acc_len", "accepted_length"]

LOWER_IS_BETTER = frozenset({"avg_loss"})


class HeldOutConfig(BaseModel):
    """Which samples are evaluated, how often, and by which number the best checkpoint is chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path | None = Field(
        None, description="JSONL file of samples that are not trained, in the formats of data.path; null: none."
    )
    every: PositiveInt = Field(500, description="Optimizer steps between two evaluations.")
    num_samples: PositiveInt | None = Field(
        None, description="Evaluate at most this many samples, the first ones of the file; null: all of them."
    )
    max_length: int | None = Field(
        None, ge=2, description="Longest sample in tokens; longer ones are cut at the end; null: that of the data."
    )
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="Tokens of a forward; changes speed and memory, not the numbers; null: that of the training."
    )
    best: Metric = Field(
        "simulated_acc_len",
        description="Number by which the best checkpoint is chosen: avg_loss (the lowest), avg_acc, simulated_acc_len "
        "or accepted_length (the highest; needs speculative_every).",
    )
    speculative_every: NonNegativeInt = Field(
        0,
        description="Optimizer steps between two evaluations by speculative decoding, which needs the target; a "
        "multiple of every, 0: none.",
    )
    num_prompts: PositiveInt = Field(8, description="Samples whose prompts are decoded, the first ones.")
    max_new_tokens: PositiveInt = Field(64, description="Tokens decoded after each prompt.")
    num_proposals: PositiveInt = Field(5, description="Tokens that the draft proposes in a round.")
    cache_dir: Path | None = Field(
        None,
        description="Directory in which runs share the features of evaluation samples; null: specforge/eval in the "
        "user's cache directory.",
    )

    @model_validator(mode="after")
    def _decoding_fits(self) -> Self:
        if self.speculative_every % self.every:
            raise ValueError(
                f"speculative_every is {self.speculative_every}, which is no multiple of every = {self.every}; "
                f"set it to {math.ceil(self.speculative_every / self.every) * self.every}, or to 0 for none"
            )
        if self.best == "accepted_length" and not self.speculative_every:
            raise ValueError(
                "best is accepted_length, which only speculative decoding measures; set speculative_every to a "
                "multiple of every, or choose simulated_acc_len"
            )
        return self


def is_better(metric: Metric, new: float, best: float | None) -> bool:
    """Whether ``new`` beats ``best`` (``None``: nothing was measured yet). NaN beats nothing; a tie keeps the old."""
    if math.isnan(new):
        return False
    if best is None or math.isnan(best):
        return True
    return new < best if metric in LOWER_IS_BETTER else new > best
