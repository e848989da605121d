"""The frozen tables of a target, read from its directory without loading the model.

Only the rows of the token embedding and of the output head are read from the safetensors files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specforge.algorithms.base import TargetTables
from specforge.errors import TargetError

EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
PICKLED_PATTERNS = ("*.bin", "*.pt", "*.pth")


def load_target_tables(
    directory: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TargetTables:
    """Embedding and output head of the target in ``directory``, cast to ``dtype``, and what it does to its logits.

    A tied head is the embedding itself (one tensor). Raises :class:`TargetError` where the directory has no
    safetensors weights (pickled ones are refused) or lacks one of the two tables.
    """
    root = Path(directory)
    config = read_target_config(root)
    files = weight_files(root)
    embedding_name = _find(files, EMBEDDING_NAMES)
    if embedding_name is None:
        raise TargetError(
            f"{root} has no token embedding: expected a tensor named *{EMBEDDING_NAMES[0]}; check the target"
        )
    embedding = read_tensor(files, embedding_name).to(device, dtype)
    head_name = None if config.get("tie_word_embeddings", False) else _find(files, HEAD_NAMES)
    bias = None
    if head_name is None:
        if config.get("tie_word_embeddings") is False:
            raise TargetError(
                f"{root} has no output head: expected a tensor named {HEAD_NAMES[0]} because its config.json says that "
                "tie_word_embeddings is false; check the target"
            )
        head = embedding
    else:
        head = read_tensor(files, head_name).to(device, dtype)
        bias_name = head_name.removesuffix("weight") + "bias"
        bias = read_tensor(files, bias_name).to(device, dtype) if bias_name in files else None
    return TargetTables(embedding, head, _softcap(config), _scale(config), bias, root)


def read_target_config(root: Path) -> dict[str, Any]:
    """The text part of ``config.json``."""
    path = root / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TargetError(
            f"{root} is not a target directory: it has no config.json; give a local model directory"
        ) from None
    except ValueError as error:
        raise TargetError(f"{path} is not valid JSON ({error}); repair the target") from None
    if not isinstance(config, dict):
        raise TargetError(f"{path} holds no JSON object; repair the target")
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def weight_files(root: Path) -> dict[str, Path]:
    """File of every tensor name, from the index or from the single file."""
    index = root / "model.safetensors.index.json"
    if index.exists():
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: root / file for name, file in names.items()}
    single = root / "model.safetensors"
    if single.exists():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if any(True for pattern in PICKLED_PATTERNS for _ in root.glob(pattern)):
        raise TargetError(
            f"{root} has pickled weights only, which can run code when they are read; "
            "convert the target with save_pretrained(..., safe_serialization=True)"
        )
    raise TargetError(f"{root} has no weights: expected model.safetensors or model.safetensors.index.json")


def _find(files: dict[str, Path], endings: tuple[str, ...]) -> str | None:
    """The tensor with one of ``endings`` as its last name parts; the shortest name wins over those of side towers."""
    found = [name for name in files for ending in endings if name == ending or name.endswith("." + ending)]
    return min(found, key=lambda name: (name.count("."), name)) if found else None


def read_tensor(files: dict[str, Path], name: str) -> Tensor:
    with _open(files[name]) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise TargetError(f"{path} cannot be read ({error}); copy the target again") from None


def _softcap(config: dict[str, Any]) -> float | None:
    value = config.get("final_logit_softcapping")
    return None if value is None else float(value)


def _scale(config: dict[str, Any]) -> float:
    """Factor on the logits. Cohere multiplies, Granite divides, MiniCPM divides by its width multiplier."""
    if config.get("logit_scale") is not None:
        return float(config["logit_scale"])
    if config.get("logits_scaling") is not None:
        return 1.0 / float(config["logits_scaling"])
    if config.get("dim_model_base") is not None:
        return float(config["dim_model_base"]) / float(config["hidden_size"])
    return 1.0
