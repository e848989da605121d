"""Options of evaluation by speculative decoding (``evaluation`` section of a run). Imports no tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator


class TreeConfig(BaseModel):
    """The tree of proposals of a round (EAGLE-2, arXiv 2406.16858)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: PositiveInt = Field(8, description="Children of a node that are considered, and nodes kept on a level.")
    depth: NonNegativeInt = Field(5, description="Levels below the first.")
    num_nodes: int = Field(63, ge=2, description="Nodes that the target verifies, the last committed token included.")


class EvaluationConfig(BaseModel):
    """Which prompts to decode, and how."""

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
    num_proposals: PositiveInt = Field(5, description="Tokens that the draft proposes in a round, without a tree.")
    temperature: NonNegativeFloat = Field(
        0.0, description="Temperature that target and draft sample at; 0: greedy, checked token by token."
    )
    top_k: PositiveInt | None = Field(None, description="Sample among the most likely tokens only; null: all.")
    top_p: float | None = Field(
        None, gt=0.0, le=1.0, description="Sample from the smallest set of tokens with this probability; null: all."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the sampling.")
    tree: TreeConfig | None = Field(
        None, description="Draft trees of proposals (for algorithms that can); null: chains of num_proposals tokens."
    )

    @model_validator(mode="after")
    def _sampling_has_a_temperature(self) -> Self:
        given = [name for name in ("top_k", "top_p", "seed") if getattr(self, name)]
        if given and not self.temperature:
            raise ValueError(
                f"{' and '.join(given)} would do nothing, because the temperature is 0, which is greedy; "
                "set a temperature above 0 or leave them out"
            )
        return self
