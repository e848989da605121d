"""What an object of Mooncake is called and what is in it: 64 bytes of header, then the sample's buffer.

An object is named after its (sample_id, generation), so that any process can free it and list it. A put of a name that
exists is silently ignored by Mooncake; the nonce in header and ref tells such a reader that the bytes are not its own.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote

from specforge.contracts.refs import SampleRef
from specforge.errors import CorruptFeature, FeatureNotFound

_FORMAT = struct.Struct("<8sQQ16s24x")
_MAGIC = b"SFMCOBJ1"
HEADER_BYTES = _FORMAT.size
"""64: what follows is as aligned as the object is."""


@dataclass(frozen=True, slots=True)
class Place:
    """The key of a ref, ``<object>#<nonce>``. ``nonce``: 64 random bits of the put."""

    object_key: str
    nonce: int

    @classmethod
    def parse(cls, key: str) -> Self | None:
        object_key, _, nonce = key.rpartition("#")
        try:
            return cls(object_key, int(nonce, 16))
        except ValueError:
            return None

    def __str__(self) -> str:
        return f"{self.object_key}#{self.nonce:016x}"


class Names:
    """The objects of one run."""

    def __init__(self, run_id: str) -> None:
        self.prefix = f"sf/{quote(run_id, safe='')}/"

    def key(self, sample_id: str, generation: int) -> str:
        return f"{self.prefix}{generation}/{quote(sample_id, safe='')}"

    def pair(self, key: str) -> tuple[str, int] | None:
        """The inverse of ``key``; ``None`` for anything that is not of this run."""
        generation, slash, name = key.removeprefix(self.prefix).partition("/")
        if not key.startswith(self.prefix) or not slash or not generation.isdecimal():
            return None
        return unquote(name), int(generation)

    @property
    def pattern(self) -> str:
        """A regular expression for all of them. The dot is the only special character that quoting leaves."""
        return f"^{self.prefix.replace('.', '[.]')}.*"


def write_header(buffer: memoryview, offset: int, nonce: int, request: tuple[str, int, int]) -> None:
    """``request``: sample_id, generation, bytes of the sample's buffer."""
    sample_id, generation, num_bytes = request
    _FORMAT.pack_into(buffer, offset, _MAGIC, nonce, num_bytes, _digest(sample_id, generation))


def check_object(ref: SampleRef, nonce: int, buffer: memoryview, num_read: int) -> None:
    """Whether the ``num_read`` bytes at the start of ``buffer`` are all of what ``ref`` names.

    Raises ``FeatureNotFound`` for the bytes of another put, ``CorruptFeature`` for too few or too many.
    """
    if num_read < HEADER_BYTES:
        raise CorruptFeature(f"sample {ref.sample_id!r}: an object of {num_read} bytes, shorter than its header")
    magic, stored_nonce, num_bytes, digest = _FORMAT.unpack_from(buffer)
    if magic != _MAGIC:
        raise CorruptFeature(f"sample {ref.sample_id!r}: the object at {ref.key} has no header of a feature object")
    if (stored_nonce, digest) != (nonce, _digest(ref.sample_id, ref.generation)):
        raise FeatureNotFound(
            f"sample {ref.sample_id!r}, generation {ref.generation}: the object at {ref.key} is of another put"
        )
    if num_bytes != ref.num_bytes or num_read != HEADER_BYTES + num_bytes:
        raise CorruptFeature(
            f"sample {ref.sample_id!r}: stored with {num_bytes} bytes, {num_read - HEADER_BYTES} bytes are there, the "
            f"reference says {ref.num_bytes}"
        )


def _digest(sample_id: str, generation: int) -> bytes:
    return hashlib.blake2b(f"{generation}/{sample_id}".encode(), digest_size=16).digest()
