"""EAGLE-3: the architecture of a draft and the options of a run. Imports no tensor library."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from specforge.errors import DraftError

LayerId = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class Eagle3DraftConfig:
    """The architecture of one EAGLE-3 draft: everything that its served ``config.json`` needs.

    ``aux_layers`` are ids "output of decoder layer i, 0-based" of a target with ``target_num_layers`` layers.
    ``rope_scaling`` is ``None`` for plain RoPE. ``draft_vocab_size == vocab_size`` means that nothing is pruned.
    ``qk_norm`` puts an RMSNorm on every query and key head before RoPE. ``trains_embedding`` is true for drafts that
    own their token embedding (EAGLE-3 shares the target's).
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
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    qk_norm: bool = False
    trains_embedding: bool = False

    @property
    def num_parameters(self) -> int:
        """Elements of all weights, the frozen ones included; vocabulary maps are not weights."""
        hidden, fused = self.hidden_size, len(self.aux_layers) * self.target_hidden_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        matrices = (
            hidden * fused  # fc
            + 2 * hidden * (queries + 2 * keys)  # q, k, v read embedding and hidden state
            + queries * hidden  # o
            + 3 * hidden * self.intermediate_size
            + self.draft_vocab_size * hidden  # lm_head
        )
        norms = 4 * hidden + (self.fc_norm + self.norm_before_fc) * fused + 2 * self.qk_norm * self.head_dim
        return matrices + norms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; ``from_dict`` is its inverse."""
        return {**asdict(self), "aux_layers": list(self.aux_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Eagle3DraftConfig:
        """The config in ``values``. An unknown or a missing key is a :class:`DraftError`."""
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise DraftError(
                f"the draft config has the key {unknown[0]!r}, which no EAGLE-3 draft has; "
                f"expected keys are {', '.join(known)}; remove it or read the draft with the version that wrote it"
            )
        required = [name for name, field in known.items() if field.default is MISSING]
        if missing := [name for name in required if name not in values]:
            raise DraftError(
                f"the draft config lacks the key {missing[0]!r}, which an EAGLE-3 draft needs; "
                "the file is incomplete: write the draft again"
            )
        return cls(**{**values, "aux_layers": tuple(values["aux_layers"])})


class Eagle3Options(BaseModel):
    """Options of EAGLE-3 training (``algorithm`` section of a run). Sizes default to the target's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["eagle3"] = Field("eagle3", description="The algorithm these options belong to.")
    ttt_steps: PositiveInt = Field(7, description="Steps of the training-time-test unroll: tokens drafted in training.")
    step_decay: float = Field(
        0.8, gt=0.0, le=1.0, description="Weight of step k in the loss is step_decay**k (not normalised)."
    )
    mask_offset: Literal[0, 1, 2] = Field(
        2,
        description="Row j of step k is supervised where the loss mask of token j + offset + k is set. 2 is the token "
        "that the row predicts; 0 and 1 are the alignments of other public trainers.",
    )
    freeze_lm_head: bool = Field(False, description="Keep the draft's output head at the target's rows.")
    draft_vocab_size: PositiveInt | None = Field(
        None, description="Size of the pruned draft vocabulary; null keeps the target's vocabulary."
    )
    aux_layers: tuple[LayerId, ...] | None = Field(
        None,
        description="Target layers whose outputs feed the draft, 0-based 'output of layer i'; null takes "
        "[1, L//2 - 1, L - 4] for a target of L layers.",
    )
    fc_norm: bool = Field(False, description="EAGLE-3.1: an RMSNorm on each auxiliary block before they are fused.")
    norm_output: bool = Field(False, description="EAGLE-3.1: the hidden state carried to the next step is normed.")
    norm_before_residual: bool = Field(
        False, description="The residual of the attention block is the normed hidden state instead of the raw one."
    )
    norm_before_fc: bool = Field(False, description="One RMSNorm over all auxiliary blocks before they are fused.")
    intermediate_size: PositiveInt | None = Field(None, description="Width of the draft's MLP; null: the target's.")
    num_attention_heads: PositiveInt | None = Field(None, description="Query heads of the draft; null: the target's.")
    num_key_value_heads: PositiveInt | None = Field(
        None, description="Key/value heads of the draft; null: the target's."
    )
    head_dim: PositiveInt | None = Field(None, description="Size of an attention head; null: the target's.")
