"""Terms: what a run wants of all its servers alike."""

from __future__ import annotations

import logging
import threading

from specforge.contracts.capture_server import ServerInfo
from specforge.errors import ServerRefused

_LOG = logging.getLogger(__name__)


class Terms:
    """One number format that the target computes in: ``dtype``, else (``None``) that of the first server accepted.

    ``num_tokens``: the longest sample that the run may have. ``strict``: the run's order is, so its features should not
    depend on their neighbours; a server where they may is warned of, once. From any thread.
    """

    def __init__(self, dtype: str | None = None, *, num_tokens: int = 0, strict: bool = False) -> None:
        self._dtype, self._is_named = dtype, dtype is not None
        self._num_tokens = num_tokens
        self._warns = strict
        self._lock = threading.Lock()

    def check(self, url: str, info: ServerInfo) -> None:
        """Raise ``ServerRefused`` for a server that computes in another format, or takes shorter samples only."""
        if info.max_tokens < self._num_tokens:
            raise ServerRefused(
                f"the capture server {url} ({info.engine} {info.engine_version}) takes samples of {info.max_tokens} "
                f"tokens, the run may have some of {self._num_tokens} (data.max_length); start it for longer ones, or "
                f"set data.max_length={info.max_tokens}"
            )
        if self._dtype in (None, info.dtype):
            return
        why = "target.dtype of the run is" if self._is_named else "the first server of the run computes in"
        raise ServerRefused(
            f"the capture server {url} ({info.engine} {info.engine_version}) computes in {info.dtype}, {why} "
            f"{self._dtype}; start it with {self._dtype}"
        )

    def accept(self, url: str, info: ServerInfo) -> None:
        """The server is used: all others have its format. Raises as :meth:`check` does."""
        with self._lock:
            self.check(url, info)
            self._dtype = info.dtype
            warns, self._warns = self._warns and not info.strict, self._warns and info.strict
        if warns:
            _LOG.warning(
                "the capture server %s does not keep to strict order: features of a sample may depend on what else it "
                "works on, so that the run may not repeat to the bit",
                url,
            )
