"""TargetEngine: runs the frozen target. Knows layers and dtypes, never an algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.tensors import Source


@dataclass(frozen=True, slots=True)
class CapturedSample:
    """Features of one task: ``input_ids`` int32 [S], and as the spec says ``aux`` [S, n*H], ``last`` [S, H].

    Hidden states are neither joined nor cast here but by the put, with the one copy that it makes; only float8 ones are
    encoded before (``data_plane.encoding.encoded``).
    """

    sample_id: str
    tensors: dict[str, Source]


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation of one prompt: the new token ids, and whether a stop token ended it (it is included)."""

    token_ids: tuple[int, ...]
    stopped: bool


class TargetEngine(Protocol):
    """The target as capture needs it."""

    info: TargetInfo

    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterator[CapturedSample]:
        """One unpadded forward a task, so that features depend on that task alone; yields in task order."""
        ...

    def close(self) -> None:
        """Let go of connections and files, and end what is in flight. Idempotent."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], options: Generate) -> list[Generation]:
        """Continuations. The same call gives the same ids.

        Greedy ones (``options.temperature`` 0): the prompts of one call are one batch, in which near-ties may fall
        otherwise than alone. Drawn ones: each prompt with random numbers of its own from ``options.seed``, as if it
        were alone.
        """
        ...


class TargetSession(Protocol):
    """The target decoding one sequence with a KV cache, as speculative decoding needs it."""

    def forward(
        self, token_ids: Sequence[int], parents: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Process tokens at the next positions: fp32 logits [m, V] and the features of those positions, each [m, D].

        With ``parents`` [m] the tokens are a tree: each one's parent is an earlier index in ``token_ids``, or -1 for
        one that follows the cache. A token is at the position after its parent and sees the cache, its ancestors and
        itself. A :class:`TargetError` where the target's attention cannot be masked so.

        Features are tensors as the target computed them, whatever dtype the spec would store.
        """
        ...

    def crop(self, num_tokens: int) -> None:
        """Keep only the first ``num_tokens`` positions of the cache."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Of the tokens of the last forward keep only ``rows`` (ascending indices), a path that follows the cache."""
        ...


class BatchSession(Protocol):
    """The target decoding several sequences, each with a length of its own. They are numbered from 0.

    ``forward`` and ``admit`` give the rows of all sequences one after the other, R in all.
    """

    def admit(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Prefill new sequences, numbered behind those there are: fp32 logits [prompts, V] of the token after each, and
        the features [R, D] of all their positions.
        """
        ...

    def forward(
        self, token_ids: Sequence[Sequence[int]], parents: Sequence[Sequence[int] | None] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Process tokens of every sequence: fp32 logits [R, V] and features [R, D].

        ``parents`` as in :meth:`TargetSession.forward`, for each sequence; ``None`` for a chain.
        """
        ...

    def crop(self, sequence: int, num_tokens: int) -> None:
        """Keep only the first ``num_tokens`` positions of a sequence."""
        ...

    def keep(self, sequence: int, rows: Sequence[int]) -> None:
        """Of a sequence's tokens of the last forward keep only ``rows`` (ascending indices), a path."""
        ...

    def drop(self, sequence: int) -> None:
        """Forget a sequence. The last one takes its number."""
        ...


@runtime_checkable
class DecodesBatches(Protocol):
    """A target that can decode several sequences in one forward."""

    def batch_session(self, spec: CaptureSpec, num_sequences: int) -> BatchSession:
        """A new session of at most ``num_sequences`` sequences, without any yet."""
        ...
