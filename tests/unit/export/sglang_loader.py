"""What SGLang's loaders ask of a draft directory, written down from its documentation and not from our exporter.

SGLang itself skips unknown names and leaves missing tensors at their initial values; here both are errors.

Legend: H hidden size of the draft, Ht of the target, I intermediate size, V target vocabulary, W draft vocabulary, K
captured layers, d head size.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
FIXED_DTYPES = {"d2t": torch.int64, "t2d": torch.bool}


class LoadError(Exception):
    """SGLang would not serve this directory as it was trained."""


def load(directory: Path, algorithm: str) -> None:
    """Raise :class:`LoadError` for the first thing that is not as SGLang's loader of ``algorithm`` needs it."""
    config = json.loads((directory / "config.json").read_text())
    expected = {"eagle3": eagle3, "peagle": peagle, "dflash": dflash, "domino": domino, "dspark": dspark}
    shapes = expected[algorithm](config)
    tensors = load_file(directory / "model.safetensors")
    if unknown := sorted(set(tensors) - set(shapes)):
        raise LoadError(f"unknown name {unknown[0]}")
    if missing := sorted(set(shapes) - set(tensors)):
        raise LoadError(f"missing name {missing[0]}")
    weights = getattr(torch, config["dtype"])
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise LoadError(f"{name} has shape {tuple(tensor.shape)}, not {shapes[name]}")
        if tensor.dtype != FIXED_DTYPES.get(name, weights):
            raise LoadError(f"{name} is {tensor.dtype}")


def common(config: Config, classes: tuple[str, ...], model_types: tuple[str, ...]) -> tuple[int, int]:
    """(H, Ht), after a look at the keys that every layout has."""
    need(config["architectures"] in [[name] for name in classes], f"architectures {config['architectures']}")
    need(config["model_type"] in model_types, f"model_type {config['model_type']}")
    need(config["tie_word_embeddings"] is False, "tied embeddings would replace the head")
    need(config["hidden_act"] == "silu" and not config["attention_bias"], "activation or bias")
    need(config["rope_parameters"]["rope_theta"] == config["rope_theta"], "rope_theta is said twice, differently")
    for name in ("rms_norm_eps", "max_position_embeddings", "head_dim", "num_hidden_layers", "vocab_size"):
        need(config[name] > 0, name)
    need(config["torch_dtype"] == config["dtype"], "dtype is said twice, differently")
    return config["hidden_size"], config["target_hidden_size"]


def need(holds: bool, what: str) -> None:
    if not holds:
        raise LoadError(what)


def projections(config: Config, width: int) -> Shapes:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (hidden, queries),
    }


def latent(config: Config, width: int) -> Shapes:
    heads, rank, kv = config["num_attention_heads"], config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = (config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    return {
        "self_attn.q_a_proj.weight": (rank, width),
        "self_attn.q_a_layernorm.weight": (rank,),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), rank),
        "self_attn.kv_a_proj_with_mqa.weight": (kv + rope, width),
        "self_attn.kv_a_layernorm.weight": (kv,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), kv),
        "self_attn.o_proj.weight": (config["hidden_size"], heads * value),
    }


def layer(config: Config) -> Shapes:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }


def eagle_frame(config: Config) -> Shapes:
    hidden, target = config["hidden_size"], config["target_hidden_size"]
    ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    need(config["eagle_config"]["use_aux_hidden_state"] is True, "use_aux_hidden_state")
    need(len(ids) == 3 and ids == sorted(set(ids)) and ids[0] >= 0, f"layers {ids}")
    for name in ("fc_norm", "norm_output"):
        need(isinstance(config[name], bool), name)
    shapes: Shapes = {"fc.weight": (hidden, 3 * target), "norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (config["draft_vocab_size"], hidden)
    if config["draft_vocab_size"] != config["vocab_size"]:
        shapes |= {"d2t": (config["draft_vocab_size"],), "t2d": (config["vocab_size"],)}
    return shapes


def eagle3(config: Config) -> Shapes:
    hidden, target = common(config, ("LlamaForCausalLMEagle3", "Eagle3DeepseekV2ForCausalLM"), ("llama", "deepseek_v3"))
    need(config["num_hidden_layers"] == 1, "one layer")
    is_latent = config["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
    need(is_latent == (config["model_type"] == "deepseek_v3"), "class and model_type")
    attention = latent(config, 2 * hidden) if is_latent else projections(config, 2 * hidden)
    own = {"hidden_norm.weight": (hidden,), **attention, **layer(config)}
    shapes = eagle_frame(config) | {f"midlayer.{name}": shape for name, shape in own.items()}
    if config["fc_norm"]:
        shapes |= {f"fc_norm.{index}.weight": (target,) for index in range(3)}
    return shapes


def peagle(config: Config) -> Shapes:
    hidden, target = common(config, ("LlamaForCausalLMEagle3",), ("llama",))
    need(config["parallel_drafting"] is True and 0 <= config["pard_token"] < config["vocab_size"], "mask token")
    shapes = eagle_frame(config) | {
        "mask_hidden": (1, 1, 3 * target),
        "embed_tokens.weight": (config["vocab_size"], hidden),
        "layers.0.hidden_norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        own = layer(config) | projections(config, hidden if index else 2 * hidden)
        shapes |= {f"layers.{index}.{name}": shape for name, shape in own.items()}
    return shapes


def backbone(config: Config, classes: tuple[str, ...]) -> Shapes:
    hidden, target = common(config, classes, ("qwen3",))
    nested, depth = config["dflash_config"], config["num_hidden_layers"]
    ids = nested["target_layer_ids"]
    need(config["block_size"] > 1, "block_size")
    need(bool(ids) and ids == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < config["num_target_layers"], f"{ids}")
    need(0 <= nested["mask_token_id"] < config["vocab_size"], "mask_token_id")
    need(config["draft_vocab_size"] == config["vocab_size"], "a pruned vocabulary has no head to read out with")
    need(len(config["layer_types"]) == depth, "layer_types")
    need("sliding_attention" not in config["layer_types"] or config["sliding_window"] > 0, "sliding_window")
    own = layer(config) | projections(config, hidden)
    own |= {f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}
    return {
        "fc.weight": (hidden, len(ids) * target),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        **{f"layers.{index}.{name}": shape for index in range(depth) for name, shape in own.items()},
    }


def dflash(config: Config) -> Shapes:
    return backbone(config, ("DFlashDraftModel",))


def domino(config: Config) -> Shapes:
    nested, hidden = config["dflash_config"], config["hidden_size"]
    need(nested["projector_type"] == "domino" and nested["shift_label"] is True, "projector")
    need(nested["pure_draft_prefix_len"] == 1, "pure_draft_prefix_len")
    state, width = nested["gru_hidden_dim"], nested["emb_dim"]
    need((state, width) == (config["gru_hidden_dim"], config["emb_dim"]), "sizes are said twice, differently")
    return backbone(config, ("DFlashDraftModel",)) | {
        "prefix_gru.weight_ih_l0": (3 * state, hidden),
        "prefix_gru.weight_hh_l0": (3 * state, state),
        "embed_proj.0.weight": (width, hidden + state),
        "embed_proj.2.weight": (config["vocab_size"], width),
    }


def dspark(config: Config) -> Shapes:
    nested, hidden, vocabulary = config["dflash_config"], config["hidden_size"], config["vocab_size"]
    need(nested["projector_type"] == "dspark", "projector")
    rank = nested["markov_rank"]
    shapes = backbone(config, ("DSparkDraftModel",))
    shapes |= {f"markov_head.markov_w{index}.weight": (vocabulary, rank) for index in (1, 2)}
    if nested["markov_head_type"] == "gated":
        shapes |= {"markov_head.gate_proj.weight": (rank, hidden + rank), "markov_head.gate_proj.bias": (rank,)}
    if nested["markov_head_type"] == "rnn":
        shapes |= {
            "markov_head.joint_proj.weight": (3 * rank, 2 * rank + hidden),
            "markov_head.joint_proj.bias": (3 * rank,),
        }
    if nested["enable_confidence_head"]:
        width = hidden + (rank if nested["confidence_head_with_markov"] else 0)
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return shapes
