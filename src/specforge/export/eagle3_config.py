"""The served ``config.json`` of an EAGLE-3 draft, written and read.

Two conventions of layer ids are on disk at once: ``eagle_config.eagle_aux_hidden_state_layer_ids`` says "output of
layer i" (SGLang), the top-level ``eagle_aux_hidden_state_layer_ids`` says "input of layer i" and is one higher (vLLM).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specforge import __version__
from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.contracts.capture import TargetInfo
from specforge.errors import DraftError

ARCHITECTURE = "LlamaForCausalLMEagle3"
NUM_SERVED_AUX_LAYERS = 3
PROVENANCE_KEY = "specforge"

_SAME_NAME = (
    "hidden_size",
    "target_hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "vocab_size",
    "draft_vocab_size",
    "fc_norm",
    "norm_output",
    "norm_before_residual",
    "norm_before_fc",
)
"""Keys that a served config and an ``Eagle3DraftConfig`` share."""


def served_config(config: Eagle3DraftConfig, target: TargetInfo, dtype: str) -> dict[str, Any]:
    """The JSON object that SGLang and vLLM read. Every flag is explicit: the engines' defaults differ."""
    ids = list(config.aux_layers)
    values = config.to_dict()
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        **{name: values[name] for name in _SAME_NAME},
        # transformers 5 reads this form, the engines the two keys above
        "rope_parameters": {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in ids],
        "num_aux_hidden_states": len(ids),
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        PROVENANCE_KEY: {
            "version": __version__,
            "algorithm": "eagle3",
            "target_name": Path(target.path).name,
            "target_architecture": target.architecture,
            "target_revision": target.revision,
            "target_num_layers": config.target_num_layers,
            "trains_embedding": config.trains_embedding,
        },
    }


def draft_config(served: dict[str, Any], source: Path) -> Eagle3DraftConfig:
    """The inverse of :func:`served_config`; a config that this exporter did not write is a :class:`DraftError`."""
    if served.get("architectures") != [ARCHITECTURE]:
        raise DraftError(
            f"{source} describes {served.get('architectures')}, expected [{ARCHITECTURE!r}]; "
            "give a directory that specforge export wrote"
        )
    provenance = served.get(PROVENANCE_KEY)
    eagle = served.get("eagle_config")
    if not isinstance(provenance, dict) or not isinstance(eagle, dict):
        raise DraftError(
            f"{source} lacks {PROVENANCE_KEY!r} or 'eagle_config'; give a directory that specforge export wrote"
        )
    missing = [name for name in _SAME_NAME if name not in served]
    missing += [name for name in ("target_num_layers", "trains_embedding") if name not in provenance]
    if missing:
        raise DraftError(f"{source} lacks the key {missing[0]!r}; export the draft again")
    ids = eagle.get("eagle_aux_hidden_state_layer_ids") or []
    if served.get("eagle_aux_hidden_state_layer_ids") != [layer + 1 for layer in ids]:
        raise DraftError(
            f"{source} gives the layers {ids} as 'output of' ids, but its top-level 'input of' ids are not one higher "
            f"({served.get('eagle_aux_hidden_state_layer_ids')}); export the draft again"
        )
    config = Eagle3DraftConfig.from_dict(
        {
            **{name: served[name] for name in _SAME_NAME},
            "aux_layers": ids,
            "target_num_layers": provenance["target_num_layers"],
            "trains_embedding": provenance["trains_embedding"],
        }
    )
    _check_rope(served, config, source)
    return config


def refuse_unservable(config: Eagle3DraftConfig) -> None:
    """Raise :class:`DraftError` for the first option of the draft that SGLang has no counterpart for."""
    options = config.to_dict()
    for name in ("qk_norm", "norm_before_residual", "norm_before_fc"):
        if options[name]:
            raise DraftError(
                f"the draft was trained with {name}, which SGLang's {ARCHITECTURE} does not compute; "
                f"train it with {name}: false, or export it to an engine that serves it"
            )
    if len(config.aux_layers) != NUM_SERVED_AUX_LAYERS:
        raise DraftError(
            f"the draft reads aux_layers {list(config.aux_layers)}, but SGLang's {ARCHITECTURE} reads "
            f"{NUM_SERVED_AUX_LAYERS} layers; train it with {NUM_SERVED_AUX_LAYERS} auxiliary layers"
        )


def _check_rope(served: dict[str, Any], config: Eagle3DraftConfig, source: Path) -> None:
    expected = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    if served.get("rope_parameters") != expected:
        raise DraftError(
            f"{source}: rope_parameters {served.get('rope_parameters')} do not say the same as rope_theta and "
            "rope_scaling; export the draft again"
        )
