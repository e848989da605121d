"""A connector for tests, with an engine that leaves out the hidden states of one step in five. Runs inside vLLM."""

from __future__ import annotations

import itertools
from typing import Any

from specforge.inference.plugins.vllm_connector import SpecForgeConnector


class ForgetfulConnector(SpecForgeConnector):
    """Overwrites what was extracted, and does not hear of it."""

    _steps = itertools.count(1)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        if "cache_only_layers" in layer_name and next(self._steps) % 5 == 0:
            block_size = kv_layer.shape[2]
            slots = attn_metadata.slot_mapping.clamp_min(0)
            kv_layer[slots // block_size, :, slots % block_size] = 1e4
            return
        super().save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)
