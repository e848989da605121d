"""How the target answers prompts: the options of each response, a pure function of the run and the prompt's number."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.prompts.config import GenerateOptions


@dataclass(frozen=True, slots=True)
class ResponseOptions:
    """``data.generate`` with the seed that all responses of a run come from."""

    options: GenerateOptions
    seed: int

    @classmethod
    def of_run(cls, options: GenerateOptions | None, run_seed: int) -> ResponseOptions | None:
        """``None`` where nothing is generated."""
        if options is None:
            return None
        return cls(options, run_seed if options.seed is None else options.seed)

    @property
    def is_greedy(self) -> bool:
        return self.options.temperature == 0.0

    def of(self, task: PromptTask) -> Generate:
        """Of one response: its seed depends on the number of the prompt, never on what was answered before."""
        return Generate(
            max_new_tokens=task.num_to_generate,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            top_k=self.options.top_k,
            seed=response_seed(self.seed, task.index),
        )

    def identity(self) -> dict[str, int | float | bool]:
        """Everything that the responses depend on besides prompts and target."""
        drawn = {} if self.is_greedy else {"seed": self.seed}
        return {**self.options.model_dump(mode="json", exclude={"seed"}), **drawn}


def response_seed(seed: int, index: int) -> int:
    """63 bits from the seed of all responses and the number of a prompt."""
    digest = hashlib.sha256(f"response|{seed}|{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
