"""The endpoint of a run's control plane. The supervisor holds it, so that it outlives the process that serves it."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from typing import Self

from specforge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A listening socket, its URL, and the token that every request carries.

    While no process serves, connections wait in the backlog of the socket: clients find the successor there.
    """

    listener: socket.socket
    url: str
    token: str

    @classmethod
    def open(cls, host: str, port: int) -> Self:
        """Port 0 takes any free one. An address that cannot be listened on is a :class:`ConfigError`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=512)
        except OSError as error:
            raise ConfigError(
                f"the control-plane server cannot listen on {host} port {port} ({error.strerror}); "
                "choose another address, or port 0 for any free one"
            ) from error
        port = listener.getsockname()[1]
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        return cls(listener, f"http://{shown}:{port}", secrets.token_urlsafe(32))

    def close(self) -> None:
        self.listener.close()
