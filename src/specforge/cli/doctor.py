"""``specforge doctor``: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from specforge.cli.output import AsJson, flat, print_json, print_table, shown_bytes

MIN_PYTHON = (3, 11)
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)[^;]*(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?")


def register(app: typer.Typer) -> None:
    app.command(
        "doctor",
        short_help="Say what is installed, missing, and how to install it.",
        epilog="Example: specforge doctor --json",
    )(doctor)


def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, which extras are missing, and how to install them."""
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
