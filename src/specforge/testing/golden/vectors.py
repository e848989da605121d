"""Finding and reading vectors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from specforge.testing.golden.report import InputsAbsent


@dataclass(frozen=True, slots=True)
class Vector:
    """One vector: ``facts`` is its json, ``tensors`` its twin (``in. w. mid. out. grad.``; empty without one)."""

    path: Path
    family: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with ``prefix.``, without it."""
        head = prefix + "."
        return {name.removeprefix(head): value for name, value in self.tensors.items() if name.startswith(head)}


def find_vectors(directory: Path) -> list[Path]:
    """The json files below ``directory``, sorted."""
    return sorted(directory.rglob("*.json"))


def read_vector(path: Path) -> Vector:
    """The vector in ``path``."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    twin = path.with_suffix(".safetensors")
    return Vector(path, path.parent.name, facts, load_file(twin) if twin.exists() else {})


def present(path: Path) -> Path:
    """``path``, or an :class:`InputsAbsent` where nothing is there."""
    if not path.is_file():
        raise InputsAbsent(f"its inputs are in {path.name}, which is not there")
    return path


def read_source(path: Path) -> Vector:
    """The vector in ``path`` that another one takes its inputs from, or an :class:`InputsAbsent`."""
    return read_vector(present(present(path.with_suffix(".safetensors")).with_suffix(".json")))


def named_source(vector: Vector) -> Vector:
    """The vector beside ``vector`` whose tensors its ``inputs`` names."""
    named = re.search(r"(\S+)\.safetensors", vector.facts["inputs"])
    if named is None:
        raise ValueError(f"no file named in inputs: {vector.facts['inputs']!r}")
    return read_source(vector.path.parent / f"{named[1]}.json")


def recorded_sizes(facts: dict[str, Any], aux_width: int) -> dict[str, Any]:
    """Fields that every EAGLE-like draft config has, from the ``config`` of a vector whose features are ``aux_width``
    wide. Layer ids are not recorded: any that ascend will do.
    """
    num_aux = aux_width // facts["hidden_size"]
    return {
        "hidden_size": facts["hidden_size"],
        "target_hidden_size": facts["hidden_size"],
        "intermediate_size": facts["intermediate_size"],
        "num_attention_heads": facts["heads"],
        "num_key_value_heads": facts["kv_heads"],
        "head_dim": facts["head_dim"],
        "rms_norm_eps": facts["rms_eps"],
        "rope_theta": facts["rope_theta"],
        "rope_scaling": None,
        "max_position_embeddings": 2048,
        "vocab_size": facts["vocab"],
        "draft_vocab_size": facts.get("draft_vocab", facts["vocab"]),
        "aux_layers": tuple(range(num_aux)),
        "target_num_layers": num_aux + 1,
    }
