"""What an export format is: how drafts of each algorithm are written for one kind of reader.

Legend: H hidden size of the draft, Ht of the target, I intermediate size, K captured layers, V target vocabulary,
W draft vocabulary, d head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from specforge.algorithms.draft_config import DraftConfig
from specforge.algorithms.parts.vocabulary import vocabulary_maps
from specforge.errors import DraftError

Shapes = dict[str, tuple[int, ...]]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class DraftOrigin:
    """What a layout knows besides the draft config: the options of the training, and the target by name and class.

    ``target_name`` is the last part of the target's directory, never a path.
    """

    options: Mapping[str, Any]
    target_name: str
    target_architecture: str


class Layout(ABC):
    """How drafts of one algorithm are written. ``serving`` (Markdown) says for the model card how they are served."""

    serving: ClassVar[str]

    @abstractmethod
    def config(self, config: Any, origin: DraftOrigin) -> dict[str, Any]:
        """The reader's keys of ``config.json``, without the number format.

        Raises :class:`DraftError` for the first option of the draft that the reader has no counterpart for.
        """

    def how_to_serve(self, config: Any, origin: DraftOrigin) -> str:
        """``serving`` for this draft."""
        del config, origin
        return self.serving

    @abstractmethod
    def shapes(self, config: Any) -> Shapes | None:
        """Shape of every tensor of the draft, by its own name; ``None``: whatever the draft has."""

    def rename(self, name: str, config: Any) -> str | None:
        """The reader's name of a tensor; ``None``: the reader wants none of it."""
        del config
        return name

    def reorder(self, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """``state``, under the draft's own names, with rows in the reader's order."""
        del config
        return dict(state)

    def restore(self, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The inverse of :meth:`reorder`."""
        del config
        return dict(state)

    def encode(self, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The draft's ``served_state()`` as the reader wants it."""
        names = {name: self.rename(name, config) for name in state}
        return {new: tensor for old, tensor in self.reorder(state, config).items() if (new := names[old]) is not None}

    def decode(self, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """The inverse of :meth:`encode`, of tensors that :func:`check_tensors` accepted."""
        shapes = self.shapes(config)
        if shapes is None:
            return dict(tensors)
        state = {old: tensors[new] for old in shapes if (new := self.rename(old, config)) is not None}
        return self.restore(state | full_vocabulary(set(shapes) - set(state), config), config)

    def written_shapes(self, config: Any) -> Shapes | None:
        """Shape of every tensor in the file, by the reader's name."""
        shapes = self.shapes(config)
        if shapes is None:
            return None
        return {new: shape for old, shape in shapes.items() if (new := self.rename(old, config)) is not None}


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """A format by name. ``any_other`` writes drafts of the algorithms that ``layouts`` does not name.

    ``understood`` reads facts about a draft out of its ``config.json`` as the reader does (:mod:`.reading`).
    ``refusals`` say why the reader serves no drafts of an algorithm, and what does.
    """

    name: str
    title: str
    dtype: str
    layouts: Mapping[str, Layout] = field(repr=False)
    understood: Callable[[str, Mapping[str, Any]], dict[str, Any]] = field(repr=False)
    any_other: Layout | None = None
    refusals: Mapping[str, str] = field(default_factory=dict, repr=False)

    def writes(self, algorithm: str) -> bool:
        return algorithm in self.layouts or self.any_other is not None

    def layout(self, algorithm: str) -> Layout:
        """How drafts of ``algorithm`` are written; a pair that nobody can read is a :class:`DraftError`."""
        found = self.layouts.get(algorithm, self.any_other)
        if found is None:
            reason = f" ({self.refusals[algorithm]})" if algorithm in self.refusals else ""
            raise DraftError(
                f"{self.title} serves no {algorithm} drafts{reason}; --to {self.name} writes "
                f"{', '.join(self.layouts)}; write this one with --to hf"
            )
        return found


def rope_keys(config: DraftConfig) -> dict[str, Any]:
    """The same rotary settings twice: transformers 5 reads ``rope_parameters``, the engines the other two."""
    scaling = dict(config.rope_scaling or {})
    kind = scaling.pop("type", "default")  # its old name
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": {"rope_type": kind, **scaling, "rope_theta": config.rope_theta},
    }


def size_keys(config: DraftConfig) -> dict[str, Any]:
    """Keys under which every reader finds the sizes of decoder layers."""
    names = (
        "hidden_size", "target_hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "max_position_embeddings", "vocab_size", "draft_vocab_size",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in names},
        **rope_keys(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def mlp_shapes(config: DraftConfig) -> Shapes:
    return {
        "mlp.gate_proj.weight": (config.intermediate_size, config.hidden_size),
        "mlp.up_proj.weight": (config.intermediate_size, config.hidden_size),
        "mlp.down_proj.weight": (config.hidden_size, config.intermediate_size),
    }


def vocabulary_shapes(config: DraftConfig) -> Shapes:
    return {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}


def is_pruned(config: DraftConfig) -> bool:
    return config.draft_vocab_size != config.vocab_size


def full_vocabulary(missing: set[str], config: DraftConfig) -> dict[str, Tensor]:
    """The maps of a draft that keeps the whole vocabulary, which no engine needs; empty where none is ``missing``."""
    if not missing:
        return {}
    d2t, t2d = vocabulary_maps(torch.arange(config.vocab_size), config.vocab_size)
    return {"d2t": d2t, "t2d": t2d}


def check_tensors(tensors: Mapping[str, Tensor], shapes: Shapes | None, dtype: torch.dtype | None) -> None:
    """Raise :class:`DraftError` unless ``tensors`` are exactly those of ``shapes``, finite, with weights in ``dtype``.

    ``dtype=None`` accepts any floating-point type. Engines skip unknown names and keep missing tensors at their random
    initialisation, both in silence; hence the strictness.
    """
    for name, tensor in tensors.items():
        if shapes is not None and name not in shapes:
            raise DraftError(f"the draft has the tensor {name!r}, which no engine loads; remove it before exporting")
        if shapes is not None and tuple(tensor.shape) != shapes[name]:
            raise DraftError(
                f"tensor {name!r} has shape {list(tensor.shape)}, expected {list(shapes[name])} by the config"
            )
        expected = tensor_dtype(name, tensor, dtype)
        if tensor.dtype != expected:
            raise DraftError(f"tensor {name!r} is {tensor.dtype}, expected {expected}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DraftError(f"tensor {name!r} has NaN or infinite values; the training diverged, export another step")
    if missing := sorted(set(shapes or ()) - set(tensors)):
        raise DraftError(f"the draft lacks the tensor {missing[0]!r}; an engine would leave it at random values")
    maps = [name for name in ("d2t", "t2d") if name in tensors]
    if len(maps) == 1:
        raise DraftError(f"the draft has the tensor {maps[0]!r} alone; expected both d2t and t2d, or neither")
    if maps:
        _check_vocabulary(tensors["d2t"], tensors["t2d"])


def tensor_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is stored as: ``d2t`` int64, ``t2d`` bool, every weight ``dtype`` (``None``: as it is)."""
    fixed = {"d2t": torch.int64, "t2d": torch.bool}
    if name in fixed:
        return fixed[name]
    if dtype is not None:
        return dtype
    return tensor.dtype if tensor.is_floating_point() else torch.float32


def _check_vocabulary(d2t: Tensor, t2d: Tensor) -> None:
    """``d2t`` [W] are offsets (target id = i + d2t[i]) of ascending ids, exactly those marked in ``t2d`` [V]."""
    if d2t.dim() != 1 or t2d.dim() != 1:
        raise DraftError(
            f"d2t has {d2t.dim()} dimensions and t2d {t2d.dim()}; expected one each; export the draft again"
        )
    ids = d2t + torch.arange(len(d2t), device=d2t.device)
    inside = bool(((ids >= 0) & (ids < len(t2d))).all())
    ascending = bool((ids[1:] > ids[:-1]).all())
    if not inside or not ascending or not bool(t2d[ids].all()) or int(t2d.sum()) != len(d2t):
        raise DraftError(
            "d2t and t2d do not describe the same draft vocabulary: expected d2t to hold offsets of strictly ascending "
            "ids, all marked in t2d and no others; rebuild both from the kept ids"
        )
