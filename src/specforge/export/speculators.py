"""EAGLE-3, P-EAGLE, DFlash and DSpark drafts as vLLM loads them: the layout of the speculators library.

``transformer_layer_config`` sizes the draft's decoder layers, keys beside it belong to the algorithm, and
``speculators_config`` says how to propose and for which target ("verifier"). Layer ids say "input of layer i", one more
than this project's own. What vLLM 0.32 makes of it, where one could expect otherwise:

* it takes the number of captured layers of a llama-like draft from ``num_aux_hidden_states`` inside the layer's keys,
  never from the ids
* a ``d2t`` that prunes nothing is refused as an unknown weight, so the vocabulary maps are of pruned drafts alone
* the layout has no class for latent attention: such an EAGLE-3 draft is written flat, as ``deepseek_v2``
  (``deepseek_v3`` would be rewritten to the MTP class of that model)
* one switch, ``sliding_window_non_causal``, makes all layers of a block draft see what follows, or none
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specforge.algorithms.dspark.config import DSparkDraftConfig
from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.algorithms.parts.block_config import SLIDING, BlockDraftConfig
from specforge.algorithms.parts.mla import half_rotated, interleaved
from specforge.errors import DraftError
from specforge.export.base import DraftOrigin, Layout, Shapes, is_pruned, size_keys
from specforge.export.blocks import backbone_shapes, dspark_shapes
from specforge.export.eagle import CLASSES, VOCABULARY_MAPS, eagle3_shapes, latent_keys, peagle_shapes

LAYOUT_VERSION = "0.9.0"
"""Version of the speculators library whose layout this is."""
SPECULATORS = {
    "eagle3": "Eagle3Speculator",
    "peagle": "PEagleSpeculator",
    "dflash": "DFlashSpeculator",
    "dspark": "Qwen3DSparkModel",
}
"""``architectures`` by kind. vLLM puts a class of its own in the place of the first three."""
EAGLE3_PROPOSALS = 5
"""Tokens a round that the configuration of an EAGLE-3 draft suggests, where it was trained for as many."""

_SERVING = """\
```
vllm serve TARGET --speculative-config '{{"model": "THIS_DIRECTORY", "method": "{method}", \\
  "num_speculative_tokens": NUM_TOKENS{more}}}'
```

{note}"""
_PRUNED = "Where there is a `d2t`, it holds offsets: target id = draft id + d2t[draft id]."
_SHARED = "The embedding and the output head are the target's and not in here."


def speculators_keys(kind: str, config: Any, origin: DraftOrigin, num_proposals: int) -> dict[str, Any]:
    """What every draft in this layout says, but for its layers; ``kind`` is the name that vLLM knows it by."""
    return {
        "architectures": [SPECULATORS[kind]],
        "model_type": "speculators",
        "speculators_model_type": kind,
        "speculators_version": LAYOUT_VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": num_proposals,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": origin.target_name, "architectures": [origin.target_architecture]},
        },
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "tie_word_embeddings": False,
    }


class SpeculatorsLayout(Layout):
    """A draft that proposes ``num_proposals`` tokens a round, by its configuration and by its card."""

    @abstractmethod
    def num_proposals(self, config: Any, origin: DraftOrigin) -> int:
        """At most what the draft was trained for."""

    def how_to_serve(self, config: Any, origin: DraftOrigin) -> str:
        return self.serving.replace("NUM_TOKENS", str(self.num_proposals(config, origin)))


class SpeculatorsEagle3Layout(SpeculatorsLayout):
    """One decoder layer, ``layers.0``, llama-like or qwen3-like, whose attention reads 2H."""

    serving = _SERVING.format(method="eagle3", more="", note=_PRUNED)

    def num_proposals(self, config: Eagle3DraftConfig, origin: DraftOrigin) -> int:
        del config
        return min(EAGLE3_PROPOSALS, int(origin.options["ttt_steps"]))

    def config(self, config: Eagle3DraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        _check_norms(config)
        flags = {
            "fc_norm": config.fc_norm,
            "norm_output": config.norm_output,
            "norm_before_fc": config.norm_before_fc,
            "norm_before_residual": config.norm_before_residual,
            "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in config.aux_layers],
        }
        layer = {"num_hidden_layers": 1, "num_aux_hidden_states": len(config.aux_layers), **size_keys(config)}
        if config.architecture == "mla":
            names = {"architectures": [CLASSES["mla"]], "model_type": "deepseek_v2"}
            return layer | latent_keys(config) | names | flags
        if config.architecture not in {"llama", "qwen3"}:
            raise DraftError(
                f"the draft has the architecture {config.architecture}, which vLLM has no EAGLE-3 class for; train it "
                "with architecture: llama, qwen3 or mla, or export it with --to hf"
            )
        keys = speculators_keys("eagle3", config, origin, self.num_proposals(config, origin))
        return keys | flags | {"transformer_layer_config": {"model_type": config.architecture, **layer}}

    def shapes(self, config: Eagle3DraftConfig) -> Shapes:
        return eagle3_shapes(config)

    def rename(self, name: str, config: Eagle3DraftConfig) -> str | None:
        if name in VOCABULARY_MAPS and not is_pruned(config):
            return None
        return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name

    def reorder(self, state: Mapping[str, Tensor], config: Eagle3DraftConfig) -> dict[str, Tensor]:
        return interleaved(state, config) if config.architecture == "mla" else dict(state)

    def restore(self, state: Mapping[str, Tensor], config: Eagle3DraftConfig) -> dict[str, Tensor]:
        return half_rotated(state, config) if config.architecture == "mla" else dict(state)


class SpeculatorsPEagleLayout(SpeculatorsLayout):
    """EAGLE-3's layer and ordinary ones behind it; the draft's own embedding holds the mask token's row."""

    serving = _SERVING.format(method="eagle3", more=', "parallel_drafting": true', note=_PRUNED)

    def num_proposals(self, config: Any, origin: DraftOrigin) -> int:
        del config
        return int(origin.options["num_depths"])

    def config(self, config: Any, origin: DraftOrigin) -> dict[str, Any]:
        layer = {
            "model_type": "llama",
            "num_hidden_layers": config.num_layers,
            "num_aux_hidden_states": len(config.aux_layers),
            **size_keys(config),
        }
        return {
            **speculators_keys("peagle", config, origin, self.num_proposals(config, origin)),
            "mask_token_id": config.mask_token_id,
            "norm_before_residual": False,
            "norm_before_fc": False,
            "eagle_aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in config.aux_layers],
            "transformer_layer_config": layer,
        }

    def shapes(self, config: Any) -> Shapes:
        return peagle_shapes(config)

    def rename(self, name: str, config: Any) -> str | None:
        return None if name in VOCABULARY_MAPS and not is_pruned(config) else name


class SpeculatorsDFlashLayout(SpeculatorsLayout):
    """The backbone alone."""

    serving = _SERVING.format(method="dflash", more="", note=_SHARED)

    def num_proposals(self, config: BlockDraftConfig, origin: DraftOrigin) -> int:
        del origin
        return config.block_size - 1

    def config(self, config: BlockDraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        return _block_keys("dflash", config, origin, self.num_proposals(config, origin)) | {"sample_from_anchor": False}

    def shapes(self, config: BlockDraftConfig) -> Shapes:
        return backbone_shapes(config)


class SpeculatorsDSparkLayout(SpeculatorsLayout):
    """The backbone, a bias from the previous token, and the confidence head."""

    serving = _SERVING.format(method="dspark", more="", note=_SHARED)

    def num_proposals(self, config: DSparkDraftConfig, origin: DraftOrigin) -> int:
        del origin
        return config.num_proposals

    def config(self, config: DSparkDraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        if config.markov_head_type != "vanilla" or not config.markov_rank:
            raise DraftError(
                f"the draft has markov_head_type {config.markov_head_type} and markov_rank {config.markov_rank}, but "
                "vLLM computes the vanilla head of a rank above 0; train it so, or write it with --to sglang or hf"
            )
        return _block_keys("dspark", config, origin, self.num_proposals(config, origin)) | {
            "sample_from_anchor": True,
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov_head_type,
            "enable_confidence_head": config.enable_confidence_head,
            "confidence_head_with_markov": config.confidence_head_with_markov,
        }

    def shapes(self, config: DSparkDraftConfig) -> Shapes:
        return dspark_shapes(config)


def _block_keys(kind: str, config: BlockDraftConfig, origin: DraftOrigin, num_proposals: int) -> dict[str, Any]:
    if is_pruned(config):
        raise DraftError(
            f"the draft has a vocabulary of {config.draft_vocab_size} of {config.vocab_size} tokens and no head of its "
            "own; train it without draft_vocab_size"
        )
    sliding = [kind == SLIDING for kind in config.layer_types]
    if any(sliding) and not all(sliding):
        raise DraftError(
            f"the draft has layer_types {list(config.layer_types)}: the sliding ones are causal, the others not, and "
            "vLLM has one switch for all layers; train it with layers of one type, or write it with --to sglang"
        )
    return {
        **speculators_keys(kind, config, origin, num_proposals),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in config.aux_layers],
        "sliding_window_non_causal": not any(sliding),
        "transformer_layer_config": {
            "model_type": "qwen3",
            "num_hidden_layers": config.num_layers,
            **size_keys(config),
            "layer_types": list(config.layer_types),
            "sliding_window": config.sliding_window,
            "use_sliding_window": config.sliding_window is not None,
            "max_window_layers": config.num_layers,
        },
    }


def _check_norms(config: Eagle3DraftConfig) -> None:
    if config.norm_before_fc and (config.fc_norm or config.architecture == "mla"):
        what = "norm_before_fc together with fc_norm" if config.fc_norm else "norm_before_fc and architecture mla"
        raise DraftError(
            f"the draft was trained with {what}, which vLLM does not compute; train it with norm_before_fc: false, or "
            "export it with --to hf"
        )
