"""``specforge doctor``: what this machine has, what is missing, and the command that installs it; with ``--engine``,
whether what a capture server gives is right.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from specforge.cli.output import AsJson, flat, print_columns, print_json, print_table, shown, shown_bytes
from specforge.inference.config import server_url

MIN_PYTHON = (3, 11)
DIALECTS = ("specforge", "vllm", "sglang")
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)[^;]*(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?")


def register(app: typer.Typer) -> None:
    app.command(
        "doctor",
        short_help="Say what is installed, missing, and how to install it; test a capture server.",
        epilog="Example: specforge doctor --engine http://127.0.0.1:8100 --target models/target",
    )(doctor)


def doctor(
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="URL", help="Test the capture server at this address instead.")
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--target", help="With --engine: the directory of the target that it serves.")
    ] = None,
    dialect: Annotated[
        str, typer.Option("--dialect", help=f"With --engine: what the server speaks, one of {', '.join(DIALECTS)}.")
    ] = "specforge",
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="With --engine: a file with its token.  [default: SPECFORGE_CAPTURE_TOKEN]"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="0,1,2", help="With --engine: ids of decoder layers to capture, from 0."),
    ] = None,
    feature_dir: Annotated[
        Path | None,
        typer.Option("--feature-dir", help="With --engine: a directory that both see, where it cannot answer inline."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, which extras are missing, and how to install them. With --engine: test whether what a
    capture server gives is what a draft would need; exit code 1 where it is not.
    """
    if engine is not None:
        _engine(engine, target, dialect, token_file, layers, feature_dir, as_json)
        return
    found = {"machine": machine(), "torch": torch_facts(), "packages": packages(), "extras": extras()}
    if as_json:
        print_json(found)
        return
    print_table("Machine", [*flat(found["machine"])])
    print_table("Torch", [*flat(found["torch"])])
    print_table(
        "Packages", [(name, version or "missing: pip install specforge") for name, version in found["packages"].items()]
    )
    print_table("Extras", [(name, _extra_line(extra)) for name, extra in found["extras"].items()])


def _engine(
    url: str,
    target: Path | None,
    dialect: str,
    token_file: Path | None,
    layers: str | None,
    feature_dir: Path | None,
    as_json: bool,
) -> None:
    if target is None or not target.is_dir():
        raise typer.BadParameter(f"{target or 'nothing'} is no directory; give the target's", param_hint="--target")
    if dialect not in DIALECTS:
        raise typer.BadParameter(f"{dialect!r} is not one of {', '.join(DIALECTS)}", param_hint="--dialect")
    try:
        server_url(url)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--engine") from None
    ids = layers.split(",") if layers is not None else []
    if not all(re.fullmatch(r"\s*\d{1,4}\s*", layer) for layer in ids) or len(set(map(int, ids))) < len(ids):
        raise typer.BadParameter(f"{layers!r} is no list of distinct ids such as 0,1,2", param_hint="--layers")
    from specforge.launch.self_test import Diagnosis, diagnose

    found = diagnose(Diagnosis(url, target, dialect, token_file, tuple(map(int, ids)), feature_dir))
    if as_json:
        print_json(found)
    else:
        print_table(f"Capture server {found['url']}", [*flat(found["info"]), ("tested layers", found["aux_layers"])])
        print_columns("Self-test", ("check", "verdict", "measured"), [_check_line(check) for check in found["checks"]])
        for sentence in found["sentences"]:
            print(f"* {sentence}")
    if not found["passed"]:
        raise typer.Exit(1)


def _check_line(check: dict[str, Any]) -> tuple[str, str, str]:
    measured = ", ".join(f"{name} {shown(value)}" for name, value in check["measured"].items())
    said = {"unverified": check["where"], "warning": f"{measured}; {check['where']}"}
    return check["name"], check["verdict"], said.get(check["verdict"], measured)


def machine() -> dict[str, Any]:
    """Interpreter, cores and shared memory."""
    shared = Path("/dev/shm")  # noqa: S108 - looked at, not written
    memory = shutil.disk_usage(shared) if shared.is_dir() else None
    return {
        "python": platform.python_version(),
        "python_is_supported": sys.version_info[:2] >= MIN_PYTHON,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "shared_memory": "missing"
        if memory is None
        else f"{shown_bytes(memory.free)} free of {shown_bytes(memory.total)}",
    }


def torch_facts() -> dict[str, Any]:
    """Devices and threads, or why torch cannot be used."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"usable": False, "reason": str(error)}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "usable": True,
        "version": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cuda_devices": devices,
        "threads": torch.get_num_threads(),
    }


def packages() -> dict[str, str | None]:
    """Version of every required package; ``None`` where it is missing."""
    return {name: _version(name) for name, extra in _requirements() if extra is None}


def extras() -> dict[str, dict[str, Any]]:
    """For every extra: the packages that are missing, and the command that installs it (``None``: nothing to do)."""
    found: dict[str, dict[str, Any]] = {}
    for name, extra in _requirements():
        if extra is not None:
            missing = found.setdefault(extra, {"missing": [], "install": None})["missing"]
            missing += [name] if _version(name) is None else []
    for extra, state in found.items():
        state["install"] = f"pip install 'specforge[{extra}]'" if state["missing"] else None
    return found


def _requirements() -> list[tuple[str, str | None]]:
    """(package, extra or ``None``) of every requirement of the installed specforge."""
    try:
        lines = metadata.requires("specforge") or []
    except metadata.PackageNotFoundError:
        return []
    matches = [match for match in map(_REQUIREMENT.match, lines) if match is not None]
    return [(match[1], match[2]) for match in matches]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extra_line(extra: dict[str, Any]) -> str:
    return f"missing {', '.join(extra['missing'])}: {extra['install']}" if extra["missing"] else "installed"
