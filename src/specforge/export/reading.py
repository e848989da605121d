"""What a reader makes of an exported ``config.json``: facts about the draft, in this project's own conventions.

Nothing here is shared with what writes the files, so that a mistake there shows: an export is refused unless these
facts are those of the draft config. Layer ids come out as "output of decoder layer i, 0-based".

A key that is not there is ``None``, never the reader's default: what matters is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIZES = (
    "hidden_size", "target_hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "max_position_embeddings", "vocab_size", "draft_vocab_size", "rope_theta", "rope_scaling",
)  # fmt: skip
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_NORMS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
_DSPARK = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")

Facts = dict[str, Any]


def _sizes(values: Mapping[str, Any]) -> Facts:
    """The sizes of the layers. The rotary settings are said twice, for the engines and for transformers."""
    facts = _pick(values, _SIZES)
    parameters = {**_nested(values, "rope_parameters")}
    theta = parameters.pop("rope_theta", None)
    scaling = {**(facts["rope_scaling"] or {})}
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
    if theta != facts["rope_theta"]:
        facts["rope_theta"] = {"engines read": facts["rope_theta"], "transformers reads": theta}
    if parameters != scaling:
        facts["rope_scaling"] = {"engines read": facts["rope_scaling"], "transformers reads": parameters}
    return facts


def read_plain(algorithm: str, served: Mapping[str, Any]) -> Facts:
    """The plain directory says every field by its name."""
    del algorithm
    readers = ("architectures", "model_type", "rope_parameters", "dtype", "torch_dtype", "specforge")
    facts = {name: value for name, value in served.items() if name not in readers}
    return facts | {name: value for name, value in _sizes(served).items() if name in ("rope_theta", "rope_scaling")}


def read_sglang(algorithm: str, served: Mapping[str, Any]) -> Facts:
    """SGLang's keys. Drafts of EAGLE's kind say their layers in two places, for SGLang and for vLLM."""
    facts = _sizes(served)
    if algorithm in {"eagle3", "peagle"}:
        ids = _nested(served, "eagle_config").get("eagle_aux_hidden_state_layer_ids")
        also = _from_inputs(served.get("eagle_aux_hidden_state_layer_ids"))
        facts["aux_layers"] = ids if ids == also else {"SGLang reads": ids, "vLLM reads": also}
        return facts | _eagle(algorithm, served, served)
    nested = _nested(served, "dflash_config")
    facts |= {
        "aux_layers": nested.get("target_layer_ids"),
        "mask_token_id": nested.get("mask_token_id"),
        "target_num_layers": served.get("num_target_layers"),
        **_block(served, served),
    }
    if algorithm == "domino":
        facts |= _pick(nested, ("emb_dim", "gru_hidden_dim", "shift_label", "pure_draft_prefix_len"))
    return facts | _pick(nested, _DSPARK) if algorithm == "dspark" else facts


def read_vllm(algorithm: str, served: Mapping[str, Any]) -> Facts:
    """vLLM's keys: of the layer where they size it, beside it where they belong to the algorithm."""
    if algorithm == "medusa":
        names = {"num_blocks": "num_hidden_layers", "num_heads": "num_heads", "shared_head": "original_lm_head"}
        facts = {own: served.get(name) for own, name in names.items()}
        return facts | {**_pick(served, ("hidden_size", "vocab_size")), "draft_vocab_size": _truncated(served)}
    layer = _nested(served, "transformer_layer_config")
    if not layer:  # latent attention, which the layout of speculators has no class for
        facts = _sizes(served) | _eagle(algorithm, served, served)
        return facts | {"aux_layers": _from_inputs(served.get("eagle_aux_hidden_state_layer_ids"))}
    facts = _sizes(layer) | _pick(served, ("draft_vocab_size", "target_hidden_size"))
    if algorithm in {"eagle3", "peagle"}:
        facts["aux_layers"] = _from_inputs(served.get("eagle_aux_hidden_state_layer_ids"))
        return facts | _eagle(algorithm, served, layer)
    facts |= {
        "aux_layers": _from_inputs(served.get("aux_hidden_state_layer_ids")),
        "mask_token_id": served.get("mask_token_id"),
        **_block(served, layer),
    }
    return facts | _pick(served, _DSPARK) if algorithm == "dspark" else facts


def _eagle(algorithm: str, served: Mapping[str, Any], layer: Mapping[str, Any]) -> Facts:
    if algorithm == "peagle":
        return {"num_layers": layer.get("num_hidden_layers"), "mask_token_id": served.get("mask_token_id")}
    return {
        **_pick(served, _NORMS),
        **{name: layer.get(name) for name in _LATENT},
        "architecture": "mla" if layer.get("q_lora_rank") else layer.get("model_type"),
    }


def _block(served: Mapping[str, Any], layer: Mapping[str, Any]) -> Facts:
    return {
        "num_layers": layer.get("num_hidden_layers"),
        "block_size": served.get("block_size"),
        "layer_types": layer.get("layer_types"),
        "sliding_window": layer.get("sliding_window"),
    }


def _pick(values: Mapping[str, Any], names: tuple[str, ...]) -> Facts:
    return {name: values.get(name) for name in names}


def _nested(served: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = served.get(name)
    return value if isinstance(value, Mapping) else {}


def _truncated(served: Mapping[str, Any]) -> Any:
    return served.get("truncated_vocab_size", served.get("vocab_size"))


def _from_inputs(ids: Any) -> Any:
    """Ids "input of layer i" as ids "output of layer i"."""
    whole = isinstance(ids, list) and all(isinstance(id_, int) for id_ in ids)
    return [id_ - 1 for id_ in ids] if whole else ids
