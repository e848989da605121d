"""``specforge export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specforge.cli.output import AsJson, named, print_json, print_table

FORMATS = ("sglang", "vllm", "hf")
DTYPES = ("bfloat16", "float16", "float32")
NAMES = {
    "path": "directory",
    "format": "format",
    "algorithm": "algorithm",
    "dtype": "weights as",
    "num_tensors": "tensors",
    "num_bytes": "size",
    "reload_difference_to_rounded": "reloaded, logits differ by",
    "reload_difference_to_original": "rounding costs (logits)",
}
"""What a person is shown of an export; ``--json`` has all of it."""


def register(app: typer.Typer) -> None:
    app.command(
        "export",
        short_help="Write a draft as a serving engine loads it.",
        epilog="Example: specforge export --checkpoint runs/chat --to sglang --out draft",
    )(export)


def export(
    checkpoint: Annotated[Path, typer.Option("--checkpoint", help="A checkpoint, or a run (its newest checkpoint).")],
    out: Annotated[
        Path, typer.Option("--out", help="Directory to write: new, empty, or an earlier export, which is replaced.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="sglang: what SGLang loads; vllm: what vLLM loads (the layout of speculators); hf: the plain weights "
            "and the whole draft config, for every algorithm.",
        ),
    ] = "sglang",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help=f"Weights as {', '.join(DTYPES)}.  [default: float32 for hf, bfloat16 for the others]"
        ),
    ] = None,
    accepted_length_from: Annotated[
        Path | None,
        typer.Option(
            "--accepted-length-from",
            metavar="REPORT.json",
            help="Output of specforge eval --json on this draft: the model card says the accepted length.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a draft in the format that a serving engine loads, and check what was written."""
    for option, value, choices in (("--to", to, FORMATS), ("--dtype", dtype, DTYPES)):
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=option)
    from specforge.launch.export import export_draft

    written = export_draft(checkpoint, to, out, dtype, accepted_length_from)
    if as_json:
        print_json(written)
    else:
        print_table("Exported", named(written, NAMES))
