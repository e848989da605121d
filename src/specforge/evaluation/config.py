"""Options of evaluation by speculative decoding (``evaluation`` section of a run). Imports no tensor library."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)


class TreeConfig(BaseModel):
    """The tree of proposals of a round (EAGLE-2, arXiv 2406.16858)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: PositiveInt = Field(8, description="Children of a node that are considered, and nodes kept on a level.")
    depth: NonNegativeInt = Field(5, description="Levels below the first.")
    num_nodes: int = Field(63, ge=2, description="Nodes that the target verifies, the last committed token included.")


class EvaluationConfig(BaseModel):
    """Which prompts to decode, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[Path, ...] = Field(
        (),
        description="Files of held-out prompts, JSONL, or one such file: questions of MT-Bench, GSM8K, HumanEval or "
        "Alpaca, or the formats of data.path, told apart by their keys; none: no evaluation.",
    )
    num_prompts: PositiveInt = Field(
        32, description="How many prompts of each file to decode: the first ones of its categories, in turn."
    )
    prompt_tokens: PositiveInt = Field(
        64,
        description="Tokens at the beginning of a plain text that are its prompt; the prompt of a conversation is "
        "everything before its first answer.",
    )
    chat_template: Path | None = Field(
        None, description="File with a Jinja chat template that replaces the target's; null: the target's own."
    )
    as_text: bool = Field(
        False, description="Give the target questions as they are, without a chat template, as base models want it."
    )
    batch_sizes: tuple[PositiveInt, ...] = Field(
        (1,), min_length=1, description="How many prompts are decoded together; every size is measured by itself."
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

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_file_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("batch_sizes", mode="before")
    @classmethod
    def _one_size_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _is_one_way_to_ask(self) -> Self:
        if self.as_text and self.chat_template is not None:
            raise ValueError(
                f"as_text is for questions without a chat template, but chat_template is {self.chat_template}; give one"
            )
        if len(set(self.batch_sizes)) != len(self.batch_sizes):
            raise ValueError(f"batch_sizes should differ, got {', '.join(map(str, self.batch_sizes))}")
        return self

    @model_validator(mode="after")
    def _sampling_has_a_temperature(self) -> Self:
        given = [name for name in ("top_k", "top_p", "seed") if getattr(self, name)]
        if given and not self.temperature:
            raise ValueError(
                f"{' and '.join(given)} would do nothing, because the temperature is 0, which is greedy; "
                "set a temperature above 0 or leave them out"
            )
        return self
