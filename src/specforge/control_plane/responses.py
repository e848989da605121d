"""The prompts of a run as the controller leases them: with the responses that the ledger has recorded."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import MetadataStore
from specforge.control_plane.prompts import TaskSource
from specforge.errors import ContractError

_NONE = -1
_MAX_ID = 2**31 - 1


class AnsweredTasks:
    """Prompts of ``tasks``, answered where the ledger ``store`` has a response.

    Where responses are generated, four bytes a prompt stay in memory.
    """

    def __init__(self, tasks: TaskSource, store: MetadataStore) -> None:
        self._tasks, self._store = tasks, store
        self._lengths = array("i")
        if any(tasks.num_to_generate(index) for index in range(len(tasks))):
            self._lengths.extend([_NONE] * len(tasks))
            for index, num_tokens in store.response_lengths():
                self._lengths[index] = num_tokens

    def at(self, indices: Sequence[int]) -> list[PromptTask]:
        tasks = self._tasks.at(indices)
        answered = [task.index for task in tasks if self._length(task.index) != _NONE]
        responses = self._store.responses_at(answered) if answered else {}
        return [task.answered(responses[task.index]) if task.index in responses else task for task in tasks]

    def num_tokens(self, index: int) -> int | None:
        """Tokens of the sample, ``None`` while its response is to be generated."""
        length = self._length(index)
        if length == _NONE and self._tasks.num_to_generate(index):
            return None
        return self._tasks.num_tokens(index) + max(0, length)

    def max_tokens(self, index: int) -> int:
        """Tokens of the sample, those of a response to come as many as it may have."""
        found = self.num_tokens(index)
        return self._tasks.num_tokens(index) + self._tasks.num_to_generate(index) if found is None else found

    def record(self, index: int, response: Sequence[int]) -> PromptTask:
        """The sample with its first response, which is ``response`` where there was none.

        One that the prompt did not ask for is a :class:`ContractError`.
        """
        limit = self._tasks.num_to_generate(index)
        if len(response) > limit or not all(0 <= token <= _MAX_ID for token in response):
            raise ContractError(
                f"sample number {index}: expected a response of at most {limit} token ids from 0 to {_MAX_ID}, got "
                f"{len(response)} from {min(response)} to {max(response)}"
            )
        if limit:
            recorded = self._store.record(index, response)
            self._lengths[index] = len(recorded)
        (task,) = self.at([index])
        return task

    def _length(self, index: int) -> int:
        """Of the recorded response, or ``_NONE``."""
        return self._lengths[index] if self._lengths else _NONE
