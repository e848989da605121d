"""Draft architectures: what the attention of a draft's decoder layer is made of. Imports no tensor library.

An architecture is registered under a name with :func:`register_draft` and says which weights it has and which module
reads them; algorithms bring the attention pattern. A package adds one by an entry point of the group
``specforge.drafts``, whose name is the architecture's and whose value a class that is decorated with it.

Legend: H hidden size, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from specforge.algorithms.draft_config import DraftConfig, SizeOptions
from specforge.contracts.capture import TargetInfo
from specforge.errors import ConfigError, DraftError

ENTRY_POINTS = "specforge.drafts"
LARGE_HIDDEN_SIZE = 2048
"""Targets at least as wide get the sizes of DeepSeek-V3's latent attention."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig(DraftConfig):
    """A draft config that names its architecture. The last five sizes are those of ``mla``, ``None`` for others.

    For ``mla``, ``head_dim`` is ``qk_nope_head_dim + qk_rope_head_dim`` and every query head has its own key head.
    """

    architecture: str = "llama"
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None


class ArchitectureOptions(SizeOptions):
    """Options that choose and size a draft's attention."""

    architecture: str = Field(
        "llama",
        description="Attention of the draft: llama, qwen3 (llama with normed query and key heads), mla (DeepSeek's "
        "latent attention), or one that an installed package registers.",
    )
    q_lora_rank: PositiveInt | None = Field(None, description="mla: rank of the queries; null: by the target's size.")
    kv_lora_rank: PositiveInt | None = Field(
        None, description="mla: rank of keys and values; null: by the target's size."
    )
    qk_nope_head_dim: PositiveInt | None = Field(
        None, description="mla: part of a query or key head without a position; null: by the target's size."
    )
    qk_rope_head_dim: PositiveInt | None = Field(
        None, description="mla: part of a query or key head that is rotated, even; null: by the target's size."
    )
    v_head_dim: PositiveInt | None = Field(None, description="mla: size of a value head; null: by the target's size.")

    def sizes(self, target: TargetInfo) -> dict[str, Any]:
        """As :meth:`SizeOptions.sizes`, and the fields of :class:`ArchitectureConfig`."""
        chosen = draft_architecture(self.architecture)
        return {**super().sizes(target), "architecture": self.architecture, **chosen.sizes(self, target)}


class Architecture(ABC):
    """One architecture. ``attention`` is its :class:`~specforge.algorithms.parts.projections.DraftAttention`, as
    ``module:class``; it is imported when a draft is built.
    """

    attention: ClassVar[str]

    def sizes(self, options: ArchitectureOptions, target: TargetInfo) -> dict[str, Any]:
        """Fields of the draft config that this architecture sets, or sets otherwise than the options say.

        Options that it has no use for are a :class:`ConfigError`.
        """
        del target
        unused = [name for name in LATENT_OPTIONS if getattr(options, name) is not None]
        if unused:
            raise ConfigError(
                f"{unused[0]} is a size of the architecture 'mla', but architecture is {options.architecture!r}; "
                "leave it out, or set architecture: mla"
            )
        return {}

    @abstractmethod
    def shapes(self, config: ArchitectureConfig, input_size: int) -> Shapes:
        """Shape of every weight of the attention by its name in it; its input is ``input_size`` wide, its output H."""

    def check(self, config: ArchitectureConfig) -> None:
        """Raise :class:`DraftError` for sizes that cannot be built."""
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise DraftError(
                f"num_attention_heads ({config.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({config.num_key_value_heads}) and head_dim ({config.head_dim}) even; change the draft config"
            )


LATENT_OPTIONS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

_registered: dict[str, Architecture] = {}


def register_draft(name: str) -> Callable[[type[Architecture]], type[Architecture]]:
    """Class decorator: the architecture is called ``name`` from now on. A name that is taken is a ConfigError."""

    def register(cls: type[Architecture]) -> type[Architecture]:
        if name in _registered:
            raise ConfigError(
                f"the draft architecture {name!r} of {cls.__module__} is taken by {type(_registered[name]).__module__};"
                " register it under a name of its own"
            )
        _registered[name] = cls()
        return cls

    return register


def draft_architectures() -> tuple[str, ...]:
    """Names of all architectures, those of installed packages included."""
    _load_entry_points()
    return tuple(_registered)


def draft_architecture(name: str) -> Architecture:
    """The architecture called ``name``. An unknown name is a :class:`ConfigError`."""
    if name not in _registered and name not in draft_architectures():
        raise ConfigError(
            f"there is no draft architecture {name!r}; expected one of {', '.join(draft_architectures())}; "
            "choose one of them or install the package that registers it"
        )
    return _registered[name]


def num_elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@functools.cache
def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


@register_draft("llama")
class Llama(Architecture):
    """Grouped-query attention."""

    attention = "specforge.algorithms.parts.projections:GroupedQueryAttention"

    def shapes(self, config: ArchitectureConfig, input_size: int) -> Shapes:
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return {
            "q_proj.weight": (queries, input_size),
            "k_proj.weight": (keys, input_size),
            "v_proj.weight": (keys, input_size),
            "o_proj.weight": (config.hidden_size, queries),
        }


@register_draft("qwen3")
class Qwen3(Llama):
    """Grouped-query attention whose query and key heads are normed before they are rotated."""

    attention = "specforge.algorithms.parts.projections:NormedGroupedQueryAttention"

    def shapes(self, config: ArchitectureConfig, input_size: int) -> Shapes:
        norm = (config.head_dim,)
        return {**super().shapes(config, input_size), "q_norm.weight": norm, "k_norm.weight": norm}


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); ``rope`` is even."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int

    @classmethod
    def of(cls, config: ArchitectureConfig) -> LatentSizes:
        """The sizes in ``config``; a missing one is a :class:`DraftError`."""
        values = (
            config.q_lora_rank,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            missing = LATENT_OPTIONS[values.index(None)]
            raise DraftError(f"a draft of the architecture 'mla' needs {missing}, got none; add it to the draft config")
        return cls(*known)


@register_draft("mla")
class MultiHeadLatent(Architecture):
    """DeepSeek's latent attention: queries, and keys with values, pass through a narrow normed layer."""

    attention = "specforge.algorithms.parts.mla:LatentAttention"

    def sizes(self, options: ArchitectureOptions, target: TargetInfo) -> dict[str, Any]:
        if target.hidden_size >= LARGE_HIDDEN_SIZE:
            default = LatentSizes(1536, 512, 128, 64, 128)
        else:
            head = max(target.head_dim, 4)
            default = LatentSizes(
                max(target.hidden_size // 2, 1), max(target.hidden_size // 4, 1), head, head // 4 * 2, head
            )
        nope = options.qk_nope_head_dim or default.nope
        rope = options.qk_rope_head_dim or default.rope
        if rope % 2:
            raise ConfigError(f"qk_rope_head_dim must be even, got {rope}; its halves are rotated as pairs")
        if options.head_dim is not None or options.num_key_value_heads is not None:
            raise ConfigError(
                "the architecture 'mla' has no head_dim and no num_key_value_heads of its own; set qk_nope_head_dim, "
                "qk_rope_head_dim and v_head_dim instead"
            )
        return {
            "num_key_value_heads": options.num_attention_heads or target.num_attention_heads,
            "head_dim": nope + rope,
            "q_lora_rank": options.q_lora_rank or default.q_rank,
            "kv_lora_rank": options.kv_lora_rank or default.kv_rank,
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope,
            "v_head_dim": options.v_head_dim or default.value,
        }

    def shapes(self, config: ArchitectureConfig, input_size: int) -> Shapes:
        heads, sizes = config.num_attention_heads, LatentSizes.of(config)
        return {
            "q_a_proj.weight": (sizes.q_rank, input_size),
            "q_a_layernorm.weight": (sizes.q_rank,),
            "q_b_proj.weight": (heads * (sizes.nope + sizes.rope), sizes.q_rank),
            "kv_a_proj_with_mqa.weight": (sizes.kv_rank + sizes.rope, input_size),
            "kv_a_layernorm.weight": (sizes.kv_rank,),
            "kv_b_proj.weight": (heads * (sizes.nope + sizes.value), sizes.kv_rank),
            "o_proj.weight": (config.hidden_size, heads * sizes.value),
        }

    def check(self, config: ArchitectureConfig) -> None:
        sizes = LatentSizes.of(config)
        consistent = config.head_dim == sizes.nope + sizes.rope
        if sizes.rope % 2 or not consistent or config.num_key_value_heads != config.num_attention_heads:
            raise DraftError(
                f"a draft of the architecture 'mla' needs an even qk_rope_head_dim (got {sizes.rope}), head_dim = "
                f"qk_nope_head_dim + qk_rope_head_dim (got {config.head_dim} and {sizes.nope} + {sizes.rope}) and as "
                f"many key heads as query heads (got {config.num_key_value_heads} and {config.num_attention_heads}); "
                "change the draft config"
            )
