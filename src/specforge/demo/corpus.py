"""The demo's text: source and documentation of the Python standard library of this machine.

Modules are split by name, so the split is the same on every machine and every Python version: a module is
held out when the first byte of the SHA-256 of its dotted name is below ``HELD_OUT_BYTE_LIMIT``.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_BYTE_LIMIT = 26  # about one module in ten

_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "encodings",  # character tables, not text
    "ensurepip",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
}
_MIN_CHARS = 400


@dataclass(frozen=True)
class Module:
    """One module of the standard library: its dotted name, its text and the SHA-256 of that text."""

    name: str
    text: str

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(self.name.encode("utf-8")).digest()[0] < HELD_OUT_BYTE_LIMIT


def standard_library_modules(root: Path | None = None) -> list[Module]:
    """Every readable module below ``root`` (default: this interpreter's standard library), sorted by name.

    Tests, installed packages and tables are left out. ``pydoc_data.topics`` counts as documentation: its entries
    are taken as plain text, not as the string literals they are stored as.
    """
    base = Path(sysconfig.get_path("stdlib")) if root is None else root
    modules = []
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).parts
        if any(part in _SKIPPED_DIRECTORIES or part.startswith("config-") for part in parts[:-1]):
            continue
        name = ".".join(parts)[: -len(".py")].removesuffix(".__init__")
        text = _documentation_topics() if name == "pydoc_data.topics" else _read_text(path)
        if text is not None and len(text) >= _MIN_CHARS:
            modules.append(Module(name, text))
    return sorted(modules, key=lambda module: module.name)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None  # a few modules declare another source encoding, or are not readable: not needed


def _documentation_topics() -> str | None:
    try:
        from pydoc_data.topics import topics  # generated documentation, one entry a topic
    except ImportError:
        return None
    return "\n\n".join(str(topics[key]).strip() for key in sorted(topics))
