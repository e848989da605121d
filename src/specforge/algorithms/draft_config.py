"""What every draft's architecture record has in common. Imports no tensor library."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from specforge.contracts.capture import TargetInfo
from specforge.errors import ConfigError, DraftError


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The architecture of one draft: everything that its served ``config.json`` needs.

    ``aux_layers`` are ids "output of decoder layer i, 0-based" of a target with ``target_num_layers`` layers.
    ``rope_scaling`` is ``None`` for plain RoPE. ``draft_vocab_size == vocab_size`` means that nothing is pruned.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    target_num_layers: int

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Elements of all weights of the draft, the frozen ones included; vocabulary maps are not weights."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; ``from_dict`` is its inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config in ``values``. An unknown or a missing key is a :class:`DraftError`."""
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise DraftError(
                f"the draft config has the key {unknown[0]!r}, which {cls.__name__} does not have; "
                f"expected keys are {', '.join(known)}; remove it or read the draft with the version that wrote it"
            )
        required = [name for name, field in known.items() if field.default is MISSING]
        if missing := [name for name in required if name not in values]:
            raise DraftError(
                f"the draft config lacks the key {missing[0]!r}, which {cls.__name__} needs; "
                "the file is incomplete: write the draft again"
            )
        found: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**found)


class SizeOptions(BaseModel):
    """Options that size a draft's layers; ``null`` takes the target's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intermediate_size: PositiveInt | None = Field(None, description="Width of the draft's MLP; null: the target's.")
    num_attention_heads: PositiveInt | None = Field(None, description="Query heads of the draft; null: the target's.")
    num_key_value_heads: PositiveInt | None = Field(
        None, description="Key/value heads of the draft; null: the target's."
    )
    head_dim: PositiveInt | None = Field(None, description="Size of an attention head; null: the target's.")

    def sizes(self, target: TargetInfo) -> dict[str, Any]:
        """The fields of :class:`DraftConfig` that follow from the target and these options; no layers, no pruning.

        Heads that cannot be built are a :class:`ConfigError`.
        """
        heads = self.num_attention_heads or target.num_attention_heads
        groups, head_dim = self.num_key_value_heads or target.num_key_value_heads, self.head_dim or target.head_dim
        if heads % groups or head_dim % 2:
            raise ConfigError(
                f"num_attention_heads must be a multiple of num_key_value_heads and head_dim even, got {heads}, "
                f"{groups} and {head_dim} (what is left out is the target's); change these options of the algorithm"
            )
        return {
            "hidden_size": target.hidden_size,
            "target_hidden_size": target.hidden_size,
            "intermediate_size": self.intermediate_size or target.intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": head_dim,
            "rms_norm_eps": target.rms_norm_eps,
            "rope_theta": target.rope_theta,
            "rope_scaling": target.rope_scaling,
            "max_position_embeddings": target.max_position_embeddings,
            "vocab_size": target.vocab_size,
            "target_num_layers": target.num_layers,
        }


def pruned_size(chosen: int | None, target: TargetInfo) -> int:
    """The draft vocabulary's size: ``chosen``, or the target's. Raises :class:`ConfigError` for a larger one."""
    if chosen is not None and chosen > target.vocab_size:
        raise ConfigError(
            f"draft_vocab_size must be at most the target's vocabulary of {target.vocab_size}, got {chosen}; "
            "lower it or leave it out"
        )
    return chosen or target.vocab_size


def checked_layers(
    chosen: tuple[int, ...] | None, default: tuple[int, ...], num_layers: int, algorithm: str
) -> tuple[int, ...]:
    """``chosen``, or ``default``: captured layers, ids "output of layer i".

    Raises :class:`ConfigError` unless they are distinct, ascending and at most ``num_layers - 2``.
    """
    layers = default if chosen is None else chosen
    ascending = all(a < b for a, b in itertools.pairwise(layers))
    if not layers or not ascending or layers[0] < 0 or layers[-1] > num_layers - 2:
        origin = f"the default of {algorithm}" if chosen is None else "the option aux_layers"
        last = max(num_layers - 2, 0)
        raise ConfigError(
            f"expected distinct ascending layer ids between 0 and {num_layers - 2} for a target of {num_layers} "
            f"layers, got {list(layers)} from {origin}; set aux_layers, for example to {sorted({0, last // 2, last})}"
        )
    return layers
