"""The endpoint of a run's control plane. The supervisor holds it, so that it outlives the process that serves it."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from typing import Self

from specforge.control_plane.http_server import listen, url_of


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
        listener = listen(host, port)
        return cls(listener, url_of(listener), secrets.token_urlsafe(32))

    def close(self) -> None:
        self.listener.close()
