"""``specforge serve-target``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from specforge.cli.output import AsJson, print_json
from specforge.config.load import section_from
from specforge.inference.config import TargetConfig
from specforge.inference.serving.settings import ServingSettings

DEFAULTS = ServingSettings()


def register(app: typer.Typer) -> None:
    app.command(
        "serve-target",
        short_help="Serve the frozen target, so that runs elsewhere train on its hidden states.",
        epilog="Example: specforge serve-target --target models/qwen3 --port 8100; then "
        "specforge train -c run.yaml 'target.servers.urls=[http://127.0.0.1:8100]'",
    )(serve_target)


def serve_target(
    target: Annotated[Path, typer.Option("--target", help="Directory of the target.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at; beyond this host a token is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8100,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the target's directory.")
    ] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads that compute, on a CPU.")] = 1,
    order: Annotated[
        str,
        typer.Option(
            "--order",
            help="strict: one sample a forward, the same bits whatever else is asked; arrival: batches of what waits.",
        ),
    ] = DEFAULTS.order,
    max_batch_tokens: Annotated[
        int, typer.Option("--max-batch-tokens", min=1, help="Tokens of a batch with its padding, with --order arrival.")
    ] = DEFAULTS.max_batch_tokens,
    max_queued: Annotated[
        int, typer.Option("--max-queued", min=1, help="Requests at one time; more are told to come later.")
    ] = DEFAULTS.max_queued,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="File (mode 0600) with the token that requests must carry; else SPECFORGE_CAPTURE_TOKEN, or none.",
        ),
    ] = None,
    feature_dirs: Annotated[
        list[Path] | None,
        typer.Option("--feature-dir", help="Requests may have features written below it. May be given several times."),
    ] = None,
    max_sinks: Annotated[
        int, typer.Option("--max-sinks", min=1, help="Feature stores that are open at one time.")
    ] = DEFAULTS.max_sinks,
    max_feature_bytes: Annotated[
        str | None,
        typer.Option(
            "--max-feature-bytes",
            metavar="SIZE",
            help="Memory of all feature stores, such as 8GB.",
            show_default="half of this host's shared memory",
        ),
    ] = None,
    max_inline_bytes: Annotated[
        str, typer.Option("--max-inline-bytes", metavar="SIZE", help="Features in answers that are on their way.")
    ] = "4GiB",
    sink_idle_s: Annotated[
        float,
        typer.Option(
            "--sink-idle-s", min=1, help="A feature store that is empty and unused for so many seconds is closed."
        ),
    ] = DEFAULTS.sink_idle_s,
    advertise_host: Annotated[
        str, typer.Option("--advertise-host", help="This host's address for others, for a Mooncake Store.")
    ] = DEFAULTS.advertise_host,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", help="File that gets the address once the server answers.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve the frozen target, so that runs elsewhere train on its hidden states; until Ctrl-C or SIGTERM."""
    values = {"path": str(target), "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    config = section_from(TargetConfig, "target", values, Path.cwd())
    settings = ServingSettings(
        order=_order(order),
        max_batch_tokens=max_batch_tokens,
        max_queued=max_queued,
        max_sinks=max_sinks,
        max_feature_bytes=None if max_feature_bytes is None else _size(max_feature_bytes, "--max-feature-bytes"),
        max_inline_bytes=_size(max_inline_bytes, "--max-inline-bytes"),
        feature_dirs=tuple(path.absolute() for path in feature_dirs or ()),
        advertise_host=advertise_host,
        sink_idle_s=sink_idle_s,
    )
    from specforge.launch.capture_token import read_token

    token = read_token(token_file)
    from specforge.launch.serve_target import ServeOptions, serve

    def announce(served: dict[str, Any]) -> None:
        if as_json:
            print_json(served)
        else:
            typer.echo(
                f"serving {served['target']} (revision {served['target_revision'][:16]}, {served['dtype']} on "
                f"{served['device']}) at {served['url']}"
            )

    serve(ServeOptions(config, host, port, token, threads, settings), announce, ready_file)


def _order(text: str) -> Any:
    if text not in ("strict", "arrival"):
        raise typer.BadParameter(f"expected strict or arrival, got {text}", param_hint="--order")
    return text


def _size(text: str, option: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"expected a size such as 8GB, got {text}", param_hint=option) from None
