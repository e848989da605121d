"""PromptTask: one sample to capture. Written by ``prompts``, read by the control plane and the rollout worker."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PromptTask:
    """A sample whose tokens are recorded: the features are a pure function of it, the target and the CaptureSpec.

    ``index`` is the position in the prompt sequence (0-based, unique in a run); ``sample_id`` is unique too and stable
    across restarts. ``loss_spans`` are half-open token ranges ``[start, end)`` that belong to an answer, ascending
    and disjoint.
    """

    sample_id: str
    index: int
    input_ids: tuple[int, ...]
    loss_spans: tuple[tuple[int, int], ...]
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        return sum(end - start for start, end in self.loss_spans)
