"""Features inside an HTTP answer: a head of JSON, then the buffers of the samples, each as a store would have it.

    bytes 0..8     length of the JSON, little-endian
    bytes 8..      the JSON, padded to a multiple of 64 bytes from the start of the body
    then           the buffers, each padded to a multiple of 64 bytes; an item's ``key`` is its offset from the first

Nothing is compressed, nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from specforge.contracts.capture_server import CapturedItem, CaptureReply
from specforge.contracts.capture_wire import CAPTURE
from specforge.contracts.features import aligned, layout
from specforge.data_plane.tensors import DTYPES, Source, fill, specs_of, views
from specforge.errors import ContractError, CorruptFeature

INLINE = "inline"
MEDIA_TYPE = "application/vnd.specforge.features"
_LENGTH_BYTES = 8


def write_inline(reply: CaptureReply, tensors: Sequence[Mapping[str, Source] | None]) -> bytearray:
    """The body that answers with ``reply``; ``tensors`` of each item, ``None`` where it failed."""
    items: list[CapturedItem] = []
    offset = 0
    for item, sources in zip(reply.items, tensors, strict=True):
        if sources is None:
            items.append(item)
            continue
        specs, num_bytes = specs_of(sources)
        items.append(replace(item, store=INLINE, key=str(offset), num_bytes=num_bytes, features=specs))
        offset += aligned(num_bytes)
    head = CAPTURE[1].write(replace(reply, items=tuple(items)))
    start = aligned(_LENGTH_BYTES + len(head))
    body = bytearray(start + offset)
    body[:_LENGTH_BYTES] = len(head).to_bytes(_LENGTH_BYTES, "little")
    body[_LENGTH_BYTES : _LENGTH_BYTES + len(head)] = head
    whole = torch.frombuffer(body, dtype=torch.uint8) if offset else torch.empty(0, dtype=torch.uint8)
    for item, sources in zip(items, tensors, strict=True):
        if sources is not None:
            begin = start + int(item.key)
            # written through a buffer of its own: a bytearray need not be aligned as typed tensors want it
            own = torch.zeros(item.num_bytes, dtype=torch.uint8)
            fill(own, item.features, sources)
            whole[begin : begin + item.num_bytes] = own
    return body


def read_inline(body: bytes | bytearray) -> tuple[CaptureReply, list[dict[str, torch.Tensor] | None]]:
    """The reply in ``body`` and the tensors of its items, ``None`` of those that failed.

    Raises ``CorruptFeature`` for a body that is cut or does not hold what its head says, ``ContractError`` for another
    head.
    """
    num_head_bytes = int.from_bytes(body[:_LENGTH_BYTES], "little")
    if len(body) < _LENGTH_BYTES or _LENGTH_BYTES + num_head_bytes > len(body):
        raise CorruptFeature(f"an answer with features ends in its head, after {len(body):,} bytes")
    reply = CAPTURE[1].read(bytes(body[_LENGTH_BYTES : _LENGTH_BYTES + num_head_bytes]))
    start = aligned(_LENGTH_BYTES + num_head_bytes)
    whole = memoryview(body)
    found: list[dict[str, torch.Tensor] | None] = []
    for item in reply.items:
        if item.failure is not None:
            found.append(None)
            continue
        _check_layout(item)
        begin = start + int(item.key)
        data = whole[begin : begin + item.num_bytes]
        if len(data) != item.num_bytes:
            raise CorruptFeature(
                f"sample {item.sample_id!r}: the answer has {len(data):,} of {item.num_bytes:,} bytes of its features"
            )
        own = torch.empty(item.num_bytes, dtype=torch.uint8)
        own.numpy().data[:] = data
        found.append(views(own, item.features))
    return reply, found


def _check_layout(item: CapturedItem) -> None:
    if item.store != INLINE or not item.key.isdecimal():
        raise ContractError(
            f"sample {item.sample_id!r}: asked for inline features, the answer says {item.store!r}, {item.key!r:.40}"
        )
    unknown = [spec.dtype for spec in item.features if spec.dtype not in DTYPES or min(spec.shape, default=0) < 0]
    expected = None if unknown else layout((spec.name, spec.dtype, spec.shape) for spec in item.features)
    if expected != (item.features, item.num_bytes):
        raise CorruptFeature(f"sample {item.sample_id!r}: its features are laid out in another way than all others")
