"""Options of the prompts (``data`` section of a run). Imports no tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from specforge.errors import ConfigError

PATH_ONLY = ("format", "chat_template", "last_turn_only", "max_invalid", "generate")
"""Options of reading ``data.path``. Features were captured from tokens: these have done their work by then."""


class GenerateOptions(BaseModel):
    """Responses that the target writes itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_new_tokens: int = Field(
        512, ge=1, le=1 << 20, description="Longest response in tokens; data.max_length bounds prompt and response."
    )
    temperature: float = Field(0.0, ge=0.0, le=100.0, description="Temperature that tokens are drawn at; 0: greedy.")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="Draw from the smallest set of tokens with this probability; 1: from all."
    )
    top_k: int = Field(0, ge=0, lt=2**31, description="Draw from this many of the likeliest tokens; 0: from all.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of what is drawn, one stream a prompt; null: the seed of the run."
    )
    keep_original: bool = Field(
        False,
        description="Samples that end with an answer keep it, and only the others are answered; false: that answer is "
        "dropped, and the target writes its own.",
    )


class DataConfig(BaseModel):
    """Which samples to train on, and how they become tokens and a loss mask."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path | None = Field(
        None, description="JSONL file with one sample a line; null: the samples come from data.features."
    )
    features: Path | None = Field(
        None,
        description="Feature set that specforge capture wrote: its samples are trained from their features, and the "
        "target is not run; null: the samples come from data.path.",
    )
    verify: Literal["full", "sizes"] = Field(
        "full",
        description="What is checked of every file of data.features before training starts: full: its size and its "
        "checksum, which reads all of it; sizes: its size and its header.",
    )
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
    vocabulary_cache: Path | None = Field(
        None,
        description="Directory in which runs share the pruned draft vocabularies that they counted; null: each run "
        "keeps its own.",
    )
    max_invalid: NonNegativeInt = Field(
        0, description="Bad lines that are tolerated and skipped; with 0 the first one ends the run."
    )

    generate: GenerateOptions | None = Field(
        None,
        description="The target answers the prompts of data.path itself, and its responses are recorded and trained "
        "on; null: the answers are those of the file.",
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        # A ConfigError, not a ValueError: this is a whole sentence, which pydantic's wording would spoil.
        if (self.path is None) == (self.features is None):
            got = "neither" if self.path is None else f"both, {self.path} and {self.features}"
            raise ConfigError(
                "a run needs exactly one of data.path (a JSONL file with prompts) and data.features (a directory that "
                f"specforge capture wrote), got {got}; set one of them and leave the other out, or null"
            )
        if self.generate is not None and self.generate.max_new_tokens < self.min_loss_tokens:
            raise ConfigError(
                f"data.generate.max_new_tokens is {self.generate.max_new_tokens}, less than data.min_loss_tokens = "
                f"{self.min_loss_tokens}: no response could be trained on; raise the first or lower the second"
            )
        for name in PATH_ONLY if self.path is None else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(
                    f"data.{name} says how data.path is read, but this run reads data.features, whose tokens were "
                    f"fixed when it was captured; remove data.{name}, or capture again with it"
                )
        return self
