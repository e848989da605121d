"""What vLLM loads: algorithm -> layout. Checked against vLLM 0.32 by ``make test-engines``."""

from __future__ import annotations

from typing import Any

from specforge.algorithms.medusa.config import MedusaDraftConfig
from specforge.errors import DraftError
from specforge.export.base import DraftOrigin, ExportFormat, Layout, Shapes
from specforge.export.reading import read_vllm
from specforge.export.speculators import (
    SpeculatorsDFlashLayout,
    SpeculatorsDSparkLayout,
    SpeculatorsEagle3Layout,
    SpeculatorsPEagleLayout,
)


class MedusaLayout(Layout):
    """Residual blocks and heads, flat. vLLM takes any other key with "num" and "heads" or "layers" in it for these."""

    serving = """\
```
vllm serve TARGET --speculative-config '{"model": "THIS_DIRECTORY", "method": "medusa", \\
  "num_speculative_tokens": NUM_HEADS}'
```"""

    def how_to_serve(self, config: MedusaDraftConfig, origin: DraftOrigin) -> str:
        del origin
        return self.serving.replace("NUM_HEADS", str(config.num_heads))

    def config(self, config: MedusaDraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        del origin
        if config.shared_head:
            raise DraftError(
                "the draft reads out through the target's head, of which vLLM wants a copy in the draft; train it with "
                "shared_head: false, or write it with --to hf"
            )
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "truncated_vocab_size": config.draft_vocab_size,
            "num_heads": config.num_heads,
            "num_hidden_layers": config.num_blocks,
            "medusa_fc_bias": True,
            "original_lm_head": False,
            "tie_word_embeddings": False,
        }

    def shapes(self, config: MedusaDraftConfig) -> Shapes:
        size, shapes = config.hidden_size, Shapes()
        for head in range(config.num_heads):
            for block in range(config.num_blocks):
                shapes |= {
                    f"blocks.{head}.layers.{block}.weight": (size, size),
                    f"blocks.{head}.layers.{block}.bias": (size,),
                }
            shapes[f"lm_heads.{head}.weight"] = (config.draft_vocab_size, size)
        return shapes


VLLM = ExportFormat(
    name="vllm",
    title="vLLM",
    dtype="bfloat16",
    layouts={
        "eagle3": SpeculatorsEagle3Layout(),
        "peagle": SpeculatorsPEagleLayout(),
        "dflash": SpeculatorsDFlashLayout(),
        "dspark": SpeculatorsDSparkLayout(),
        "medusa": MedusaLayout(),
    },
    understood=read_vllm,
    refusals={
        "domino": "it has no class for the correction by a GRU; SGLang has, write it with --to sglang",
        "mtp": "its classes are those of models that were released with such a layer",
    },
)
