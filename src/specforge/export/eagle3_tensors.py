"""Names, shapes and dtypes of a served EAGLE-3 checkpoint, checked both ways.

Legend: H hidden size of the draft, Ht of the target, I intermediate size, K captured layers, V target vocabulary,
W draft vocabulary, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.errors import DraftError


def served_shapes(config: Eagle3DraftConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, by served name."""
    hidden, wide = config.hidden_size, 2 * config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = {
        "hidden_norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, wide),
        "self_attn.k_proj.weight": (keys, wide),
        "self_attn.v_proj.weight": (keys, wide),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (config.intermediate_size, hidden),
        "mlp.up_proj.weight": (config.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, config.intermediate_size),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(config.aux_layers) * config.target_hidden_size),
        **{f"midlayer.{name}": shape for name, shape in layer.items()},
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (config.target_hidden_size,) for i in range(len(config.aux_layers))}
    if config.trains_embedding:
        shapes["embed_tokens.weight"] = (config.vocab_size, hidden)
    return shapes


def served_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """``d2t`` int64, ``t2d`` bool, every weight in ``dtype``."""
    return {"d2t": torch.int64, "t2d": torch.bool}.get(name, dtype)


def check_tensors(state: Mapping[str, Tensor], config: Eagle3DraftConfig, dtype: torch.dtype | None) -> None:
    """Raise :class:`DraftError` unless ``state`` has exactly the served tensors.

    ``dtype=None`` accepts any floating-point type for the weights. Engines skip unknown names and keep missing tensors
    at their random initialisation, both in silence; hence the strictness.
    """
    shapes = served_shapes(config)
    if unknown := sorted(set(state) - set(shapes)):
        raise DraftError(f"the draft has the tensor {unknown[0]!r}, which no engine loads; remove it before exporting")
    if missing := sorted(set(shapes) - set(state)):
        raise DraftError(f"the draft lacks the tensor {missing[0]!r}; an engine would leave it at random values")
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise DraftError(f"tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)} by the config")
        if dtype is None and name not in ("d2t", "t2d"):
            wrong = not tensor.is_floating_point()
        else:
            wrong = tensor.dtype != served_dtype(name, dtype or tensor.dtype)
        if wrong:
            raise DraftError(
                f"tensor {name!r} is {tensor.dtype}, expected {served_dtype(name, dtype or torch.bfloat16)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DraftError(f"tensor {name!r} has NaN or infinite values; the training diverged, export another step")
    check_vocabulary(state["d2t"], state["t2d"])


def check_vocabulary(d2t: Tensor, t2d: Tensor) -> None:
    """``d2t`` [W] are offsets (target id = i + d2t[i]) of ascending ids, exactly those marked in ``t2d`` [V]."""
    ids = d2t + torch.arange(len(d2t), device=d2t.device)
    inside = bool(((ids >= 0) & (ids < len(t2d))).all())
    ascending = bool((ids[1:] > ids[:-1]).all())
    if not inside or not ascending or not bool(t2d[ids].all()) or int(t2d.sum()) != len(d2t):
        raise DraftError(
            "d2t and t2d do not describe the same draft vocabulary: expected d2t to hold offsets of strictly ascending "
            "ids, all marked in t2d and no others; rebuild both from the kept ids"
        )
