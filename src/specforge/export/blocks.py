"""DFlash, Domino and DSpark drafts as SGLang loads them.

``dflash_config.target_layer_ids`` says "output of layer i". The target's embedding and head are shared: neither is in
the directory, and none of the drafts has a vocabulary of its own.

Legend: H hidden size of the draft, Ht of the target, K captured layers, V vocabulary, d head size.
"""

from __future__ import annotations

from typing import Any

from specforge.algorithms.domino.config import DominoDraftConfig
from specforge.algorithms.dspark.config import DSparkDraftConfig
from specforge.algorithms.parts.block_config import BlockDraftConfig
from specforge.errors import DraftError
from specforge.export.base import DraftOrigin, Layout, Shapes, mlp_shapes, size_keys

_SERVING = """\
```
python -m sglang.launch_server --model-path TARGET --speculative-algorithm {algorithm} \\
  --speculative-draft-model-path THIS_DIRECTORY --speculative-num-draft-tokens BLOCK_SIZE
```

BLOCK_SIZE is `block_size` of `config.json`. The embedding and the output head are the target's and not in here."""


class DFlashLayout(Layout):
    """The backbone alone."""

    serving = _SERVING.format(algorithm="DFLASH")

    def config(self, config: BlockDraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        del origin
        if config.draft_vocab_size != config.vocab_size:
            raise DraftError(
                f"the draft has a vocabulary of {config.draft_vocab_size} of {config.vocab_size} tokens, but SGLang "
                "reads block drafts out through the target's whole head; train it without draft_vocab_size"
            )
        return _backbone_config(config)

    def shapes(self, config: BlockDraftConfig) -> Shapes:
        return backbone_shapes(config)


class DominoLayout(DFlashLayout):
    """The backbone and the correction by a GRU. SGLang has no class of its own for it: the projector type tells."""

    serving = _SERVING.format(algorithm="DFLASH") + "\n\nSGLang serves Domino in bfloat16 on CUDA; vLLM does not."

    def config(self, config: BlockDraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        assert isinstance(config, DominoDraftConfig)
        if not config.shift_label or config.pure_draft_prefix_len != 1:
            raise DraftError(
                f"the draft was trained with shift_label {config.shift_label} and pure_draft_prefix_len "
                f"{config.pure_draft_prefix_len}, but SGLang drafts with shift_label true and a prefix of 1; "
                "train it so, or export it with --to hf"
            )
        sizes = {"emb_dim": config.emb_dim, "gru_hidden_dim": config.gru_hidden_dim}
        own = {"projector_type": "domino", "shift_label": True, "pure_draft_prefix_len": 1, **sizes}
        served = super().config(config, origin)
        return served | sizes | {"dflash_config": served["dflash_config"] | own}

    def shapes(self, config: BlockDraftConfig) -> Shapes:
        assert isinstance(config, DominoDraftConfig)
        hidden, state = config.hidden_size, config.gru_hidden_dim
        return backbone_shapes(config) | {
            "prefix_gru.weight_ih_l0": (3 * state, hidden),
            "prefix_gru.weight_hh_l0": (3 * state, state),
            "embed_proj.0.weight": (config.emb_dim, hidden + state),
            "embed_proj.2.weight": (config.vocab_size, config.emb_dim),
        }


class DSparkLayout(DFlashLayout):
    """The backbone, the bias from the previous token, and the confidence head."""

    serving = _SERVING.format(algorithm="DSPARK")

    def config(self, config: BlockDraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        assert isinstance(config, DSparkDraftConfig)
        own = {
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov_head_type,
            "enable_confidence_head": config.enable_confidence_head,
            "confidence_head_with_markov": config.confidence_head_with_markov,
        }
        served = super().config(config, origin)
        nested = served["dflash_config"]
        # the same keys at the top, where vLLM's class reads them
        top = {name: nested[name] for name in ("mask_token_id", "target_layer_ids")} | own
        names = {"architectures": ["DSparkDraftModel"], "dflash_config": nested | {"projector_type": "dspark"} | own}
        return served | top | names

    def shapes(self, config: BlockDraftConfig) -> Shapes:
        assert isinstance(config, DSparkDraftConfig)
        return dspark_shapes(config)


def dspark_shapes(config: DSparkDraftConfig) -> Shapes:
    """Shapes of a DSpark draft's tensors."""
    hidden, rank = config.hidden_size, config.markov_rank
    shapes = backbone_shapes(config)
    if rank:
        shapes |= {f"markov_head.markov_w{i}.weight": (config.vocab_size, rank) for i in (1, 2)}
        gates: dict[str, Shapes] = {
            "vanilla": {},
            "gated": {"gate_proj.weight": (rank, hidden + rank), "gate_proj.bias": (rank,)},
            "rnn": {"joint_proj.weight": (3 * rank, 2 * rank + hidden), "joint_proj.bias": (3 * rank,)},
        }
        shapes |= {f"markov_head.{name}": shape for name, shape in gates[config.markov_head_type].items()}
    if config.enable_confidence_head:
        width = hidden + (rank if config.confidence_head_with_markov else 0)
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    return shapes


def _backbone_config(config: BlockDraftConfig) -> dict[str, Any]:
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": config.num_layers,
        **size_keys(config),
        "block_size": config.block_size,
        "num_target_layers": config.target_num_layers,
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": config.num_layers,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.aux_layers),
        },
    }


def backbone_shapes(config: BlockDraftConfig) -> Shapes:
    """Shapes of the tensors that all block drafts have."""
    hidden = config.hidden_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        **mlp_shapes(config),
    }
    return {
        "fc.weight": (hidden, len(config.aux_layers) * config.target_hidden_size),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        **{f"layers.{i}.{name}": shape for i in range(config.num_layers) for name, shape in layer.items()},
    }
