"""What SGLang loads (vLLM takes the same directories where their layout says so): algorithm -> layout."""

from __future__ import annotations

from specforge.export.base import ExportFormat
from specforge.export.blocks import DFlashLayout, DominoLayout, DSparkLayout
from specforge.export.eagle import Eagle3Layout, PEagleLayout
from specforge.export.reading import read_sglang

SGLANG = ExportFormat(
    name="sglang",
    title="SGLang",
    dtype="bfloat16",
    layouts={
        "eagle3": Eagle3Layout(),
        "peagle": PEagleLayout(),
        "dflash": DFlashLayout(),
        "domino": DominoLayout(),
        "dspark": DSparkLayout(),
    },
    understood=read_sglang,
)
