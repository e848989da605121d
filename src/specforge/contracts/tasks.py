"""PromptTask: one sample to capture. Written by ``prompts``, read by the control plane and the rollout worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class PromptTask:
    """A sample whose tokens are recorded: the features are a pure function of it, the target and the CaptureSpec.

    ``index`` is the position in the prompt sequence (0-based, unique in a run); ``sample_id`` is unique too and stable
    across restarts. ``loss_spans`` are half-open token ranges ``[start, end)`` that belong to an answer, ascending
    and disjoint. With ``num_to_generate`` above 0 the target has yet to answer ``input_ids``, with so many tokens at
    most; there are no loss spans then.
    """

    sample_id: str
    index: int
    input_ids: tuple[int, ...]
    loss_spans: tuple[tuple[int, int], ...]
    attributes: dict[str, str] = field(default_factory=dict)
    num_to_generate: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and response, at most."""
        return len(self.input_ids) + self.num_to_generate

    @property
    def num_loss_tokens(self) -> int:
        return sum(end - start for start, end in self.loss_spans)

    def answered(self, response: Sequence[int]) -> PromptTask:
        """The task with its response, which alone is under the loss."""
        tokens = (*self.input_ids, *response)
        spans = ((len(self.input_ids), len(tokens)),) if response else ()
        return replace(self, input_ids=tokens, loss_spans=spans, num_to_generate=0)
