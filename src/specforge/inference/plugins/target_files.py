"""What a target's directory says without a library of models: its content hash, and its final norm.

Legend: S tokens, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specforge.errors import TargetError

FULL_HASH_BYTES = 64 * 2**20
"""Weight files up to this size are hashed whole; larger ones by samples."""
NUM_HASH_SAMPLES = 64
HASH_SAMPLE_BYTES = 64 * 2**10

_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

NormKind = Literal["weight", "one_plus_weight"]
FINAL_NORMS: dict[str, NormKind] = {
    "LlamaForCausalLM": "weight",
    "MistralForCausalLM": "weight",
    "MixtralForCausalLM": "weight",
    "Phi3ForCausalLM": "weight",
    "Qwen2ForCausalLM": "weight",
    "Qwen2MoeForCausalLM": "weight",
    "Qwen3ForCausalLM": "weight",
    "Qwen3MoeForCausalLM": "weight",
    "GemmaForCausalLM": "one_plus_weight",
    "Gemma2ForCausalLM": "one_plus_weight",
    "Gemma3ForCausalLM": "one_plus_weight",
}
"""Architectures whose final norm is known: RMSNorm in fp32, which multiplies by the weight in the dtype of the
computation, or (Gemma) by one plus the weight in fp32.
"""
_NORM_WEIGHT = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """A target's norm before its head. ``weight`` [H] in the dtype of the computation."""

    weight: Tensor
    eps: float
    kind: NormKind

    def __call__(self, hidden: Tensor) -> Tensor:
        """``hidden`` [S, H] after the norm, with the roundings of transformers."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.kind == "one_plus_weight":
            return (wide * (1.0 + self.weight.float())).to(hidden.dtype)
        return self.weight * wide.to(hidden.dtype)


def weight_shards(directory: Path) -> list[Path]:
    """The safetensors files of a target, in order of their names. A :class:`TargetError` where there are none."""
    shards = sorted(directory.glob("*.safetensors"))
    if shards:
        return shards
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise TargetError(
            f"{directory} has only pickled weights ({pickled[0]}), which are refused because loading them runs code; "
            "save the model again with save_pretrained, which writes safetensors"
        )
    raise TargetError(f"{directory} has no *.safetensors weights; give the directory that holds the model's weights")


def revision_of(directory: Path, shards: list[Path]) -> str:
    """sha256 over config.json and, per shard, name, size, header and content (evenly spaced samples of large files)."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for shard in shards:
        size = shard.stat().st_size
        digest.update(f"{shard.name}:{size}:".encode())
        with shard.open("rb") as file:
            if size <= FULL_HASH_BYTES:
                digest.update(file.read())
                continue
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0]
            start = 8 + header_bytes
            if start + HASH_SAMPLE_BYTES > size:
                raise TargetError(f"{shard} is not a complete safetensors file; fetch it again")
            digest.update(prefix + file.read(header_bytes))
            for sample in range(NUM_HASH_SAMPLES):
                file.seek(start + (size - start - HASH_SAMPLE_BYTES) * sample // (NUM_HASH_SAMPLES - 1))
                digest.update(file.read(HASH_SAMPLE_BYTES))
    return digest.hexdigest()


def read_revision(directory: Path) -> str:
    """The revision of the target in ``directory``, as ``TargetInfo`` has it. Raises :class:`TargetError`."""
    if not (directory / "config.json").is_file():
        raise TargetError(f"{directory} has no config.json; give the local directory of the model that is served")
    return revision_of(directory, weight_shards(directory))


def read_final_norm(directory: Path, dtype: torch.dtype) -> FinalNorm:
    """The final norm of the target in ``directory``, to compute with in ``dtype``.

    Raises :class:`TargetError` for an architecture whose norm is not known here, and for missing weights.
    """
    config = _read_config(directory)
    architecture = next(iter(config.get("architectures") or ()), "a model without a named architecture")
    kind = FINAL_NORMS.get(architecture)
    if kind is None:
        raise TargetError(
            f"the final norm of {architecture} ({directory}) is not known, only that of {', '.join(FINAL_NORMS)}: its "
            "last hidden states cannot be captured behind the norm; capture them with specforge serve-target"
        )
    eps = config.get("rms_norm_eps")
    if not isinstance(eps, float):
        raise TargetError(f"{directory}/config.json: expected rms_norm_eps to be a number, got {eps!r}; add it")
    return FinalNorm(_read_tensor(directory, _NORM_WEIGHT).to(dtype), eps, kind)


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{directory}/config.json cannot be read ({error}); fetch the model again") from None
    if not isinstance(config, dict):
        raise TargetError(f"{directory}/config.json is not a JSON object; fetch the model again")
    return config


def _read_tensor(directory: Path, name: str) -> Tensor:
    for shard in weight_shards(directory):
        try:
            with safe_open(shard, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 (not a mapping)
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
        except (OSError, SafetensorError) as error:
            raise TargetError(f"{shard} cannot be read ({error}); fetch the model again") from None
    raise TargetError(f"{directory} has no weight {name!r} in its safetensors files; fetch the model again")
