"""Pages of one file that open anywhere: no script, no network, everything escaped."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_DIRECTORY = Path(__file__).parent


def render_page(template: str, **values: Any) -> str:
    """The text of the page that ``template`` (a file beside this one) makes of ``values``."""
    environment = Environment(
        loader=FileSystemLoader(_DIRECTORY), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    style = (_DIRECTORY / "report.css").read_text(encoding="utf-8")
    # the one style sheet is allowed by its hash; scripts, images and connections are not allowed at all
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(style=style, style_hash=style_hash, **values)


def write_page(path: Path, page: str) -> None:
    """Write ``page`` to ``path``, whole or not at all."""
    partial = _partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def check_writable(path: Path) -> None:
    """Raise the ``OSError`` that :func:`write_page` would, of a directory or a name that does not work."""
    partial = _partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    partial.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
