"""The README.md of an exported draft: what it is, what it belongs to, how it is served."""

from __future__ import annotations

from pathlib import Path

from specforge import __version__
from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.contracts.capture import TargetInfo

_CARD = """\
# EAGLE-3 draft for {name}

A draft model for speculative decoding. It proposes tokens that `{name}` verifies, so the output is that of the target.
Use it with exactly the target below; with another one it loads, but is hardly ever right.

| | |
|---|---|
| target | `{name}` ({architecture}, {num_layers} layers, hidden size {target_hidden_size}) |
| target revision | `{revision}` |
| captured layers, "output of", 0-based (SGLang) | {output_ids} |
| captured layers, "input of" (vLLM) | {input_ids} |
| draft | one decoder layer, hidden size {hidden_size}, intermediate size {intermediate_size}, \
{num_heads} heads, {num_kv_heads} key/value heads of {head_dim} |
| vocabulary | {draft_vocab_size} of the target's {vocab_size} tokens |
| variant | fc_norm {fc_norm}, norm_output {norm_output} |
| weights | {dtype}; the token embedding is the target's and not in here |
| written by | SpecForge {version} |

## Serving

```
python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 \\
  --speculative-draft-model-path THIS_DIRECTORY \\
  --speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6
```

`d2t` holds offsets: target id = draft id + d2t[draft id].
"""


def model_card(config: Eagle3DraftConfig, target: TargetInfo, dtype: str) -> str:
    """Markdown. Names the target by its directory's last part, never by a path of this machine."""
    return _CARD.format(
        name=Path(target.path).name,
        architecture=target.architecture,
        num_layers=config.target_num_layers,
        target_hidden_size=config.target_hidden_size,
        revision=target.revision,
        output_ids=", ".join(map(str, config.aux_layers)),
        input_ids=", ".join(str(layer + 1) for layer in config.aux_layers),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        draft_vocab_size=config.draft_vocab_size,
        vocab_size=config.vocab_size,
        fc_norm=str(config.fc_norm).lower(),
        norm_output=str(config.norm_output).lower(),
        dtype=dtype,
        version=__version__,
    )
