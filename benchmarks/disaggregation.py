"""What taking capture and training apart costs: W3 against its own two halves, and against W2.

All three train the same draft for the demo's target on the same texts, one compute thread a process:

* uncoupled: a process that captures into a store which discards, and at the same time one that trains from features
  in its own memory. Neither waits for the other; the slower of the two rates is the most that W3 could reach.
* W3: ``specforge train`` with topology=disaggregated over shared memory: supervisor, capture and train processes.
* W2: ``specforge train`` in one process.

The three take turns, ``--rounds`` times; each is looked at for ``--seconds`` once it runs steadily. Features are not
kept for later epochs, so that capture never stops.

    python benchmarks/disaggregation.py [--rounds N] [--seconds S]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from specforge.config.load import load_run_config
from specforge.config.run import RunConfig
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.data_plane.base import PutRequest
from specforge.data_plane.loader import FeatureDataLoader
from specforge.data_plane.local import LocalFeatureStore
from specforge.data_plane.prefetch import PrefetchIterator
from specforge.demo.corpus import standard_library_modules
from specforge.launch.engines import make_engine
from specforge.launch.inputs import RunInputs, read_run_inputs
from specforge.launch.learner import make_checkpointer, make_trainable, make_trainer
from specforge.launch.runtime import Follower
from specforge.launch.train_side import loader_settings
from specforge.monitor.jsonl import read_scalars
from specforge.training.checkpoint import TrainPosition
from specforge.training.trainer import Surroundings

TARGET = Path(__file__).parent.parent / "src" / "specforge" / "demo" / "target_model"
NUM_SAMPLES, MAX_LENGTH, BATCH = 512, 256, 8
NUM_PRELOADED = 128
STEADY_STEPS = 6
DEADLINE_S = 300.0


def write_run(directory: Path, topology: str) -> Path:
    """A run that lasts longer than anybody looks at it."""
    directory.mkdir(parents=True)
    data = directory / "texts.jsonl"
    texts = (module.text for module in standard_library_modules())
    pieces = (text[start : start + 8 * MAX_LENGTH] for text in texts for start in range(0, len(text), 8 * MAX_LENGTH))
    lines = [json.dumps({"text": piece}) for piece in pieces if len(piece) == 8 * MAX_LENGTH]
    data.write_text("\n".join(lines[:NUM_SAMPLES]) + "\n")
    config = {
        "run_dir": str(directory / "run"),
        "topology": topology,
        "target": {"path": str(TARGET), "dtype": "float32", "device": "cpu"},
        "data": {"path": str(data), "max_length": MAX_LENGTH},
        "algorithm": {"name": "eagle3"},
        "training": {
            "num_epochs": 200,
            "global_batch_size": BATCH,
            "micro_batch_tokens": 1024,
            "checkpoint_every": 25,
            "device": "cpu",
        },
        "data_plane": {"retain_bytes": 0},
    }
    path = directory / "run.yaml"
    path.write_text(json.dumps(config))
    return path


class Discard:
    """The store of a capture half that nobody reads: what is put is laid out and copied, as an arena does, and lost."""

    def __init__(self) -> None:
        self._store = LocalFeatureStore()

    def put(self, requests: Sequence[PutRequest]) -> None:
        self._store.put(requests)
        self._store.abort([(request.sample_id, request.generation) for request in requests])


def capture_half(run_yaml: Path, count: Any, stop: Any) -> None:
    """Capture over and over, counting samples."""
    config, inputs = _inputs(run_yaml)
    engine, store = make_engine(config, inputs.target), Discard()
    for number, task in enumerate(itertools.cycle(inputs.tasks)):
        if stop.is_set():
            return
        for sample in engine.capture([task], inputs.spec):
            store.put([PutRequest(sample.sample_id, number, sample.tensors)])
        count.value += 1


class Preloaded:
    """A source of slots whose features are in ``store`` already, epoch after epoch."""

    def __init__(self, refs: Sequence[SampleRef], num_samples: int) -> None:
        self._refs, self._num_samples = refs, num_samples
        self._next = 0

    def get(self, max_slots: int) -> list[SlotRef]:
        numbers = range(self._next, self._next + max_slots)
        self._next += max_slots
        return [SlotRef(Slot(*divmod(n, self._num_samples)), self._refs[n % len(self._refs)]) for n in numbers]


class Steps(Follower):
    """Nobody keeps a ledger or a log; ``heard`` is called with the number of each step."""

    def __init__(self, heard: Callable[[int], None]) -> None:
        self._heard = heard

    def on_step(self, step: int, _scalars: dict[str, float]) -> None:
        self._heard(step)


def train_half(run_yaml: Path, count: Any, stop: Any) -> None:
    """Train from features in memory, counting samples."""
    config, inputs = _inputs(run_yaml)
    store = LocalFeatureStore()
    refs = list(preload(inputs, config, store))

    def heard(step: int) -> None:
        count.value = step * BATCH
        if stop.is_set():
            trainer.request_stop()

    around = Surroundings(make_checkpointer(config), Follower(), Steps(heard))
    trainer = make_trainer(inputs, make_trainable(inputs), around)
    loader = FeatureDataLoader(
        Preloaded(refs, inputs.plan.num_samples), store, loader_settings(inputs, TrainPosition())
    )
    with PrefetchIterator(loader, config.data_plane.prefetch_steps) as batches:
        trainer.fit(batches)


def preload(inputs: RunInputs, config: RunConfig, store: LocalFeatureStore) -> Iterator[SampleRef]:
    engine = make_engine(config, inputs.target)
    tasks = {task.sample_id: task for task in inputs.tasks[:NUM_PRELOADED]}
    for sample in engine.capture(list(tasks.values()), inputs.spec):
        [stored] = store.put([PutRequest(sample.sample_id, 1, sample.tensors)])
        task = tasks[sample.sample_id]
        yield SampleRef(
            sample_id=sample.sample_id,
            generation=1,
            num_tokens=task.num_tokens,
            loss_spans=task.loss_spans,
            store=stored.store,
            key=stored.key,
            num_bytes=stored.num_bytes,
            features=stored.features,
            target_revision=inputs.target.revision,
            capture_fingerprint=inputs.spec.fingerprint,
            worker_id="preloaded",
        )


def _inputs(run_yaml: Path) -> tuple[RunConfig, RunInputs]:
    config = load_run_config(run_yaml, [])
    torch.set_num_threads(config.training.threads)
    return config, read_run_inputs(config)


def uncoupled(directory: Path, seconds: float) -> dict[str, float]:
    """Samples a second of each half while the other one runs."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    counts = {name: context.Value("q", 0) for name in ("capture", "train")}
    halves = {"capture": capture_half, "train": train_half}
    processes = [
        context.Process(target=halves[name], args=(write_run(directory / name, "colocated"), counts[name], stop))
        for name in halves
    ]
    for process in processes:
        process.start()
    try:
        _wait(lambda: all(count.value >= STEADY_STEPS * BATCH for count in counts.values()), "both halves run")
        rates = {name: _Rate(count) for name, count in counts.items()}
        time.sleep(seconds)
        return {name: rate.per_second() for name, rate in rates.items()}
    finally:
        stop.set()
        for process in processes:
            process.join(DEADLINE_S)


class _Rate:
    """Counts a second between the first change that is seen and the last."""

    def __init__(self, count: Any) -> None:
        self._count = count
        self._first = self._mark()

    def per_second(self) -> float:
        last = self._mark()
        return (last[1] - self._first[1]) / (last[0] - self._first[0])

    def _mark(self) -> tuple[float, int]:
        before = self._count.value
        while self._count.value == before:
            time.sleep(0.001)
        return time.perf_counter(), self._count.value


def whole_run(directory: Path, topology: str, seconds: float) -> tuple[float, float]:
    """Samples a second of a run, and the CPU seconds that each took over all of its processes."""
    run_yaml = write_run(directory, topology)
    command = [sys.executable, "-m", "specforge", "train", "-c", str(run_yaml)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (directory / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment)
    metrics = directory / "run" / "metrics.jsonl"
    try:
        _wait(lambda: metrics.exists() and len(read_scalars(metrics)) > STEADY_STEPS, "the run is steady", process)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        cpu_before, num_before = _cpu_seconds(family), len(read_scalars(metrics))
        time.sleep(seconds)
        cpu_after, steps = _cpu_seconds(family), read_scalars(metrics)
        window = steps[num_before - 1 :]
        num_samples = BATCH * (len(window) - 1)
        return num_samples / (window[-1]["time_s"] - window[0]["time_s"]), (cpu_after - cpu_before) / num_samples
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _cpu_seconds(family: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in family]
    return sum(time.user + time.system for time in times)


def _wait(condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise RuntimeError(f"never happened: {what}")
        time.sleep(0.1)


def measure(rounds: int = 3, seconds: float = 20.0) -> dict[str, float]:
    """Medians over ``rounds``; ``w3_over_slower_half`` is the median of the ratios of each round."""
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            halves = uncoupled(Path(name) / f"halves-{number}", seconds)
            w3, w3_cpu = whole_run(Path(name) / f"w3-{number}", "disaggregated", seconds)
            w2, w2_cpu = whole_run(Path(name) / f"w2-{number}", "colocated", seconds)
            found = {
                "capture_half_samples_per_s": halves["capture"],
                "train_half_samples_per_s": halves["train"],
                "w3_samples_per_s": w3,
                "w2_samples_per_s": w2,
                "w3_over_slower_half": w3 / min(halves.values()),
                "w3_over_w2_cpu_us_per_sample": (w3_cpu - w2_cpu) * 1e6,
            }
            print(json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
            for key, value in found.items():
                seen.setdefault(key, []).append(value)
    return {key: round(statistics.median(values), 3) for key, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.rounds, arguments.seconds), indent=1))


if __name__ == "__main__":
    main()
