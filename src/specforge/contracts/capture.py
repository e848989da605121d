"""CaptureSpec (what an algorithm wants captured) and TargetInfo (what is known of a target)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from specforge.contracts.features import FeatureSpec, layout

CaptureDtype = Literal["bfloat16", "float32", "float8_e4m3fn"]
"""Number formats of captured hidden states."""
FLOAT8 = "float8_e4m3fn"
SCALE_SUFFIX = "_scale"
"""A float8 feature ``x`` travels with the feature ``x_scale``."""


@dataclass(frozen=True, slots=True)
class CaptureSpec:
    """Which hidden states to capture. Written by an algorithm, read by every engine; an engine knows no algorithm.

    A layer id ``i`` means the residual stream *after* decoder layer ``i``, 0-based. Feature ``aux`` is the
    concatenation over ``aux_layers`` in list order, shape ``[tokens, len(aux_layers) * hidden_size]``; feature ``last``
    is the last hidden state *after* the final norm, shape ``[tokens, hidden_size]``; feature ``input_ids`` (int32) is
    always captured.

    ``dtype``, a ``CaptureDtype``, is that of ``aux`` and ``last``. In float8 each has a scale for every token and
    captured layer beside it: ``aux_scale`` float32 ``[tokens, len(aux_layers)]`` and ``last_scale`` ``[tokens, 1]``.
    """

    aux_layers: tuple[int, ...]
    last_hidden: bool
    dtype: str = "float32"

    def widths(self, hidden_size: int) -> tuple[tuple[str, str, int], ...]:
        """(name, dtype, D) of every feature ``[tokens, D]`` besides ``input_ids``, in the order of the buffer."""
        found: list[tuple[str, str, int]] = []
        for name, num_layers in (("aux", len(self.aux_layers)), ("last", int(self.last_hidden))):
            if num_layers:
                found.append((name, self.dtype, num_layers * hidden_size))
                if self.dtype == FLOAT8:
                    found.append((name + SCALE_SUFFIX, "float32", num_layers))
        return tuple(found)

    def layout(self, hidden_size: int, num_tokens: int) -> tuple[tuple[FeatureSpec, ...], int]:
        """Features of a sample of ``num_tokens`` tokens, ``input_ids`` first, and the bytes of its buffer."""
        widths = [(name, dtype, (num_tokens, width)) for name, dtype, width in self.widths(hidden_size)]
        return layout([("input_ids", "int32", (num_tokens,)), *widths])

    @property
    def fingerprint(self) -> str:
        """Short content hash: equal specs give equal fingerprints."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """The facts about a target that algorithms, plans and exports need. Read from its directory, never edited.

    ``revision`` is a content hash of configuration and weights. ``rope_scaling`` is ``None`` for plain RoPE.
    ``logit_softcap`` and ``logit_scale``: what the target does to its logits after the head (``None``, 1.0: nothing).
    ``mask_token_id`` and ``num_tokens`` are the tokenizer's: its mask token, one more than its largest id (``None``:
    it has none, or there is no tokenizer).
    """

    path: str
    architecture: str
    model_type: str
    revision: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, bool | int | float | str] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    mask_token_id: int | None = None
    num_tokens: int | None = None

    @property
    def unused_token_id(self) -> int:
        """An embedding row that no text uses, for drafts that mask: the tokenizer's mask token, else the first row that
        it does not know. Where it knows them all a stop token, where nobody knows what it knows the last row: tables
        are mostly padded, and drafts read stop tokens in texts.
        """
        if self.mask_token_id is not None:
            return self.mask_token_id
        if self.num_tokens is not None and self.num_tokens < self.vocab_size:
            return self.num_tokens
        if self.num_tokens is not None and self.eos_token_ids:
            return self.eos_token_ids[0]
        return self.vocab_size - 1
