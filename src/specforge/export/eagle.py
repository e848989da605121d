"""EAGLE-3 and P-EAGLE drafts as SGLang loads them (vLLM takes these directories too, but for latent attention).

The vocabulary maps are written of a pruned vocabulary only: vLLM 0.32 refuses a ``d2t`` that prunes nothing.

Two conventions of layer ids are on disk at once: ``eagle_config.eagle_aux_hidden_state_layer_ids`` says "output of
layer i" (SGLang), the top-level ``eagle_aux_hidden_state_layer_ids`` says "input of layer i" and is one higher (vLLM).

Legend: H hidden size of the draft, Ht of the target, K captured layers, W draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.algorithms.parts.architectures import draft_architecture
from specforge.algorithms.parts.mla import half_rotated, interleaved
from specforge.errors import DraftError
from specforge.export.base import DraftOrigin, Layout, Shapes, is_pruned, mlp_shapes, size_keys, vocabulary_shapes

NUM_SERVED_AUX_LAYERS = 3
CLASSES = {"llama": "LlamaForCausalLMEagle3", "mla": "Eagle3DeepseekV2ForCausalLM"}
"""Engine class of each draft architecture that has one."""
VOCABULARY_MAPS = ("d2t", "t2d")
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

_EAGLE3_SERVING = """\
```
python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 \\
  --speculative-draft-model-path THIS_DIRECTORY \\
  --speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6
```

Where there is a `d2t`, it holds offsets: target id = draft id + d2t[draft id]. vLLM loads this directory too,
but for DeepSeek's attention, which `--to vllm` writes."""

_PEAGLE_SERVING = """\
This is the layout of EAGLE-3 with parallel drafting, which vLLM loads (method `eagle3`, `parallel_drafting: true`).
Check that the SGLang at hand drafts in parallel before serving it there: released versions knew EAGLE-3 alone.

Where there is a `d2t`, it holds offsets: target id = draft id + d2t[draft id]."""


class Eagle3Layout(Layout):
    """One decoder layer, ``midlayer``, whose attention reads token and hidden state side by side (2H)."""

    serving = _EAGLE3_SERVING

    def config(self, config: Eagle3DraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        del origin
        if config.architecture not in CLASSES:
            raise DraftError(
                f"the draft has the architecture {config.architecture}, which SGLang's EAGLE-3 classes do not compute; "
                f"train it with architecture: {' or '.join(CLASSES)}, or export it with --to hf"
            )
        engine_class = CLASSES[config.architecture]
        for name in ("norm_before_residual", "norm_before_fc"):
            if getattr(config, name):
                raise DraftError(
                    f"the draft was trained with {name}, which SGLang's {engine_class} does not compute; "
                    f"train it with {name}: false, or export it with --to hf"
                )
        _check_aux_layers(config.aux_layers, engine_class)
        served = {
            "architectures": [engine_class],
            "model_type": "llama",
            "num_hidden_layers": 1,
            **size_keys(config),
            **_aux_keys(config.aux_layers),
            "fc_norm": config.fc_norm,
            "norm_output": config.norm_output,
            "norm_before_fc": config.norm_before_fc,
            "norm_before_residual": config.norm_before_residual,
        }
        return served | latent_keys(config) if config.architecture == "mla" else served

    def shapes(self, config: Eagle3DraftConfig) -> Shapes:
        return eagle3_shapes(config)

    def rename(self, name: str, config: Eagle3DraftConfig) -> str | None:
        return None if name in VOCABULARY_MAPS and not is_pruned(config) else name

    def reorder(self, state: Mapping[str, Tensor], config: Eagle3DraftConfig) -> dict[str, Tensor]:
        return interleaved(state, config) if config.architecture == "mla" else dict(state)

    def restore(self, state: Mapping[str, Tensor], config: Eagle3DraftConfig) -> dict[str, Tensor]:
        return half_rotated(state, config) if config.architecture == "mla" else dict(state)


class PEagleLayout(Layout):
    """The first of several layers is EAGLE-3's; the draft owns its embedding, which holds the mask token's row."""

    serving = _PEAGLE_SERVING

    def config(self, config: Any, origin: DraftOrigin) -> dict[str, Any]:
        del origin
        _check_aux_layers(config.aux_layers, CLASSES["llama"])
        return {
            "architectures": [CLASSES["llama"]],
            "model_type": "llama",
            "num_hidden_layers": config.num_layers,
            **size_keys(config),
            **_aux_keys(config.aux_layers),
            "parallel_drafting": True,
            "mask_token_id": config.mask_token_id,
            "pard_token": config.mask_token_id,
            "ptd_token_id": config.mask_token_id,
            "fc_norm": False,
            "norm_output": False,
            "norm_before_fc": False,
            "norm_before_residual": False,
        }

    def shapes(self, config: Any) -> Shapes:
        return peagle_shapes(config)

    def rename(self, name: str, config: Any) -> str | None:
        return None if name in VOCABULARY_MAPS and not is_pruned(config) else name


def eagle3_shapes(config: Eagle3DraftConfig) -> Shapes:
    """Shapes of an EAGLE-3 draft's tensors by their own names."""
    hidden, fused = config.hidden_size, len(config.aux_layers) * config.target_hidden_size
    attention = draft_architecture(config.architecture).shapes(config, 2 * hidden)
    layer: Shapes = {
        "hidden_norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        **mlp_shapes(config),
    }
    shapes: Shapes = {
        "fc.weight": (hidden, fused),
        **{f"midlayer.{name}": shape for name, shape in layer.items()},
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        **vocabulary_shapes(config),
    }
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (config.target_hidden_size,) for i in range(len(config.aux_layers))}
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (fused,)
    return shapes


def peagle_shapes(config: Any) -> Shapes:
    """Shapes of a P-EAGLE draft's tensors by their own names."""
    hidden, fused = config.hidden_size, len(config.aux_layers) * config.target_hidden_size
    shapes: Shapes = {
        "fc.weight": (hidden, fused),
        "mask_hidden": (1, 1, fused),
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        **vocabulary_shapes(config),
    }
    for index in range(config.num_layers):
        width = hidden if index else 2 * hidden
        layer: Shapes = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            **{f"self_attn.{name}": shape for name, shape in _grouped_query(config, width).items()},
            **mlp_shapes(config),
        }
        if not index:
            layer["hidden_norm.weight"] = (hidden,)
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _grouped_query(config: Any, width: int) -> Shapes:
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q_proj.weight": (queries, width),
        "k_proj.weight": (keys, width),
        "v_proj.weight": (keys, width),
        "o_proj.weight": (config.hidden_size, queries),
    }


def _check_aux_layers(aux_layers: tuple[int, ...], engine_class: str) -> None:
    if len(aux_layers) != NUM_SERVED_AUX_LAYERS:
        raise DraftError(
            f"the draft reads aux_layers {list(aux_layers)}, but SGLang's {engine_class} reads "
            f"{NUM_SERVED_AUX_LAYERS} layers; train it with {NUM_SERVED_AUX_LAYERS} auxiliary layers"
        )


def _aux_keys(aux_layers: tuple[int, ...]) -> dict[str, Any]:
    return {
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(aux_layers), "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in aux_layers],
        "num_aux_hidden_states": len(aux_layers),
    }


def latent_keys(config: Eagle3DraftConfig) -> dict[str, Any]:
    """What DeepSeek's configuration has besides; every layer is dense.

    Numbers where transformers 5 checks for numbers: it refuses ``n_routed_experts: null``.
    """
    return {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 1,
        "n_routed_experts": 0,
        "rope_interleave": True,
        **{name: getattr(config, name) for name in LATENT_SIZES},
    }
