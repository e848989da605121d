"""ServerListing: which capture servers there are now, by the configuration and by a file that may change."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from specforge.inference.config import server_url

_LOG = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20
SETTLE_S = 0.2
"""How long the first look waits for a file that may still be in the middle of being written."""

_Version = tuple[int, int, int]
"""Time of the last change, size and inode of a file."""


class ServerListing:
    """``urls``, then those of ``file``: one a line, ``#`` begins a comment. Asked by one thread, every second or so.

    The file is read again when it has changed. What is no list of addresses is logged and leaves the list as it was,
    as a file does that vanished. One that does not end with a line's end may still be in the middle of being written,
    so it counts once it stayed as it is from one look to the next; the first look is two, with a short wait between.
    """

    def __init__(self, urls: Iterable[str], file: Path | None = None) -> None:
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._file = file
        self._listed: tuple[str, ...] = ()
        self._seen: _Version | None = None
        self._torn: _Version | None = None
        self._was_looked_at = False
        self._complaint = ""

    @property
    def may_change(self) -> bool:
        return self._file is not None

    def current(self) -> tuple[str, ...]:
        """The addresses, each once, without a slash at the end."""
        if self._file is not None:
            self._look(self._file)
            if self._torn is not None and not self._was_looked_at:
                time.sleep(SETTLE_S)
                self._look(self._file)
            self._was_looked_at = True
        return tuple(dict.fromkeys((*self._urls, *self._listed)))

    def __str__(self) -> str:
        named = [", ".join(self._urls)] if self._urls else []
        return " and ".join([*named, f"those listed in {self._file}"] if self._file is not None else named)

    def _look(self, file: Path) -> None:
        try:
            with file.open("rb") as stream:
                found = os.fstat(stream.fileno())
                version = found.st_mtime_ns, found.st_size, found.st_ino
                if version == self._seen:
                    return
                data = stream.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            self._seen = None
            self._complain(f"{file}: the list of capture servers cannot be read ({error.strerror})")
            return
        if not data.endswith(b"\n") and version != self._torn:
            self._torn = version
            return
        self._seen, self._torn = version, None
        try:
            self._listed = _parse(data)
            self._complaint = ""
        except ValueError as error:
            self._complain(f"{file}: {error}")

    def _complain(self, what: str) -> None:
        """Once, however often the same is found."""
        if what != self._complaint:
            kept = ", ".join(self._listed) or "none"
            _LOG.warning("%s; the capture servers known from it stay: %s", what, kept)
        self._complaint = what


def _parse(data: bytes) -> tuple[str, ...]:
    """The addresses in a list; a ``ValueError`` names the first line that is none."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"expected a list of capture servers of at most {MAX_FILE_BYTES:,} bytes")
    found: list[str] = []
    for number, raw in enumerate(data.decode(errors="replace").splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        try:
            found.append(server_url(line).rstrip("/"))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return tuple(found)
