"""What the stores of the data plane cost, beside a memcpy and a TCP socket of the same machine in the same run.

* put, get and the whole life (put, get, release, abort) of one sample of each size, with 1 and with 4 readers. The
  writer is this process, every reader a process of its own; the local store has one process, this one. "read" is a get
  and one copy of the bytes into a warm buffer: what a zero-copy get leaves to the reader. A get is timed in the reader:
  "first" after the reader has waited for the ref, when the caches have other things in them, "get" right after that,
  as the samples of a batch are got. A life is timed in the writer, with the two messages between writer and reader.
* memcpy: ``tensor.copy_`` of the same bytes into a warm buffer. tcp: ``sendall`` and ``recv_into`` on loopback between
  two processes, until the receiver has said that it has all.
* small samples: lives a second of 64 kB samples in batches of 32, writer process to reader process, sustained.
* Mooncake: our put and get beside the library's own ``batch_put_from`` and ``batch_get_into`` from the same registered
  buffer, over TCP to the process that owns the memory; and a sample of four tensors (4 kB, 64 kB, 1 MB) in one
  batched object beside one object a tensor in single calls.

Everything takes turns, so that a drift of the machine hits all of it; medians, after a warm-up that touched every page.
1 MB is 2**20 bytes here, GB/s are 1e9 bytes. A size whose arena does not fit into memory is left out, and said so.

    python benchmarks/data_plane.py [--json FILE] [--stores local,shared_memory,...] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import disaggregation
import torch
from rich.console import Console
from rich.table import Table

from specforge.contracts.codec import dumps, loads
from specforge.contracts.refs import SampleRef
from specforge.data_plane.arena import MAX_SAMPLE_FRACTION
from specforge.data_plane.base import FeatureStore, PutRequest
from specforge.data_plane.local import LocalFeatureStore
from specforge.data_plane.mooncake import MooncakeFeatureStore, MooncakeSettings
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.testing.feature_store import make_ref
from specforge.testing.mooncake import settings_of, temporary_service, why_not

KB, MB = 2**10, 2**20
SIZES = {"64kb": 64 * KB, "1mb": MB, "16mb": 16 * MB, "64mb": 64 * MB, "256mb": 256 * MB}
NUM_READERS = (1, 4)
WARM_UP = 3
SMALL_BATCH = 32
BATCHES_AHEAD = 8
TENSORS_A_SAMPLE = 4
TENSOR_SIZES = {"4kb": 4 * KB, "64kb": 64 * KB, "1mb": MB}

Times = dict[str, list[float]]
"""Seconds of every repetition, by what was measured."""


@dataclass(frozen=True)
class Recipe:
    """How another process opens a store."""

    kind: str
    run_id: str = ""
    directory: Path | None = None
    settings: MooncakeSettings | None = None

    def open(self) -> FeatureStore:
        if self.kind == "shared_memory":
            return SharedMemoryFeatureStore.attach(self.run_id)
        if self.kind == "mooncake":
            assert self.settings is not None
            return MooncakeFeatureStore(self.settings)
        assert self.kind == "shared_dir"
        assert self.directory is not None
        return SharedDirFeatureStore(self.directory, self.run_id)


# Stores. Each gives a store to put into, and the recipe of its readers (none: one process).


@contextlib.contextmanager
def open_local(_num_bytes: int) -> Iterator[tuple[FeatureStore, Recipe | None]]:
    yield LocalFeatureStore(), None


@contextlib.contextmanager
def open_shared_memory(num_bytes: int) -> Iterator[tuple[FeatureStore, Recipe | None]]:
    run_id = f"bench-{os.getpid()}-{num_bytes}"
    store = SharedMemoryFeatureStore.create(run_id, arena_bytes(num_bytes))
    try:
        yield store, Recipe("shared_memory", run_id)
    finally:
        store.close()


@contextlib.contextmanager
def open_shared_dir(_num_bytes: int) -> Iterator[tuple[FeatureStore, Recipe | None]]:
    with tempfile.TemporaryDirectory() as name:
        yield SharedDirFeatureStore(Path(name), "bench"), Recipe("shared_dir", "bench", Path(name))


@contextlib.contextmanager
def open_mooncake(num_bytes: int) -> Iterator[tuple[FeatureStore, Recipe | None]]:
    with temporary_service(max(256 * MB, 4 * num_bytes)) as service:
        settings = settings_of(service, f"bench-{os.getpid()}", buffer_bytes=max(16 * MB, 2 * num_bytes))
        store = MooncakeFeatureStore(settings)
        try:
            yield store, Recipe("mooncake", settings=settings)
        finally:
            store.close()


STORES: dict[str, Callable[[int], contextlib.AbstractContextManager[tuple[FeatureStore, Recipe | None]]]] = {
    "local": open_local,
    "shared_memory": open_shared_memory,
    "shared_dir": open_shared_dir,
    "mooncake": open_mooncake,
}


def arena_bytes(num_bytes: int) -> int:
    """An arena that takes samples of so many bytes."""
    return MAX_SAMPLE_FRACTION * max(num_bytes, MB)


def available_bytes() -> int:
    """Memory that may be taken without pushing out others."""
    [line] = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(line.split()[1]) * KB


def needed_bytes(name: str, num_bytes: int) -> int:
    """Memory that measuring ``name`` at this size takes: what it stores, and buffers of writer and readers."""
    return {"shared_memory": arena_bytes(num_bytes), "mooncake": 14 * num_bytes}.get(name, num_bytes) + 8 * num_bytes


def fits(names: Sequence[str], num_bytes: int) -> bool:
    """Whether 2 GB of memory are left when these are measured at once."""
    return sum(needed_bytes(name, num_bytes) for name in names) + 2 * 10**9 <= available_bytes()


def why_left_out(name: str, num_bytes: int) -> str | None:
    """Why ``name`` cannot be measured at this size here; ``None`` where it can."""
    if name == "mooncake" and (reason := why_not()):
        return reason
    return None if fits([name], num_bytes) else f"needs {needed_bytes(name, num_bytes) / 1e9:.1f} GB of memory"


# Sources and processes.


def tensor_of(num_bytes: int) -> torch.Tensor:
    """Hidden states of so many bytes, bf16; random, so that no page is shared or compressed."""
    return torch.randint(0, 2**15, (num_bytes // 2,), dtype=torch.int16).view(torch.bfloat16)


def context() -> Any:
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["torch", "specforge.data_plane.shared_memory"])
    return forkserver


@contextlib.contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A process at the other end of a pipe; it ends when the pipe does."""
    ours, theirs = multiprocessing.Pipe()
    process = context().Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(30)
        process.kill()
        process.join()


def until_the_end(serve: Callable[[Any], Any], pipe: Connection) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(serve(pipe.recv()))


def read_one_at_a_time(pipe: Connection, recipe: Recipe, num_bytes: int) -> None:
    """Answers (ref, how) with seconds: of a "life" of one get; of the "get" after it; of a get and a copy ("read")."""
    store, buffer = recipe.open(), tensor_of(num_bytes)

    def serve(message: tuple[str, str]) -> float:
        ref, how = loads(SampleRef, message[0]), message[1]
        if how == "get":
            store.release([store.get([ref])[0][1]])
        started = time.perf_counter()
        [(tensors, handle)] = store.get([ref])
        if how == "read":
            buffer.copy_(tensors["hidden"])
        ended = time.perf_counter()
        del tensors
        store.release([handle])
        return ended - started

    until_the_end(serve, pipe)
    store.close()


def swallow(pipe: Connection, num_bytes: int) -> None:
    """The receiving end of the raw socket: says the port, then a byte for every ``num_bytes``."""
    buffer = memoryview(bytearray(num_bytes))
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            while True:
                left = num_bytes
                while left:
                    count = connection.recv_into(buffer[num_bytes - left :], left)
                    if not count:
                        return
                    left -= count
                connection.sendall(b"!")


# One sample at a time.


class Rig:
    """A store at one size, with its readers."""

    def __init__(self, name: str, store: FeatureStore, pipes: Sequence[Connection], source: torch.Tensor) -> None:
        self.name, self.store, self.pipes, self.source = name, store, pipes, source
        self.times: Times = defaultdict(list)

    def run(self, index: int, num_readers: int, how: str) -> None:
        """One life, whose readers get as ``how`` says; what it took is kept unless it is a warm-up."""
        pair = f"{self.name}-{num_readers}-{index}-{how}", 1
        started = time.perf_counter()
        [stored] = self.store.put([PutRequest(*pair, {"hidden": self.source})])
        put = time.perf_counter()
        ref = make_ref(*pair, stored)
        gets = self.ask(dumps(ref), num_readers, how) if self.pipes else [self.get_here(ref)]
        self.store.abort([pair])
        ended = time.perf_counter()
        if index < WARM_UP:
            return
        kind = "first" if how == "life" and self.pipes else "get" if how == "life" else how
        self.times[f"{kind}_{num_readers}"].append(statistics.median(gets))
        self.times[f"put_{num_readers}"].append(put - started)
        if how == "life":
            self.times[f"life_{num_readers}"].append(ended - started)

    def ask(self, text: str, num_readers: int, how: str) -> list[float]:
        for pipe in self.pipes[:num_readers]:
            pipe.send((text, how))
        return [pipe.recv() for pipe in self.pipes[:num_readers]]

    def get_here(self, ref: SampleRef) -> float:
        started = time.perf_counter()
        [(_, handle)] = self.store.get([ref])
        got = time.perf_counter()
        self.store.release([handle])
        return got - started


@contextlib.contextmanager
def rigs(names: Sequence[str], num_bytes: int) -> Iterator[list[Rig]]:
    source = tensor_of(num_bytes)
    with contextlib.ExitStack() as stack:
        opened = []
        for name in names:
            store, recipe = stack.enter_context(STORES[name](num_bytes))
            readers = [child(read_one_at_a_time, recipe, num_bytes) for _ in range(max(NUM_READERS) if recipe else 0)]
            opened.append(Rig(name, store, [stack.enter_context(reader) for reader in readers], source))
        yield opened


def measure_size(names: Sequence[str], num_bytes: int, repeats: int) -> dict[str, Times]:
    """Seconds, by store; the baselines are the store ``""``."""
    source, buffer = tensor_of(num_bytes), tensor_of(num_bytes)
    payload = memoryview(source.view(torch.uint8).numpy())
    baseline: Times = defaultdict(list)
    with rigs(names, num_bytes) as opened, child(swallow, num_bytes) as pipe:
        with socket.create_connection(("127.0.0.1", pipe.recv())) as connection:
            for index in range(WARM_UP + repeats):
                for rig in opened:
                    for num_readers in NUM_READERS if rig.pipes else (1,):
                        for how in ("life", "get", "read") if rig.pipes else ("life",):
                            started = time.perf_counter()
                            buffer.copy_(source)
                            copied = time.perf_counter()
                            rig.run(index, num_readers, how)
                            if index >= WARM_UP:
                                baseline["memcpy"].append(copied - started)
                                rig.times[f"memcpy_{num_readers}"].append(copied - started)
                started = time.perf_counter()
                connection.sendall(payload)
                connection.recv(1)
                if index >= WARM_UP:
                    baseline["tcp"].append(time.perf_counter() - started)
        return {"": baseline} | {rig.name: rig.times for rig in opened}


def figures_of(label: str, num_bytes: int, times: dict[str, Times]) -> dict[str, float]:
    medians = {name: {what: statistics.median(s) for what, s in by.items()} for name, by in times.items()}
    base = medians.pop("")
    figures = {f"{what}_us_{label}": seconds * 1e6 for what, seconds in base.items()}
    figures |= {f"{what}_gb_per_s_{label}": num_bytes / seconds / 1e9 for what, seconds in base.items()}
    for name, of in medians.items():
        # Each put beside the memcpy right before it.
        pairs = zip(times[name]["memcpy_1"], times[name]["put_1"], strict=True)
        figures[f"{name}_put_over_memcpy_{label}"] = statistics.median(copied / put for copied, put in pairs)
        figures[f"{name}_put_over_tcp_{label}"] = base["tcp"] / of["put_1"]
        for what, seconds in of.items():
            if what.startswith("memcpy"):
                continue
            kind, _, num_readers = what.partition("_")
            end = f"{label}_4_readers" if num_readers == "4" else label
            if kind == "read":
                figures[f"{name}_read_over_memcpy_{end}"] = base["memcpy"] / seconds
            figures[f"{name}_{kind}_us_{end}"] = seconds * 1e6
    return figures


# Small samples, sustained.


def read_batches(pipe: Connection, recipe: Recipe) -> None:
    """Gets, releases and aborts whole batches; the store's answer to one is the number of its samples."""
    store = recipe.open()

    def serve(texts: list[str]) -> int:
        refs = [loads(SampleRef, text) for text in texts]
        lent = store.get(refs)
        store.release([handle for _, handle in lent])
        del lent
        store.abort([(ref.sample_id, ref.generation) for ref in refs])
        return len(refs)

    until_the_end(serve, pipe)
    store.close()


def measure_small(num_samples: int, rounds: int) -> dict[str, float]:
    """Lives a second: the median of the rounds, of which each has ``num_samples``."""
    source, rates = tensor_of(64 * KB), []
    with open_shared_memory(MB) as (store, recipe), child(read_batches, recipe) as pipe:
        for number in range(1 + rounds):
            started = time.perf_counter()
            put = finished = 0
            while finished < num_samples:
                while put < num_samples and put - finished < BATCHES_AHEAD * SMALL_BATCH:
                    names = [f"{number}-{put + index}" for index in range(SMALL_BATCH)]
                    stored = store.put([PutRequest(name, 1, {"hidden": source}) for name in names])
                    refs = [make_ref(name, 1, one) for name, one in zip(names, stored, strict=True)]
                    pipe.send([dumps(ref) for ref in refs])
                    put += len(refs)
                finished += pipe.recv()
            if number:
                rates.append(num_samples / (time.perf_counter() - started))
    return {"shared_memory_small_samples_per_s": statistics.median(rates), "small_samples_a_batch": SMALL_BATCH}


# Mooncake beside its own library.


def measure_mooncake(repeats: int) -> dict[str, float]:
    """Beside the library's calls, which neither copy the bytes into the registered buffer nor check what they read."""
    figures: dict[str, float] = {}
    with temporary_service(512 * MB) as service:
        store = MooncakeFeatureStore(settings_of(service, f"bench-{os.getpid()}", buffer_bytes=128 * MB))
        try:
            for label, num_bytes in SIZES.items():
                if num_bytes <= 16 * MB:
                    figures |= beside_library(store, label, num_bytes, repeats)
            for label, num_bytes in TENSOR_SIZES.items():
                figures |= beside_single_calls(store, label, num_bytes, repeats)
        finally:
            store.close()
    figures["mooncake_over_library"] = figures["mooncake_over_library_16mb"]
    figures["mooncake_per_tensor_over_ours_us"] = figures["mooncake_per_tensor_over_ours_us_4x4kb"]
    return figures


def beside_library(store: MooncakeFeatureStore, label: str, num_bytes: int, repeats: int) -> dict[str, float]:
    """Batches of four samples: the library's seconds over ours, of a put and a get together."""
    source, batch = tensor_of(num_bytes), 4
    client, pool, replication = store._connection._client, store._pool, store._connection._replication
    times: Times = defaultdict(list)
    for index in range(WARM_UP + repeats):
        pairs = [(f"ours-{label}-{index}-{at}", 1) for at in range(batch)]
        started = time.perf_counter()
        stored = store.put([PutRequest(*pair, {"hidden": source}) for pair in pairs])
        put = time.perf_counter()
        refs = [make_ref(*pair, one) for pair, one in zip(pairs, stored, strict=True)]
        store.release([handle for _, handle in store.get(refs)])
        ended = time.perf_counter()
        store.abort(pairs)
        ours = put - started, ended - put
        slots = pool.take([num_bytes] * batch)
        keys, addresses = [f"{key}-raw" for key, _ in pairs], [pool.address + slot.offset for slot in slots]
        started = time.perf_counter()
        codes = client.batch_put_from(keys, addresses, [num_bytes] * batch, replication)
        put = time.perf_counter()
        counts = client.batch_get_into(keys, addresses, [num_bytes] * batch)
        ended = time.perf_counter()
        assert codes == [0] * batch, codes
        assert counts == [num_bytes] * batch, counts
        client.batch_remove(keys, True)
        pool.give_back(slots)
        if index >= WARM_UP:
            for what, seconds in zip(("put", "get"), ours, strict=True):
                times[f"our_{what}"].append(seconds)
            times["library_put"].append(put - started)
            times["library_get"].append(ended - put)
    of = {what: statistics.median(seconds) for what, seconds in times.items()}
    whole = (of["library_put"] + of["library_get"]) / (of["our_put"] + of["our_get"])
    return {
        f"mooncake_over_library_{label}": whole,
        f"mooncake_put_over_library_{label}": of["library_put"] / of["our_put"],
        f"mooncake_get_over_library_{label}": of["library_get"] / of["our_get"],
        f"mooncake_put_gb_per_s_{label}": batch * num_bytes / of["our_put"] / 1e9,
        f"mooncake_get_gb_per_s_{label}": batch * num_bytes / of["our_get"] / 1e9,
    }


def beside_single_calls(store: MooncakeFeatureStore, label: str, num_bytes: int, repeats: int) -> dict[str, float]:
    """Microseconds a sample of four tensors of ``num_bytes``: ours in batches; one object a tensor in single calls."""
    tensors = {f"t{number}": tensor_of(num_bytes) for number in range(TENSORS_A_SAMPLE)}
    batch = min(SMALL_BATCH, 32 * MB // (TENSORS_A_SAMPLE * num_bytes))
    client, pool, replication = store._connection._client, store._pool, store._connection._replication
    ours, single = [], []
    for index in range(WARM_UP + repeats):
        pairs = [(f"four-{label}-{index}-{at}", 1) for at in range(batch)]
        started = time.perf_counter()
        stored = store.put([PutRequest(*pair, tensors) for pair in pairs])
        refs = [make_ref(*pair, one) for pair, one in zip(pairs, stored, strict=True)]
        store.release([handle for _, handle in store.get(refs)])
        ours.append((time.perf_counter() - started) / batch)
        store.abort(pairs)
        [slot] = pool.take([num_bytes])
        keys, address = [f"four-{label}-{index}-{name}" for name in tensors], pool.address + slot.offset
        started = time.perf_counter()
        for key in keys:
            assert client.put_from(key, address, num_bytes, replication) == 0
        for key in keys:
            assert client.get_into(key, address, num_bytes) == num_bytes
        single.append(time.perf_counter() - started)
        client.batch_remove(keys, True)
        pool.give_back([slot])
    our_s, single_s = statistics.median(ours[WARM_UP:]), statistics.median(single[WARM_UP:])
    return {
        f"mooncake_our_sample_us_4x{label}": our_s * 1e6,
        f"mooncake_per_tensor_sample_us_4x{label}": single_s * 1e6,
        f"mooncake_per_tensor_over_ours_us_4x{label}": single_s / our_s,
    }


# Output.


def show(console: Console, label: str, figures: dict[str, float], names: Sequence[str]) -> None:
    memcpy, tcp = figures[f"memcpy_gb_per_s_{label}"], figures[f"tcp_gb_per_s_{label}"]
    table = Table(title=f"{label}: memcpy {memcpy:.1f} GB/s, tcp {tcp:.1f} GB/s", title_justify="left")
    for column in (
        "store",
        "readers",
        "put us",
        "GB/s",
        "/memcpy",
        "/tcp",
        "first us",
        "get us",
        "read us",
        "GB/s",
        "life us",
    ):
        table.add_column(column, justify="left" if column == "store" else "right")
    for name in names:
        for num_readers, end in ((1, label), (4, f"{label}_4_readers")):
            if f"{name}_put_us_{end}" not in figures:
                continue
            put, get, life = (figures[f"{name}_{what}_us_{end}"] for what in ("put", "get", "life"))
            first, read = (figures.get(f"{name}_{what}_us_{end}") for what in ("first", "read"))
            speed = memcpy * figures[f"memcpy_us_{label}"] / put
            table.add_row(
                name,
                str(num_readers),
                f"{put:,.0f}",
                f"{speed:.1f}",
                f"{figures[f'memcpy_us_{label}'] / put:.2f}",
                f"{speed / tcp:.1f}",
                f"{first:,.0f}" if first else "",
                f"{get:,.0f}",
                f"{read:,.0f}" if read else "",
                f"{memcpy * figures[f'memcpy_us_{label}'] / read:.1f}" if read else "",
                f"{life:,.0f}",
            )
    console.print(table)


def repeats_of(num_bytes: int, quick: bool) -> int:
    """20 and more, but 8 of the largest size; a tenth of that where there is little time."""
    repeats = 8 if num_bytes > 64 * MB else 24 if num_bytes > MB else 100
    return max(3, repeats // 10) if quick else repeats


def measure_stores(console: Console, label: str, names: Sequence[str], quick: bool) -> dict[str, float]:
    """One size; the stores together where they fit into memory, else each with baselines of its own."""
    num_bytes, figures = SIZES[label], dict[str, float]()
    reasons = {name: why_left_out(name, num_bytes) for name in names}
    for name, reason in reasons.items():
        if reason:
            console.print(f"{name} at {label} is left out: {reason}")
    there = [name for name in names if not reasons[name]]
    for group in [there] if fits(there, num_bytes) else [[name] for name in there]:
        measured = measure_size(group, num_bytes, repeats_of(num_bytes, quick))
        figures |= figures_of(label, num_bytes, measured)
        show(console, label, figures, group)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--stores", default=",".join(STORES), help="which stores, separated by commas")
    parser.add_argument("--sizes", default=",".join(SIZES), help="which sizes, separated by commas")
    parser.add_argument("--quick", action="store_true", help="few repetitions, nothing above 16 MB")
    parser.add_argument("--no-runs", action="store_true", help="leave out the training runs of disaggregation.py")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    names, console = arguments.stores.split(","), Console(width=120)
    figures: dict[str, float] = {}
    for label in arguments.sizes.split(","):
        if not arguments.quick or SIZES[label] <= 16 * MB:
            figures |= measure_stores(console, label, names, arguments.quick)
    if "shared_memory" in names:
        figures |= measure_small(2_048 if arguments.quick else 20_480, 1 if arguments.quick else 5)
    if "mooncake" in names and why_not() is None:
        figures |= measure_mooncake(repeats_of(16 * MB, arguments.quick))
    if not arguments.quick and not arguments.no_runs:
        # Whole training runs, against their own halves.
        figures |= disaggregation.measure()
    for key, value in figures.items():
        if "_over_" in key or "per_s" in key or "_sample" in key:
            console.print(f"{key:50} {value:14,.2f}")
    if arguments.json:
        where = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        rounded = {key: round(value, 4) for key, value in figures.items()}
        arguments.json.write_text(json.dumps(where | rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
