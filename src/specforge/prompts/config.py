"""Options of the prompts (``data`` section of a run). Imports no tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt


class DataConfig(BaseModel):
    """Which samples to train on, and how they become tokens and a loss mask."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="JSONL file with one sample a line.")
    format: Literal["auto", "messages", "sharegpt", "text", "tokens"] = Field(
        "auto",
        description='What a line holds: messages ({"messages": [{"role", "content"}, ...]}), sharegpt '
        '({"conversations": [{"from", "value"}, ...]}), text ({"text": ...}) or tokens ({"input_ids": [...], '
        '"loss_spans": [[start, end], ...]}, as recorded from the target); auto looks at each line.',
    )
    max_length: int = Field(2048, ge=2, description="Longest sample in tokens; longer ones are cut at the end.")
    min_loss_tokens: PositiveInt = Field(
        1, description="Samples with fewer tokens under the loss than this (after the cut) are skipped and counted."
    )
    chat_template: Path | None = Field(
        None, description="File with a Jinja chat template that replaces the target's; null: the target's own."
    )
    last_turn_only: bool = Field(False, description="Put the loss on the last assistant message only.")
    limit: PositiveInt | None = Field(
        None, description="Use at most this many samples, the first ones; null: all of them."
    )
    max_invalid: NonNegativeInt = Field(
        0, description="Bad lines that are tolerated and skipped; with 0 the first one ends the run."
    )
