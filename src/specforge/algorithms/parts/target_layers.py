"""Decoder layers of a target, read from its directory: what a draft of the same architecture can start from.

Legend: H hidden size, L number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specforge.algorithms.parts.tables import read_target_config, read_tensor, weight_files
from specforge.errors import DraftError

LAYER_NAMES = frozenset(
    f"{name}.weight"
    for name in (
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
)
QK_NORM_NAMES = frozenset({"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
NEUTRAL_SETTINGS = {"residual_multiplier": 1.0, "attention_multiplier": None, "scale_depth": None}
"""Settings under which layers of these names compute something else, with the value that changes nothing."""


@dataclass(frozen=True, slots=True)
class TargetLayer:
    """``weights`` of one decoder layer by their names inside :class:`specforge.algorithms.parts.decoder.DecoderLayer`,
    and ``norm`` [H], the target's final norm. All fp32.
    """

    weights: dict[str, Tensor]
    norm: Tensor


def last_layer(directory: Path) -> TargetLayer:
    """The last decoder layer of the target in ``directory``.

    Raises :class:`DraftError` for a layer that is not of the Llama kind: pre-norm, separate projections without biases,
    a gated SiLU MLP, with or without query and key norms.
    """
    config, files = read_target_config(directory), weight_files(directory)
    index = int(config["num_hidden_layers"]) - 1
    _check_settings(directory, config)
    query = f"layers.{index}.self_attn.q_proj.weight"
    prefixes = sorted((name.removesuffix(query) for name in files if name.endswith(query)), key=len)
    prefix = next((p for p in prefixes if f"{p}norm.weight" in files), None)
    if prefix is None:
        raise DraftError(
            f"{directory} has no decoder layer that a draft can start from: expected tensors named *{query} and "
            "*norm.weight; start from random weights (init_from_target: false) or choose another target"
        )
    start = f"{prefix}layers.{index}."
    names = {name.removeprefix(start) for name in files if name.startswith(start)} - {"self_attn.rotary_emb.inv_freq"}
    if unknown := sorted(
        names ^ LAYER_NAMES if names.isdisjoint(QK_NORM_NAMES) else names ^ (LAYER_NAMES | QK_NORM_NAMES)
    ):
        raise DraftError(
            f"layer {index} of {directory} is not of the Llama kind: {unknown[0]} is "
            f"{'not expected' if unknown[0] in names else 'missing'}; start from random weights "
            "(init_from_target: false) or choose another target"
        )
    weights = {name: read_tensor(files, start + name).to(torch.float32) for name in sorted(names)}
    return TargetLayer(weights, read_tensor(files, f"{prefix}norm.weight").to(torch.float32))


def _check_settings(directory: Path, config: dict[str, object]) -> None:
    activation = config.get("hidden_act", "silu")
    changed = [name for name, neutral in NEUTRAL_SETTINGS.items() if config.get(name) not in {None, neutral}]
    if activation not in {"silu", "swish"} or changed:
        what = changed[0] if changed else "hidden_act"
        raise DraftError(
            f"the layers of {directory} are not of the Llama kind: {what} is {config.get(what)!r}; start from random "
            "weights (init_from_target: false) or choose another target"
        )
