"""Options of evaluation by speculative decoding (``evaluation`` section of a run). Imports no tensor library."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


class EvaluationConfig(BaseModel):
    """Which prompts to decode, and how far."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Path | None = Field(
        None, description="JSONL file of held-out prompts, in the formats of data.path; null: no evaluation."
    )
    num_prompts: PositiveInt = Field(32, description="How many prompts of the file to decode.")
    prompt_tokens: PositiveInt = Field(
        64,
        description="Tokens at the beginning of a plain text that are its prompt; the prompt of a conversation is "
        "everything before its first answer.",
    )
    max_new_tokens: PositiveInt = Field(64, description="Tokens decoded after each prompt.")
    num_proposals: PositiveInt = Field(5, description="Tokens that the draft proposes in a round.")
