"""Training on one rank and on several: tokens per second, memory, the stall of a checkpoint, and model FLOPs.

Every run trains a draft of the shape below on random features with the product's trainer, in processes of its own, with
FSDP2 (``shard``) where there are several. All runs have the same global batch, and the runs take turns. Scaling is the
ratio of tokens per second to that of one rank in the same turn. On a CPU a rank has one compute thread, so two ranks
need two idle cores: the share of them that the runs got (processor time over wall time) is printed beside it.

* memory: the process's peak beyond what it had before the draft was made (CUDA: ``max_memory_allocated``), and the
  bytes of weights, masters and moments that this rank holds between steps.
* stall: how long a save holds the training up, against how long writing takes; ``blocking``: a save that is waited for.
* FLOPs: those of one step (forward and backward), counted once by PyTorch's counter; utilisation where the device's
  peak is known (``--peak-tflops`` for others).

    python benchmarks/training.py [--ranks 1,2] [--json FILE] [--algorithm NAME] [--small] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from specforge.algorithms.base import StepContext
from specforge.algorithms.catalog import get_algorithm, options_of
from specforge.contracts.batches import StepBatches
from specforge.contracts.refs import Slot
from specforge.data_plane.packing import plan_rank
from specforge.testing.algorithm_world import World, make_world, packed
from specforge.testing.samples import SMALL_TARGET
from specforge.training.checkpoint import Provenance
from specforge.training.checkpointer import Checkpointer
from specforge.training.optimizer import MasterOptimizer, OptimizerSettings
from specforge.training.ranks import Ranks, Rendezvous
from specforge.training.schedule import Schedule
from specforge.training.sharding import ShardedDraft, Sharding, own_part
from specforge.training.trainer import Surroundings, Trainable, Trainer, TrainerSettings

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bf16 peaks of devices, by a part of their name."""
OPTIONS: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 4, "draft_vocab_size": 8192},
    "dflash": {"num_layers": 4, "block_size": 8, "aux_layers": (1, 3, 5), "num_anchors": 64},
}


@dataclass(frozen=True)
class Shape:
    """``samples`` of ``tokens`` each are one optimizer step; ``micro_tokens`` a micro-batch."""

    hidden: int
    vocab: int
    samples: int
    tokens: int
    micro_tokens: int
    steps: int


CPU = Shape(512, 16384, 8, 256, 512, 5)
SMALL = Shape(64, 512, 4, 32, 64, 3)
GPU = Shape(4096, 151936, 16, 2048, 4096, 8)


@dataclass(frozen=True)
class Measured:
    """One rank of a run; times in seconds, sizes in bytes."""

    step_s: float
    cpu_share: float
    peak_bytes: int
    resident_bytes: int
    stall_s: float
    write_s: float
    blocking_s: float


class Silence:
    """A ledger and a log that want to know nothing."""

    def ack(self, slots: Any, step: int) -> None: ...

    def checkpoint_state(self) -> dict[str, Any]:
        return {}

    def checkpointed(self, step: int) -> None: ...

    def on_step(self, step: int, scalars: dict[str, float]) -> None: ...

    def on_evaluation(self, step: int, scalars: dict[str, float]) -> None: ...


def build_world(algorithm: str, shape: Shape) -> World:
    target = replace(
        SMALL_TARGET,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_attention_heads=max(2, shape.hidden // 64),
        num_key_value_heads=max(1, shape.hidden // 128),
        head_dim=min(64, shape.hidden // 2),
        vocab_size=shape.vocab,
        max_position_embeddings=2 * shape.tokens,
    )
    options = dict(OPTIONS.get(algorithm, {}))
    if "draft_vocab_size" in options:
        options["draft_vocab_size"] = min(options["draft_vocab_size"], shape.vocab // 2)
    return make_world(get_algorithm(options_of({"name": algorithm, **options})), target)


def step_batches(world: World, shape: Shape, ranks: Ranks, device: torch.device) -> StepBatches[torch.Tensor]:
    """This rank's share of the global batch, on the device."""
    lengths = [shape.tokens] * shape.samples
    samples = world.samples(lengths)
    bins = plan_rank(lengths, shape.micro_tokens, ranks.data_rank, ranks.data_size)
    micro = [packed([[samples[place] for place in group]])[0] if group else world.empty for group in bins]
    moved = tuple(
        replace(
            batch,
            **{
                name: getattr(batch, name).to(device)
                for name in ("input_ids", "loss_mask", "position_ids", "document_ids")
            },
            features={name: tensor.to(device) for name, tensor in batch.features.items()},
        )
        for batch in micro
    )
    return StepBatches(moved, tuple(Slot(0, place) for place in range(shape.samples)), shape.samples)


def memory_now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_rank(pipe: Any, rank: int, size: int, place: str, algorithm: str, shape: Shape, device_type: str) -> None:
    """One rank: train, save twice, send a :class:`Measured`."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks.join(Rendezvous(f"file://{place}/meet-{size}", rank, size), device_type) if size > 1 else Ranks()
    world = build_world(algorithm, shape)
    before = memory_now(device)
    world.draft.to(device)
    tables = replace(
        world.tables, embed_tokens=world.tables.embed_tokens.to(device), lm_head=world.tables.lm_head.to(device)
    )
    draft = ShardedDraft(world.draft, ranks, Sharding(), device_type)
    optimizer = MasterOptimizer(
        dict(world.draft.named_parameters()),
        OptimizerSettings(),
        world.draft.vocabulary_tables(),
        lambda squares: ranks.main.sum([squares])[0] / draft.num_copies,
    )
    checkpointer = Checkpointer(Path(place) / f"checkpoints-{size}", ranks=ranks)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trainer = Trainer(
        Trainable(world.algorithm, draft, tables, Provenance({}, {}, {})),
        optimizer,
        Schedule("constant", 1e-4, 1000),
        TrainerSettings(1000, 1000, 0, device_type, dtype),
        Surroundings(checkpointer, Silence(), Silence(), ranks),
    )
    batches = step_batches(world, shape, ranks, device)
    trainer.train_step(batches)
    times, started, cpu = [], time.perf_counter(), time.process_time()
    for _ in range(shape.steps):
        begin = time.perf_counter()
        trainer.train_step(batches)
        settle(device)
        times.append(time.perf_counter() - begin)
    share = (time.process_time() - cpu) / (time.perf_counter() - started)
    peak = peak_memory(device) - before
    resident = sum(own_part(tensor).nbytes for tensor in optimizer.state_tensors().values())
    stall, write = saved(trainer, checkpointer)
    trainer.train_step(batches)
    begin = time.perf_counter()
    trainer.save()
    checkpointer.wait()
    blocking = time.perf_counter() - begin
    pipe.send(Measured(statistics.median(times), share, peak, resident, stall, write, blocking))
    ranks.leave()


def saved(trainer: Trainer, checkpointer: Checkpointer) -> tuple[float, float]:
    """Seconds for which a save held the training up, and until it was complete on disk."""
    begin = time.perf_counter()
    trainer.save()
    stall = time.perf_counter() - begin
    checkpointer.wait()
    return stall, time.perf_counter() - begin


def run(size: int, algorithm: str, shape: Shape, device_type: str) -> list[Measured]:
    """Train on ``size`` ranks; the measurements of each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(theirs, rank, size, place, algorithm, shape, device_type))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return found


def step_flops(algorithm: str, shape: Shape) -> int:
    """FLOPs of one optimizer step, forward and backward, from the shapes of its matrix products.

    Counted on a short step and scaled to its tokens would miss attention; so a whole sample is counted, on the CPU.
    """
    world = build_world(algorithm, replace(shape, samples=1))
    sample = world.samples([shape.tokens])
    with FlopCounterMode(display=False) as counter:
        output = world.algorithm.forward_loss(world.draft, world.tables, packed([sample])[0], StepContext(1, 10, 0))
        output.loss_sum.backward()
    return counter.get_total_flops() * shape.samples


def summary(
    shape: Shape, by_size: dict[int, list[list[Measured]]], flops: int, peak_tflops: float | None
) -> list[dict]:
    rows = []
    tokens = shape.samples * shape.tokens
    alone = by_size.get(1)
    for size, turns in by_size.items():
        speeds = [tokens / max(rank.step_s for rank in ranks) for ranks in turns]
        scaling = (
            [speed / (tokens / ranks[0].step_s) for speed, ranks in zip(speeds, alone, strict=True)] if alone else []
        )
        everyone = [rank for ranks in turns for rank in ranks]
        row = {
            "ranks": size,
            "tokens_per_s": statistics.median(speeds),
            "scaling": statistics.median(scaling) if scaling else None,
            "cores_used": statistics.median([sum(rank.cpu_share for rank in ranks) for ranks in turns]),
            "peak_bytes_a_rank": max(rank.peak_bytes for rank in everyone),
            "state_bytes_a_rank": max(rank.resident_bytes for rank in everyone),
            "stall_s": statistics.median([max(rank.stall_s for rank in ranks) for ranks in turns]),
            "write_s": statistics.median([max(rank.write_s for rank in ranks) for ranks in turns]),
            "blocking_s": statistics.median([max(rank.blocking_s for rank in ranks) for ranks in turns]),
            "tflops": statistics.median(speeds) / tokens * flops / 1e12,
        }
        row["stall_share"] = row["stall_s"] / row["blocking_s"]
        row["mfu"] = None if peak_tflops is None else row["tflops"] / (peak_tflops * size)
        rows.append(row)
    return rows


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    names = "ranks, tokens/s, scaling, cores used, peak MB a rank, state MB a rank, stall s, written in s"
    for name in [*names.split(", "), "stall / blocking save", "TFLOP/s", "MFU"]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            f"{row['tokens_per_s']:.0f}",
            "-" if row["scaling"] is None else f"{row['scaling']:.2f}x",
            f"{row['cores_used']:.2f}",
            f"{row['peak_bytes_a_rank'] / 1e6:.0f}",
            f"{row['state_bytes_a_rank'] / 1e6:.0f}",
            f"{row['stall_s']:.4f}",
            f"{row['write_s']:.3f}",
            f"{row['stall_share']:.1%}",
            f"{row['tflops']:.4f}",
            "unknown peak" if row["mfu"] is None else f"{row['mfu']:.1%}",
        )
    Console(width=160).print(table)


def known_peak(device_type: str) -> float | None:
    if device_type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, with commas")
    parser.add_argument("--turns", type=int, default=3, help="how often each number of ranks runs")
    parser.add_argument("--algorithm", action="append", choices=sorted(OPTIONS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peak-tflops", type=float, help="of one device, in the number format of the draft")
    parser.add_argument("--small", action="store_true", help="a shape that only shows that everything runs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape = SMALL if arguments.small else GPU if arguments.device == "cuda" else CPU
    sizes = [int(size) for size in arguments.ranks.split(",")]
    peak = arguments.peak_tflops or known_peak(arguments.device)
    results = {}
    for algorithm in arguments.algorithm or sorted(OPTIONS):
        by_size: dict[int, list[list[Measured]]] = {size: [] for size in sizes}
        for _ in range(arguments.turns):
            for size in sizes:
                by_size[size].append(run(size, algorithm, shape, arguments.device))
        results[algorithm] = summary(shape, by_size, step_flops(algorithm, shape), peak)
        show(
            results[algorithm],
            f"{algorithm}: {shape.samples} samples of {shape.tokens} tokens a step, hidden {shape.hidden}",
        )
    if arguments.json:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} CPU cores"
        about = {
            "device": device,
            "platform": platform.platform(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        arguments.json.write_text(json.dumps(about | {"shape": asdict(shape), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
