"""Finding a target's decoder layers, and reading the residual stream after them with forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from specforge.errors import TargetError


def decoder_layers(backbone: nn.Module, num_layers: int) -> nn.ModuleList:
    """The ``ModuleList`` of ``num_layers`` decoder layers in ``backbone``; the outermost one where several match."""
    found = [
        (name.count("."), name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    # a multimodal model may have a vision tower of the same depth: its language model is meant
    found = [entry for entry in found if "vision" not in entry[1] and "audio" not in entry[1]]
    if not found:
        raise TargetError(
            f"{type(backbone).__name__} has no list of {num_layers} decoder layers that can be tapped; "
            "use a model with a plain stack of decoder layers"
        )
    return min(found, key=lambda entry: entry[:2])[2]


@contextmanager
def tapped(layers: nn.ModuleList, layer_ids: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the outputs ``[batch, tokens, H]`` of the chosen layers during the forwards inside the block."""
    outputs: dict[int, Tensor] = {}

    def record(layer_id: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            outputs[layer_id] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[layer_id].register_forward_hook(record(layer_id)) for layer_id in layer_ids]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class EverythingInFloat64(TorchFunctionMode):
    """Inside this mode, casts to float32 become casts to float64.

    Models upcast norms, softmax and RoPE to float32 by hand; in a float64 copy of a model that would round to float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(_widened(value) for value in args)
        return func(*args, **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
