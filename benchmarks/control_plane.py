"""What one sample costs the control plane: its full life, in batches of 64, on SQLite with synchronous=FULL.

A life is lease, commit (with dispatch), poll, ack (with release), and a checkpoint every 16 batches. Three
measurements, each in processes of its own:

* in process: lives a second through the controller, at 10,000 and at 1,000,000 samples in the ledger. The two ledgers
  take turns, batch of batches by batch of batches, so that a drift of the machine hits both; the big one has been
  half used by then. Its whole second half runs to the end, and the resident memory of that process is looked at.
* through the server: a server process, and a client process with two capture workers and a trainer in threads.
* a waiting client: CPU time while its lease calls have nothing to give.

    python benchmarks/control_plane.py [--samples N] [--tokens N] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import multiprocessing
import os
import platform
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from specforge.contracts.features import layout
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.base import CaptureControl, TrainControl
from specforge.control_plane.channel.base import RefReader
from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.channel.network import NetworkRefReader, RefStream
from specforge.control_plane.client import ControlPlaneClient
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.control_plane.prompts import RecordedTasks, SampleOrder
from specforge.control_plane.server import ControlPlaneServer
from specforge.errors import ControlPlaneError
from specforge.testing.features import NamedFeatures

BATCH = 64
WINDOW = 8 * BATCH
BATCHES_A_CHECKPOINT = 16
SMALL_LEDGER = 10_000
HIDDEN = 4096
REGISTERED_AT_ONCE = 5_000
WAITING_S = 10.0


class Control(CaptureControl, TrainControl, Protocol):
    """Both sides of a controller."""


@dataclass
class Life:
    """Drives samples through their lives, one batch a call. ``seconds`` has the duration of every batch."""

    control: Control
    reader: RefReader
    step: int
    seconds: list[float]

    def run_batch(self) -> int:
        """How many samples lived; 0 at the end of the run."""
        started = time.perf_counter()
        leases = self.control.lease("w0", BATCH, 0.0).leases
        if leases:
            assert all(self.control.commit([make_ref(lease.task, lease.generation) for lease in leases]).accepted)
        refs = self.reader.poll(BATCH, 0.0)
        if refs:
            self.step += 1
            self.reader.mark_consumed(len(refs))
            self.control.ack([ref.slot for ref in refs], self.step)
            if self.step % BATCHES_A_CHECKPOINT == 0:
                self.control.checkpointed(self.step)
            self.seconds.append((time.perf_counter() - started) / len(refs))
        return len(refs)


def make_task(index: int, num_tokens: int) -> PromptTask:
    first = index * 7919
    tokens = tuple((first + 31 * position) % 151_936 for position in range(num_tokens))
    return PromptTask(f"sample-{index:08d}", index, tokens, ((num_tokens // 2, num_tokens),))


def make_ref(task: PromptTask, generation: int) -> SampleRef:
    """As a rollout worker of an EAGLE-3 run on an 8B target commits it."""
    num_tokens = task.num_tokens
    features, num_bytes = layout(
        [
            ("input_ids", "int32", (num_tokens,)),
            ("aux", "bfloat16", (num_tokens, 3 * HIDDEN)),
            ("last", "bfloat16", (num_tokens, HIDDEN)),
        ]
    )
    return SampleRef(
        sample_id=task.sample_id,
        generation=generation,
        num_tokens=num_tokens,
        loss_spans=task.loss_spans,
        store="shared_memory",
        key=f"sf-0123456789ab-4026531836-12345-678901:{task.index % 500}:{task.index}",
        num_bytes=num_bytes,
        features=features,
        target_revision="0" * 64,
        capture_fingerprint="0123456789abcdef",
        worker_id="capture-0.1",
    )


def register(store: SqlMetadataStore, num_samples: int, num_tokens: int) -> None:
    for start in range(0, num_samples, REGISTERED_AT_ONCE):
        store.register([make_task(i, num_tokens) for i in range(start, min(start + REGISTERED_AT_ONCE, num_samples))])


def make_controller(store: SqlMetadataStore, writer: Any, *, epochs: int = 1) -> DataFlowController:
    settings = ControllerSettings(window_slots=WINDOW, step_slots=BATCH, max_resident_bytes=2**40)
    order = SampleOrder(store.num_tasks(), epochs, seed=0)
    return DataFlowController(store, order, RecordedTasks(store), writer, settings, NamedFeatures())


def open_life(path: Path, num_samples: int, num_tokens: int, epochs: int = 1) -> Life:
    store = SqlMetadataStore(path)
    register(store, num_samples, num_tokens)
    writer, reader = memory_channel()
    return Life(make_controller(store, writer, epochs=epochs), reader, 0, [])


def resident_mb() -> float:
    """Resident memory of this process, in MB (1e6 bytes)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_in_process(directory: Path, num_samples: int, num_tokens: int) -> dict[str, float]:
    """Lives a second, and what the size of the ledger does to them."""
    big = open_life(directory / "big.sqlite", num_samples, num_tokens)
    peak_mb = resident_mb()
    for _ in range(num_samples // (2 * BATCH)):
        big.run_batch()
        peak_mb = max(peak_mb, resident_mb())
    big.seconds.clear()
    # As many passes over the small ledger as it takes: what is compared is a life in a ledger of that size.
    small = open_life(directory / "small.sqlite", min(SMALL_LEDGER, num_samples), num_tokens, epochs=64)
    in_turn = 10
    while sum(big.run_batch() for _ in range(in_turn)):
        peak_mb = max(peak_mb, resident_mb())
        if len(small.seconds) < 2_000:
            for _ in range(in_turn):
                small.run_batch()
    pairs = min(len(big.seconds), len(small.seconds))
    return {
        "in_process_samples_per_s": 1 / statistics.fmean(big.seconds),
        "cost_ratio_1e6_over_1e4": statistics.fmean(big.seconds[:pairs]) / statistics.fmean(small.seconds[:pairs]),
        "controller_rss_mb": peak_mb,
    }


@contextlib.contextmanager
def served(directory: Path, num_samples: int, num_tokens: int) -> Iterator[tuple[int, str, str]]:
    """A server in a process of its own: (pid, url, token)."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(directory / "served.sqlite", num_samples, num_tokens, theirs)
    )
    process.start()
    try:
        url, token = ours.recv()
        assert process.pid is not None
        yield process.pid, url, token
    finally:
        ours.send("stop")
        process.join()


def _serve(path: Path, num_samples: int, num_tokens: int, pipe: Any) -> None:
    store = SqlMetadataStore(path)
    register(store, num_samples, num_tokens)
    stream = RefStream(("trainer",))
    token = secrets.token_urlsafe(32)
    server = ControlPlaneServer(make_controller(store, stream), token, stream=stream)
    server.start()
    pipe.send((server.url, token))
    pipe.recv()
    server.stop()


def measure_server(directory: Path, num_samples: int, num_tokens: int) -> dict[str, float]:
    """Lives a second over HTTP, with two capture workers and a trainer in this process; and what waiting costs."""
    with served(directory, num_samples, num_tokens) as (pid, url, token):
        client = ControlPlaneClient(url, token)
        workers = [threading.Thread(target=capture_all, args=(client, f"w{n}"), daemon=True) for n in range(2)]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        trained = train_half(client, NetworkRefReader(client, "trainer"), num_samples)
        rate = trained / (time.perf_counter() - started)
        # Nobody trains any longer: once the window is full, every lease call waits.
        while client.summary()["num_resident"] < WINDOW:
            time.sleep(0.1)
        before = (cpu_s(os.getpid()), cpu_s(pid))
        time.sleep(WAITING_S)
        spent = (cpu_s(os.getpid()) - before[0], cpu_s(pid) - before[1])
        client.close()
    return {
        "server_samples_per_s": rate,
        "waiting_client_core_fraction": spent[0] / WAITING_S / len(workers),
        "waiting_server_core_fraction": spent[1] / WAITING_S,
    }


def capture_all(client: ControlPlaneClient, worker_id: str) -> None:
    """A capture worker that needs no time to capture. It ends with the client."""
    with contextlib.suppress(ControlPlaneError):
        while not (reply := client.lease(worker_id, BATCH, 60.0)).finished:
            client.commit([make_ref(lease.task, lease.generation) for lease in reply.leases])


def train_half(client: ControlPlaneClient, reader: RefReader, num_samples: int) -> int:
    """A trainer that needs no time to train; how many samples it has had when it stops, half-way."""
    trained = step = 0
    while trained < num_samples // 2:
        refs = reader.poll(BATCH)
        step += 1
        reader.mark_consumed(len(refs))
        client.ack([ref.slot for ref in refs], step)
        if step % BATCHES_A_CHECKPOINT == 0:
            client.checkpointed(step)
        trained += len(refs)
    return trained


def cpu_s(pid: int) -> float:
    """User and system seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_own_process(measure: Any, *arguments: Any) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result: dict[str, float] = pool.apply(measure, arguments)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples in the big ledger")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        figures = in_own_process(measure_in_process, Path(name), arguments.samples, arguments.tokens)
    with tempfile.TemporaryDirectory() as name:
        figures |= measure_server(Path(name), min(100_000, arguments.samples), arguments.tokens)
    figures |= {"num_samples": arguments.samples, "num_tokens": arguments.tokens}
    for key, value in figures.items():
        print(f"{key:32} {value:12,.3f}")
    if arguments.json:
        where = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        arguments.json.write_text(json.dumps(where | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
