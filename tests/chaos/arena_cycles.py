"""Very many lives of samples through one arena that is three quarters full, and what they leave behind: nothing.

A writer process puts samples of mixed sizes, as long as at most 75 % of the arena are live; a reader process gets
them, compares every byte, holds a few, and aborts at random, but small samples that split the arena last: so it stays
full and fragmented, and room must be made by moving.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from specforge.contracts.features import FeatureHandle, FeatureSpec, aligned
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import PutRequest, StoredFeatures
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore
from specforge.errors import FeatureStoreFull
from specforge.testing.feature_store import make_ref

RUN = "cycles"
CAPACITY = 16 << 20
LARGEST = CAPACITY // 64
LIVE = CAPACITY * 3 // 4
"""Bytes that may be live: what the store promises room for."""
MAX_HELD = 15
BATCH = 16
SMALL = LARGEST // 16
SPLIT = LARGEST // 2
"""A small sample that lies across a multiple of this many bytes splits the arena."""
WARM_UP = 110_000
"""Cycles, or half of them where that is more, after which memory must not grow: by then the tombstones are complete."""
MAX_GROWTH_MB = 6.0
"""The dict of the tombstones is laid out anew at 100,000, 200,000 and 450,000 of them: 5 MB more at most, and no more
after that.
"""
DEADLINE_S = 60.0


def pattern() -> torch.Tensor:
    """The bytes that every sample is a piece of."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2 * LARGEST,), dtype=torch.uint8, generator=generator)


def piece(bytes_: torch.Tensor, index: int, num_bytes: int) -> torch.Tensor:
    start = index * 7919 % LARGEST
    return bytes_[start : start + num_bytes]


def sizes(seed: int) -> Iterator[int]:
    """Bytes, in turns from all orders of magnitude, from the small ones, and from the largest.

    The large ones come when the small ones have filled the arena and left small gaps all over it.
    """
    numbers = random.Random(seed)
    while True:
        for smallest, largest in ((1, LARGEST), (SMALL // 4, SMALL), (LARGEST // 2, LARGEST)):
            left = 2 * LIVE
            while left > 0:
                num_bytes = round(math.exp(numbers.uniform(math.log(smallest), math.log(largest))))
                left -= num_bytes
                yield num_bytes


def write(pipe: Connection, reader: Connection, directory: Path, num_cycles: int, seed: int) -> None:
    """Tells the parent how far it is 100 times, and at the end what it saw."""
    torch.set_num_threads(1)
    store = SharedMemoryFeatureStore.create(RUN, CAPACITY, directory=directory)
    assert store._writer is not None
    file, source, next_size = store._writer.arena.path, pattern(), sizes(seed)
    file_bytes = file.stat().st_size, file.stat().st_blocks
    num_put = live = refusals = fullest = 0
    size = next(next_size)
    while num_put < num_cycles:
        batch: list[tuple[int, int]] = []
        while len(batch) < BATCH and num_put + len(batch) < num_cycles and live + aligned(size) <= LIVE:
            batch.append((num_put + len(batch), size))
            live += aligned(size)
            size = next(next_size)
        while batch:
            try:
                stored = store.put([PutRequest(str(i), 1, {"x": piece(source, i, n)}) for i, n in batch])
            except FeatureStoreFull:
                refusals += 1
                live -= heard(reader)
                continue
            reader.send([(index, num_bytes, one.key) for (index, num_bytes), one in zip(batch, stored, strict=True)])
            break
        fullest = max(fullest, live)
        if num_put * 100 // num_cycles != (num_put + len(batch)) * 100 // num_cycles:
            pipe.send(num_put + len(batch))
        num_put += len(batch)
        while reader.poll() or (live + aligned(size) > LIVE):
            live -= heard(reader)
    reader.send(None)
    while live:
        live -= heard(reader)
    store.gc()
    health = store.health()
    pipe.send(
        {
            "refusals": refusals,
            "moves": store._writer.space.num_moves,
            "fullest_percent": round(100 * fullest / CAPACITY, 2),
            "live_bytes_at_end": health.live_bytes,
            "handles_at_end": health.num_handles,
            "file_changed": (file.stat().st_size, file.stat().st_blocks) != file_bytes,
        }
    )
    store.close()


def heard(reader: Connection) -> int:
    """Bytes that the reader has given up."""
    if not reader.poll(DEADLINE_S):
        raise TimeoutError(f"the reader gave nothing back for {DEADLINE_S} s")
    num_bytes: int = reader.recv()
    return num_bytes


def read(writer: Connection, directory: Path, seed: int) -> None:
    torch.set_num_threads(1)
    store, numbers, source = SharedMemoryFeatureStore.attach(RUN, directory), random.Random(seed), pattern()
    held: deque[tuple[SampleRef, FeatureHandle, bool]] = deque()
    # Samples that nobody holds: whatever they are, and those that split the arena.
    idle: tuple[list[SampleRef], list[SampleRef]] = ([], [])
    live = 0

    def give_up(num_held: int, limit: int) -> None:
        """Release all but the last ``num_held``, and abort until at most ``limit`` bytes are live."""
        nonlocal live
        released = [held.popleft() for _ in range(len(held) - num_held)]
        store.release([handle for _, handle, _ in released])
        for ref, _, splits in released:
            idle[splits].append(ref)
        victims = []
        while live > limit and any(idle):
            choice = idle[not idle[0] or (bool(idle[1]) and numbers.random() < 0.01)]
            victim = numbers.randrange(len(choice))
            choice[victim], choice[-1] = choice[-1], choice[victim]
            victims.append(choice.pop())
            live -= victims[-1].num_bytes
        store.abort([(ref.sample_id, ref.generation) for ref in victims])
        writer.send(sum(ref.num_bytes for ref in victims))

    while (batch := writer.recv()) is not None:
        for index, num_bytes, key in batch:
            spec = FeatureSpec("x", "uint8", (num_bytes,), 0)
            ref = make_ref(str(index), 1, StoredFeatures(store.name, key, aligned(num_bytes), (spec,)))
            live += ref.num_bytes
            if len(held) == MAX_HELD:
                give_up(numbers.randrange(MAX_HELD), LIVE)
            [(tensors, handle)] = store.get([ref])
            assert torch.equal(tensors["x"], piece(source, index, num_bytes)), f"sample {index} has other bytes"
            splits = num_bytes <= SMALL and tensors["x"].data_ptr() // SPLIT != (
                (tensors["x"].data_ptr() + ref.num_bytes) // SPLIT
            )
            held.append((ref, handle, splits))
        give_up(min(len(held), numbers.randrange(MAX_HELD)), LIVE - 4 * LARGEST)
    give_up(0, 0)
    store.close()


def memory_mb(pid: int) -> float:
    """Memory of a process that is its own, in MB (1e6 bytes): the pages of the arena are not."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024 / 1e6


def cycles(num_cycles: int, seed: int) -> dict[str, Any]:
    """The figures of so many lives. Raises ``AssertionError`` where one is not as it must be."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["specforge.data_plane.shared_memory", "specforge.testing.feature_store"])
    with tempfile.TemporaryDirectory(prefix="specforge-cycles-", dir=SHARED_MEMORY) as name:
        directory = Path(name)
        ours, told = context.Pipe()
        to_reader, to_writer = context.Pipe()
        writer = context.Process(target=write, args=(told, to_reader, directory, num_cycles, seed), daemon=True)
        reader = context.Process(target=read, args=(to_writer, directory, seed), daemon=True)
        children = {"writer": writer, "reader": reader}
        started = time.perf_counter()
        try:
            for child in children.values():
                child.start()
            for end in (told, to_reader, to_writer):
                end.close()
            report, growth = follow(
                ours, {role: child.pid or 0 for role, child in children.items()}, max(WARM_UP, num_cycles // 2)
            )
            seconds = time.perf_counter() - started
            for child in children.values():
                child.join(DEADLINE_S)
                assert child.exitcode == 0, f"a process ended with exit code {child.exitcode}"
        finally:
            for child in children.values():
                child.kill()
                child.join()
        left = [path.name for path in directory.iterdir()]
    report = {
        "cycles": num_cycles,
        "seed": seed,
        "seconds": round(seconds, 1),
        "cycles_per_s": round(num_cycles / seconds),
        **report,
        **growth,
    }
    wrong = {key: report[key] for key in ("refusals", "live_bytes_at_end", "handles_at_end", "file_changed")}
    assert not any(wrong.values()), f"these must be 0: {report}"
    assert not left, f"files stay behind: {left}"
    assert all(value < MAX_GROWTH_MB for value in growth.values()), f"memory grew: {report}"
    return report


def follow(pipe: Connection, pids: dict[str, int], warm_up: int) -> tuple[dict[str, Any], dict[str, float]]:
    """What the writer reports, and by how much each process has grown since it was warm, at most, in MB."""
    warm: dict[str, float] = {}
    growth: dict[str, float] = {}
    while True:
        assert pipe.poll(DEADLINE_S * 5), "the writer is stuck"
        message = pipe.recv()
        if isinstance(message, dict):
            return message, {key: round(value, 2) for key, value in growth.items()}
        if message < warm_up:
            continue
        for role, pid in pids.items():
            for key, value in ((f"{role}_rss_growth_mb", resident_mb(pid)), (f"{role}_own_growth_mb", memory_mb(pid))):
                growth[key] = max(growth.get(key, 0.0), value - warm.setdefault(key, value))
