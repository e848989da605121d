"""The token that capture servers want, as the server and those who ask it are given it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from specforge.errors import ConfigError

TOKEN_VARIABLE = "SPECFORGE_CAPTURE_TOKEN"  # noqa: S105 - the name of a variable


def read_token(file: Path | None) -> str | None:
    """The token of ``file``, else of the environment, else none. A file that others can read is a ``ConfigError``."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        mode = file.stat().st_mode
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: the token of the capture servers cannot be read ({error}); check the path"
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{file} holds a token, and others can read it: chmod 600 {file}")
    if not token.isascii() or not token.isprintable() or not token:
        raise ConfigError(f"{file}: expected the token of the capture servers, of printable ASCII characters")
    return token
