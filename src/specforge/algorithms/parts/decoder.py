"""An ordinary pre-norm decoder layer, without its attention pattern: every algorithm brings its own.

Legend: R rows, H hidden size, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

from torch import Tensor, nn

from specforge.algorithms.draft_config import DraftConfig
from specforge.algorithms.parts.mlp import SwiGLU
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.rotary import Rotary, rotate


class Attention(nn.Module):
    """Projections of grouped-query attention under their served names; ``qk_norm`` norms every head before RoPE."""

    def __init__(self, config: DraftConfig, *, qk_norm: bool) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_groups = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, self.num_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, self.num_groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.rotary = Rotary(self.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    def queries(self, rows: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """[R, H] -> [R, n, d], turned by the rotary ``angles`` (``self.rotary(positions)``) of the rows."""
        return rotate(self.q_norm(self.q_proj(rows).unflatten(-1, (self.num_heads, self.head_dim))), *angles)

    def keys_values(self, rows: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[R, H] -> two of [R, m, d], the keys turned by the rotary ``angles`` of the rows."""
        keys = self.k_norm(self.k_proj(rows).unflatten(-1, (self.num_groups, self.head_dim)))
        return rotate(keys, *angles), self.v_proj(rows).unflatten(-1, (self.num_groups, self.head_dim))


class DecoderLayer(nn.Module):
    """``x + o(attention(input_layernorm(x)))``, then ``x + mlp(post_attention_layernorm(x))``.

    An algorithm that trains it inherits and adds ``forward``, in which its own attention is between the two.
    """

    def __init__(self, config: DraftConfig, *, qk_norm: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, qk_norm=qk_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP onto ``rows`` [R, H], which entered the layer; ``attended`` [R, n, d]."""
        rows = rows + self.self_attn.o_proj(attended.flatten(-2))
        output: Tensor = rows + self.mlp(self.post_attention_layernorm(rows))
        return output
