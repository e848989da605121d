"""A plain directory for every algorithm: the weights under their served names, the whole draft config.

No engine promises to load it. It is what ``specforge eval`` and further training read, in full precision.
"""

from __future__ import annotations

from typing import Any

from specforge.algorithms.draft_config import DraftConfig
from specforge.export.base import DraftOrigin, ExportFormat, Layout, rope_keys
from specforge.export.reading import read_plain


class PlainLayout(Layout):
    """Every field of the draft config under its own name."""

    serving = """\
```
specforge eval --target TARGET --draft THIS_DIRECTORY --prompts PROMPTS.jsonl
```

No serving engine is promised to load this layout. Layer ids in `aux_layers` say "output of layer i", 0-based; where
there is a `d2t`, it holds offsets: target id = draft id + d2t[draft id]."""

    def config(self, config: DraftConfig, origin: DraftOrigin) -> dict[str, Any]:
        return {
            "architectures": [f"SpecForge{type(config).__name__.removesuffix('Config')}"],
            "model_type": f"specforge_{origin.options['name']}",
            **config.to_dict(),
            **rope_keys(config),
        }

    def shapes(self, config: DraftConfig) -> None:
        del config


HUGGINGFACE = ExportFormat(
    name="hf", title="Hugging Face", dtype="float32", layouts={}, understood=read_plain, any_other=PlainLayout()
)
