"""Reading a target's directory: its facts (``TargetInfo``), its content hash and its tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specforge.contracts.capture import TargetInfo
from specforge.errors import TargetError
from specforge.inference.plugins.target_files import revision_of, weight_shards


def read_target_info(path: str | Path, trust_remote_code: bool = False) -> TargetInfo:
    """The facts about the causal language model in the directory ``path``, with a content hash as its revision.

    Raises :class:`TargetError` for a directory that is missing, incomplete, pickled or not a causal language model.
    """
    directory = Path(path)
    config = _read_config(directory, trust_remote_code)
    shards = weight_shards(directory)
    architecture = _causal_architecture(config, directory)
    text = config.get_text_config(decoder=True)
    fields = text.to_dict()
    # older architectures store the common names under their own (GPT-2: n_head)
    fields |= {common: fields[own] for common, own in text.attribute_map.items() if own in fields}
    num_heads = _required(fields, "num_attention_heads", directory)
    hidden_size = _required(fields, "hidden_size", directory)
    theta, scaling = _rope(fields)
    mask_token_id, num_tokens = _tokenizer_ids(directory)
    return TargetInfo(
        path=str(directory),
        architecture=architecture,
        model_type=config.model_type,
        revision=revision_of(directory, shards),
        num_layers=_required(fields, "num_hidden_layers", directory),
        hidden_size=hidden_size,
        intermediate_size=fields.get("intermediate_size") or fields.get("ffn_dim") or 4 * hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=fields.get("num_key_value_heads") or num_heads,
        head_dim=fields.get("head_dim") or hidden_size // num_heads,
        vocab_size=_required(fields, "vocab_size", directory),
        rms_norm_eps=float(fields.get("rms_norm_eps") or fields.get("layer_norm_eps") or 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_required(fields, "max_position_embeddings", directory),
        tie_word_embeddings=bool(config.to_dict().get("tie_word_embeddings", False)),
        eos_token_ids=_eos_token_ids(directory, config, fields),
        logit_softcap=_optional_float(fields.get("final_logit_softcapping")),
        logit_scale=_logit_scale(fields),
        mask_token_id=mask_token_id,
        num_tokens=num_tokens,
    )


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the directory ``path``; a missing or broken one is a :class:`TargetError`."""
    directory = Path(path)
    if not directory.is_dir():
        raise TargetError(f"{directory} is not a directory; give the local directory of a target model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TargetError(
            f"{directory} has no tokenizer that transformers can load ({_first_line(error)}); "
            "put the model's tokenizer files beside its config.json"
        ) from None
    return tokenizer


def count_parameters(path: str | Path) -> int:
    """Elements of all tensors in the target's safetensors files, read from their headers."""
    total = 0
    for shard in weight_shards(Path(path)):
        with safe_open(shard, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _read_config(directory: Path, trust_remote_code: bool) -> PreTrainedConfig:
    if not directory.is_dir():
        raise TargetError(
            f"{directory} is not a directory; give the local directory of a Hugging Face causal language model"
        )
    if not (directory / "config.json").is_file():
        raise TargetError(f"{directory} has no config.json; give the directory that holds the model's configuration")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise TargetError(
            f"{directory}/config.json is not a configuration that transformers can load ({_first_line(error)}); "
            "check the file, or install the transformers version that the model asks for"
        ) from None
    return config


def _causal_architecture(config: PreTrainedConfig, directory: Path) -> str:
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    remote = (config.to_dict().get("auto_map") or {}).get("AutoModelForCausalLM")
    names = list(config.architectures or [])
    if remote and names:
        return names[0]
    if not names and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
    for name in names:
        if name in causal and not config.is_encoder_decoder:
            return name
    found = names[0] if names else f"model type {config.model_type!r}"
    raise TargetError(
        f"{directory} holds a {found}, which is not a causal language model; "
        "give a model that AutoModelForCausalLM loads (Llama, Qwen, Gemma, Phi, Mistral, ...)"
    )


def _required(fields: dict[str, Any], name: str, directory: Path) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or value <= 0:
        raise TargetError(f"{directory}/config.json: expected {name} to be a positive integer, got {value!r}")
    return value


def _rope(fields: dict[str, Any]) -> tuple[float, dict[str, bool | int | float | str] | None]:
    """RoPE base and scaling in the ``rope_parameters`` form of transformers 5 (which converts older configs).

    Models with one set a layer type answer with that of full attention. A scaling that needs lists (``longrope``)
    has no counterpart in a draft, which then uses plain RoPE.
    """
    parameters = fields.get("rope_parameters") or {}
    if "full_attention" in parameters:
        parameters = parameters["full_attention"] or {}
    theta = float(parameters.get("rope_theta") or fields.get("rope_theta") or 10_000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaling: dict[str, bool | int | float | str] = {}
    for name, value in parameters.items():
        if name in ("rope_theta", "partial_rotary_factor") or value is None:
            continue
        if isinstance(value, list | dict):
            return theta, None
        scaling[name] = value  # readers of an export want whole numbers and booleans as they were
    return theta, None if kind == "default" else scaling


def _eos_token_ids(directory: Path, config: PreTrainedConfig, fields: dict[str, Any]) -> tuple[int, ...]:
    """Stop tokens of generation_config.json where it names some, else of config.json. Ascending."""
    value: Any = None
    generation = directory / "generation_config.json"
    if generation.is_file():
        try:
            value = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError):
            raise TargetError(f"{generation} is not a JSON object; repair the file or remove it") from None
    if value is None:
        value = config.to_dict().get("eos_token_id")
    if value is None:
        value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(sorted({int(token) for token in ids}))


def _tokenizer_ids(directory: Path) -> tuple[int | None, int | None]:
    """The mask token's id and one more than the largest id, from the tokenizer's files and without loading it.

    The latter is ``None`` where the model's own tokens are not listed there: added tokens alone say nothing of it.
    """
    known = _json_object(directory / "tokenizer.json")
    vocabulary = (known.get("model") or {}).get("vocab")
    if isinstance(vocabulary, list):  # of a unigram model: [piece, score] by id
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    ids: dict[str, int] = dict(vocabulary or {})
    ids |= {token["content"]: token["id"] for token in known.get("added_tokens") or []}
    mask = _json_object(directory / "tokenizer_config.json").get("mask_token")
    mask = mask.get("content") if isinstance(mask, dict) else mask
    return ids.get(str(mask)), max(ids.values()) + 1 if vocabulary else None


def _json_object(path: Path) -> dict[str, Any]:
    """What ``path`` holds; empty where it is not there. A file that cannot be read is the tokenizer's to refuse."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _logit_scale(fields: dict[str, Any]) -> float:
    """Factor on the logits. Cohere multiplies, Granite divides, MiniCPM divides by its width multiplier."""
    if fields.get("logit_scale"):
        return float(fields["logit_scale"])
    if fields.get("logits_scaling"):
        return 1.0 / float(fields["logits_scaling"])
    if fields.get("dim_model_base"):
        return float(fields["dim_model_base"]) / float(fields["hidden_size"])
    return 1.0


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
