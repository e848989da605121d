"""The README.md of an exported draft: what it is, what it belongs to, how it was trained, how it is served."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from specforge import __version__
from specforge.algorithms.draft_config import DraftConfig
from specforge.contracts.capture import TargetInfo
from specforge.export.provenance import TrainingRecord

_CARD = """\
# {algorithm} draft for {name}

A draft model for speculative decoding. It proposes tokens that `{name}` verifies, so the output is that of the target.
Use it with exactly the target below; with another one it loads, but is hardly ever right.

| | |
|---|---|
{rows}
{training}
## Serving

{serving}
"""


_TRAINING = """
## Training

| | |
|---|---|
{rows}
"""


def model_card(
    algorithm: str,
    config: DraftConfig,
    target: TargetInfo,
    serving: str,
    dtype: str,
    training: TrainingRecord | None = None,
) -> str:
    """Markdown that ends with ``serving``. Names the target by its directory's last part, never by a path."""
    name = Path(target.path).name
    rows = {
        "target": f"`{name}` ({target.architecture}, {config.target_num_layers} layers, hidden size "
        f"{config.target_hidden_size})",
        "target revision": f"`{target.revision}`",
    }
    if config.aux_layers:
        rows['captured layers, "output of", 0-based (SGLang)'] = ", ".join(map(str, config.aux_layers))
        rows['captured layers, "input of" (vLLM)'] = ", ".join(str(layer + 1) for layer in config.aux_layers)
    rows |= {
        "draft": f"hidden size {config.hidden_size}, intermediate size {config.intermediate_size}, "
        f"{config.num_attention_heads} heads, {config.num_key_value_heads} key/value heads of {config.head_dim}",
        "vocabulary": f"{config.draft_vocab_size} of the target's {config.vocab_size} tokens",
        "variant": _variant(config),
        "weights": f"{dtype}, {config.num_parameters:,} parameters",
        "written by": f"SpecForge {__version__}",
    }
    return _CARD.format(
        algorithm=algorithm,
        name=name,
        rows=_table(rows),
        training="" if training is None else _TRAINING.format(rows=_table(training.rows())),
        serving=serving,
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(f"| {title} | {value} |" for title, value in rows.items())


def _variant(config: DraftConfig) -> str:
    """What the draft config says beyond the sizes that all drafts have."""
    common = {field.name for field in dataclasses.fields(DraftConfig)}
    own = {name: value for name, value in config.to_dict().items() if name not in common and value is not None}
    shown = (f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in own.items())
    return ", ".join(shown) or "none"
