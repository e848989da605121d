"""The processes of the arena's chaos: a writer, a reader, a collector, each at the other end of a pipe.

Every answer is ``(tag, result, complaints)``. A complaint says which bytes were not what they must be. A process ends
when its pipe does, so none outlives the parent.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from specforge.contracts.codec import dumps, loads
from specforge.contracts.features import FeatureHandle
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import PutRequest
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.errors import FeatureNotFound, FeatureStoreFull
from specforge.testing.feature_store import make_ref

RUN = "chaos"
READY = -1
"""The tag of the first answer of every process."""
MAX_HELD = 6
"""Buffers that a reader keeps, at most."""
_ODD = 0x9E3779B97F4A7C1

Pair = tuple[str, int]
Answer = Callable[..., tuple[Any, list[str]]]


def pattern(sample_id: str, generation: int, num_bytes: int) -> dict[str, torch.Tensor]:
    """The tensors of a sample, from its name alone: int64 words, and up to 7 bytes more."""
    seed = zlib.crc32(f"{sample_id}/{generation}".encode())
    words = torch.arange(num_bytes // 8) * _ODD + seed
    return {"words": words, "rest": (torch.arange(num_bytes % 8) + seed).to(torch.uint8)}


def size_of(ref: SampleRef) -> int:
    """Bytes of the tensors of ``ref``; its ``num_bytes`` has the padding too."""
    return sum(spec.num_bytes for spec in ref.features)


def differs(ref: SampleRef, tensors: dict[str, torch.Tensor]) -> bool:
    expected = pattern(ref.sample_id, ref.generation, size_of(ref))
    return not all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def serve(pipe: Connection, answers: dict[str, Answer]) -> None:
    """Answer until the pipe ends."""
    torch.set_num_threads(1)
    try:
        pipe.send((READY, None, []))
        while True:
            tag, request, *arguments = pipe.recv()
            pipe.send((tag, *answers[request](*arguments)))
    except (EOFError, ConnectionError):
        return


def write(pipe: Connection, directory: Path, capacity_bytes: int) -> None:
    store = SharedMemoryFeatureStore.create(RUN, capacity_bytes, 2048, directory)
    space = store._writer.space

    def put(samples: Sequence[tuple[str, int, int]]) -> tuple[tuple[list[str] | None, int], list[str]]:
        """Refs as text, or ``None``: full; and how many buffers moved."""
        requests = [PutRequest(name, generation, pattern(name, generation, size)) for name, generation, size in samples]
        num_moves = space.num_moves
        try:
            stored = store.put(requests)
        except FeatureStoreFull:
            return (None, space.num_moves - num_moves), []
        texts = [dumps(make_ref(r.sample_id, r.generation, s)) for r, s in zip(requests, stored, strict=True)]
        return (texts, space.num_moves - num_moves), []

    def churn(names: Sequence[str], num_bytes: int) -> tuple[None, list[str]]:
        """Lives that nobody reads, to be killed in: each puts, and frees what the one before it put."""
        tensors = pattern("churn", 1, num_bytes)
        for name in names:
            try:
                store.put([PutRequest(name, generation, tensors) for generation in (1, 2)])
            except FeatureStoreFull:
                continue
            store.abort([(name, 1), (name, 2)])
        return None, []

    serve(
        pipe,
        {
            "put": put,
            "churn": churn,
            "abort": lambda pairs: (store.abort(pairs), []),
            "close": lambda: (store.close(), []),
            "leave": lambda: (store.leave(), []),
        },
    )


def read(pipe: Connection, directory: Path) -> None:
    store = SharedMemoryFeatureStore.attach(RUN, directory)
    held: deque[tuple[SampleRef, dict[str, torch.Tensor], FeatureHandle]] = deque()

    def release(num_kept: int) -> tuple[None, list[str]]:
        """What is released must be as it was when it was got."""
        complaints = []
        while len(held) > num_kept:
            ref, tensors, handle = held.popleft()
            if differs(ref, tensors):
                complaints.append(f"{ref.sample_id}/{ref.generation} changed while it was held, key {ref.key}")
            tensors.clear()
            store.release([handle])
        return None, complaints

    def get(texts: Sequence[str], num_kept: int) -> tuple[list[bool], list[str]]:
        """Which refs were found."""
        found, complaints = [], []
        for ref in [loads(SampleRef, text) for text in texts]:
            try:
                [(tensors, handle)] = store.get([ref])
            except FeatureNotFound:
                found.append(False)
                continue
            found.append(True)
            if differs(ref, tensors):
                complaints.append(f"{ref.sample_id}/{ref.generation} was got with other bytes, key {ref.key}")
            held.append((ref, tensors, handle))
            complaints += release(MAX_HELD)[1]
        return found, complaints + release(num_kept)[1]

    serve(pipe, {"get": get, "release": release, "abort": lambda pairs: (store.abort(pairs), [])})


def collect(pipe: Connection, directory: Path) -> None:
    """Collects when told to, and between two orders over and over, unless told to be still."""
    store = SharedMemoryFeatureStore.attach(RUN, directory)
    still = False
    try:
        pipe.send((READY, None, []))
        while True:
            while still or pipe.poll(0.002):
                tag, request = pipe.recv()
                still = request == "be still"
                pipe.send((tag, None, []))
            store.stored()
            store.gc()
    except (EOFError, ConnectionError):
        return


ROLES: dict[str, Callable[..., None]] = {"writer": write, "reader": read, "collector": collect}
