"""What is done to the repeated layers of a draft before it is trained: checkpointed activations, compilation.

Both put another function in the place of a block's ``forward``. Parameters and buffers keep their names, a copy of the
draft computes with its own weights, and drafting, which uses the parts of a layer, is as it was.

The order is compilation, then checkpoints, then sharding: what is computed again is the compiled forward (a compiler
leaves a checkpoint inside of it alone, and all that is in it), and the hooks of sharding are outside of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from specforge.algorithms.base import DraftModel
from specforge.algorithms.parts.eager import exclude_from_compilation
from specforge.errors import ConfigError


def checkpoint_activations(draft: DraftModel) -> None:
    """Keep of each block its inputs only, and compute it again in the backward: the same bits, less memory.

    Raises :class:`ConfigError` for a draft without blocks.
    """
    _check_blocks(draft, "activation checkpointing")
    for block in draft.training_blocks():
        # drafts draw from no global stream, so there is no random state to put back
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(draft: DraftModel) -> None:
    """Compile each block at its first use, for shapes that change from batch to batch.

    Attention stays as it is (:mod:`specforge.algorithms.parts.eager`); what is before and after it is a graph each.

    Raises :class:`ConfigError` for a draft without blocks, and where nothing can be compiled on its device.
    """
    _check_blocks(draft, "compilation")
    blocks = draft.training_blocks()
    changed = any("forward" in vars(block) for block in blocks)
    assert not changed, "blocks are compiled before their activations are checkpointed, and once"
    _check_compiler(next(draft.parameters()).device)
    exclude_from_compilation()
    for block in blocks:
        block.forward = CompiledForward(block.forward)


class CompiledForward:
    """A ``forward``, compiled when it is first called. A copy compiles that of the copied block."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(self._forward, dynamic=True)
        return self._compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {"_forward": self._forward, "_compiled": None}


def _check_blocks(draft: DraftModel, wish: str) -> None:
    if not draft.training_blocks():
        raise ConfigError(
            f"{wish} needs a draft with blocks, but {type(draft).__name__} names none in training_blocks(); "
            "train it without"
        )


def _check_compiler(device: torch.device) -> None:
    """A compiler that is missing is found here, and not in the middle of the first step."""
    try:
        torch.compile(torch.exp)(torch.zeros(8, device=device))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the blocks cannot be compiled on {device}: {reason}; install a C++ compiler (and for CUDA, Triton), or "
            "train without compilation"
        ) from error
