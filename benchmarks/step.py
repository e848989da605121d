"""A training step (forward and backward) of every algorithm beside its plain path: time and peak memory.

The plain paths are those of ``specforge.testing.plain``: vectorised eager PyTorch with ``F.linear``,
``F.cross_entropy`` over whole logits and ``scaled_dot_product_attention`` with a dense mask. They share the draft's
weights and give the same loss and gradients (tests/unit/algorithms/test_plain_paths.py). They measure no accuracy,
which the product's step does. A step has one document, so that packing has no part in any figure, and all of it but a
short prompt is supervised. The two take turns; ratios are plain over ours, of medians; "cpu" ratios are of the
process's own processor time, which what else runs on the machine disturbs less.

Peak memory is exact: on a CPU every allocation and release of PyTorch's allocator in the step, those inside of
operations included (the profiler's memory events); on CUDA ``max_memory_allocated``. It starts at what lives before the
step (weights, features), so the gradients that a step leaves behind are in it. "loss" is what is allocated outside of
the backbone, until the loss has its gradients with respect to the backbone's outputs: teacher, heads, losses and the
gradients of the heads.

Also for EAGLE-3: the cost of attention by the number of steps, and the memory of the loss by the size of the
vocabulary, in units of one head.

    python benchmarks/step.py [--json FILE] [--algorithm NAME] [--small] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from specforge.algorithms.base import StepContext, TargetTables
from specforge.algorithms.catalog import get_algorithm, options_of
from specforge.algorithms.parts.attention import packed_layout, unrolled_attention
from specforge.contracts.capture import TargetInfo
from specforge.testing.algorithm_world import World, make_world
from specforge.testing.plain.base import PlainInputs
from specforge.testing.plain.layers import attend
from specforge.testing.plain.paths import PLAIN_PATHS
from specforge.testing.samples import SMALL_TARGET, pack

MARK = "step segment: "
PROMPT_TOKENS = 16
CONTEXT = StepContext(global_step=5, total_steps=20, seed=0)
BLOCKS: dict[str, Any] = {"num_layers": 2, "block_size": 8, "aux_layers": (1, 3)}
OPTIONS: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 7},
    "peagle": {"num_depths": 5, "num_layers": 2},
    "dflash": BLOCKS,
    "domino": {**BLOCKS, "emb_dim": 64, "gru_hidden_dim": 128},
    "dspark": {**BLOCKS, "markov_rank": 64},
    "mtp": {},
    "medusa": {"num_heads": 4},
}


@dataclass(frozen=True)
class Shape:
    """``steps``: timed ones of each path. ``memory_gb`` (1e9 bytes): what the plain path needs, weights included."""

    name: str
    tokens: int
    hidden: int
    vocab: int
    draft_vocab: int
    anchors: int
    steps: int
    memory_gb: float = 1.0

    def target(self) -> TargetInfo:
        heads = self.hidden // 64
        return replace(
            SMALL_TARGET,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=64,
            vocab_size=self.vocab,
            max_position_embeddings=2 * self.tokens,
        )


SHAPES = (
    Shape("256 tokens, hidden 256, vocabulary 8k", 256, 256, 8192, 4096, 32, 5),
    Shape("512 tokens, hidden 256, vocabulary 32k", 512, 256, 32768, 8192, 64, 3, memory_gb=3.0),
    Shape("1024 tokens, hidden 512, vocabulary 32k", 1024, 512, 32768, 16384, 96, 3, memory_gb=5.0),
)
PUBLISHED = Shape("2048 tokens, hidden 1024, vocabulary 151936", 2048, 1024, 151936, 32000, 128, 1, memory_gb=13.0)
PRUNING = ("eagle3", "peagle")


@dataclass
class Segment:
    """Live bytes at the start and the end of a part of a step, and the most in between."""

    kind: str
    start: int
    peak: int
    end: int


@dataclass
class Meter:
    """Live bytes by part of a step. ``mark`` starts the next part; nothing is measured unless ``on``."""

    device: torch.device
    on: bool
    kinds: list[str] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def mark(self, kind: str) -> None:
        if not self.on:
            return
        if self.device.type == "cuda":
            self._close()
            torch.cuda.reset_peak_memory_stats()
            now = torch.cuda.memory_allocated()
            self.segments.append(Segment(kind, now, now, now))
        else:
            with record_function(f"{MARK}{len(self.kinds)}"):
                self.kinds.append(kind)

    @contextmanager
    def step(self) -> Iterator[None]:
        if not self.on or self.device.type == "cuda":
            yield
            self._close()
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        self._read(profiler)

    def _close(self) -> None:
        if self.segments and self.device.type == "cuda":
            last = self.segments[-1]
            last.peak, last.end = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()

    def _read(self, profiler: Any) -> None:
        events = profiler.profiler.kineto_results.events()
        wanted = [event for event in events if event.name() == "[memory]" or event.name().startswith(MARK)]
        live = 0
        for event in sorted(wanted, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
            else:
                kind = self.kinds[int(event.name().removeprefix(MARK))]
                self.segments.append(Segment(kind, live, live, live))
            if self.segments:
                last = self.segments[-1]
                last.peak, last.end = max(last.peak, live), live

    def step_peak(self) -> int:
        return max(segment.peak for segment in self.segments) - self.segments[0].start

    def loss_peak(self) -> int:
        """What the parts of the loss hold together, the backbone's allocations left out."""
        held = peak = 0
        for segment in self.segments:
            if segment.kind == "loss":
                peak = max(peak, held + segment.peak - segment.start)
                held += segment.end - segment.start
        return peak


@dataclass
class Case:
    """One algorithm at one shape."""

    world: World
    batch: Any
    plain_name: str

    def ours(self, meter: Meter) -> None:
        """The product's step, cut where the backbone ends."""
        draft, cut = self.world.draft, Cut(meter)
        forward = draft.forward
        draft.forward = lambda *arguments: cut(forward(*arguments))  # type: ignore[method-assign]
        handle = draft.register_forward_pre_hook(lambda *_: meter.mark("backbone"))
        try:
            loss = self.world.algorithm.forward_loss(draft, self.world.tables, self.batch, CONTEXT).loss_sum
        finally:
            del draft.forward
            handle.remove()
        loss.backward()
        cut.backward()

    def plain(self, meter: Meter) -> None:
        world, cut = self.world, Cut(meter)
        inputs = PlainInputs(world.algorithm, world.draft, world.tables, self.batch, CONTEXT)
        path = PLAIN_PATHS[self.plain_name]
        meter.mark("backbone")
        outputs = cut(path.backbone(inputs))
        path.loss(inputs, outputs).backward()
        cut.backward()


class Cut:
    """Separates the backbone's graph from the loss's, and runs the backbone's backward at the end."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.outputs: list[Tensor] = []
        self.leaves: list[Tensor] = []
        meter.mark("loss")

    def __call__(self, outputs: Any) -> Any:
        several = isinstance(outputs, list | tuple)
        found = list(outputs) if several else [outputs]
        leaves = [output.detach().requires_grad_() for output in found]
        self.outputs += found
        self.leaves += leaves
        self.meter.mark("loss")
        return leaves if several else leaves[0]

    def backward(self) -> None:
        self.meter.mark("rest")
        pairs = [(o, leaf.grad) for o, leaf in zip(self.outputs, self.leaves, strict=True) if leaf.grad is not None]
        self.leaves.clear()
        self.outputs.clear()
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


def make_case(name: str, shape: Shape, device: torch.device) -> Case:
    options = {"name": name, **OPTIONS.get(name, {})}
    if name in ("dflash", "domino", "dspark"):
        options["num_anchors"] = shape.anchors
    if name in PRUNING:
        options["draft_vocab_size"] = shape.draft_vocab
    world = make_world(get_algorithm(options_of(options)), shape.target())
    # logits of a size as a model has them: far larger ones make denormal probabilities, which a CPU is slow at
    tables = replace(world.tables, lm_head=world.tables.lm_head / shape.hidden**0.5)
    world = replace(world, tables=tables)
    world = replace(world, draft=world.fresh(seed=0))
    [sample] = world.samples([shape.tokens])
    batch = pack([sample.masked((PROMPT_TOKENS, shape.tokens))])
    if device.type != "cpu":
        tables = TargetTables(world.tables.embed_tokens.to(device), world.tables.lm_head.to(device))
        world = replace(world, tables=tables, draft=world.draft.to(device))
        moved = {n: getattr(batch, n).to(device) for n in ("input_ids", "loss_mask", "position_ids", "document_ids")}
        batch = replace(batch, features={n: t.to(device) for n, t in batch.features.items()}, **moved)
    return Case(world, batch, name)


def run(
    case: Case, path: Callable[[Meter], None], device: torch.device, measured: bool
) -> tuple[tuple[float, float], Meter]:
    """Seconds of one step (by the clock, of the processor), and what it held."""
    case.world.draft.zero_grad(set_to_none=True)
    meter = Meter(device, measured)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    with meter.step():
        synchronise()
        start = time.perf_counter(), time.process_time()
        path(meter)
        synchronise()
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    case.world.draft.zero_grad(set_to_none=True)
    return seconds, meter


def compare(name: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Figures of one algorithm at one shape. With a single timed step, that one is also the measured one."""
    case = make_case(name, shape, device)
    paths = {"ours": case.ours, "plain": case.plain}
    seconds: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
    meters = {}
    for kind, path in paths.items():
        elapsed, meters[kind] = run(case, path, device, measured=True)
        if shape.steps == 1:
            seconds[kind].append(elapsed)
    for _ in range(shape.steps if shape.steps > 1 else 0):
        for kind, path in paths.items():
            seconds[kind].append(run(case, path, device, measured=False)[0])
    figures: dict[str, Any] = {"algorithm": name, "shape": shape.name, "timed_steps": shape.steps}
    for kind in paths:
        figures[f"{kind}_step_s"] = statistics.median(clock for clock, _ in seconds[kind])
        figures[f"{kind}_step_cpu_s"] = statistics.median(cpu for _, cpu in seconds[kind])
        figures[f"{kind}_tokens_per_s"] = shape.tokens / figures[f"{kind}_step_s"]
        figures[f"{kind}_loss_peak_bytes"] = meters[kind].loss_peak()
        figures[f"{kind}_step_peak_bytes"] = meters[kind].step_peak()
    for what in ("step_s", "step_cpu_s", "loss_peak_bytes", "step_peak_bytes"):
        ratio = what.removesuffix("_s").removesuffix("_bytes") + "_ratio"
        figures[ratio] = figures[f"plain_{what}"] / figures[f"ours_{what}"]
    return figures


def attention_by_steps(tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Processor seconds of the attention (forward, backward) of an unroll of K steps, ours and over a growing cache."""
    heads, groups, size = 4, 2, 64
    generator = torch.Generator().manual_seed(0)
    layout = packed_layout([tokens], torch.arange(tokens))
    causal, diagonal = torch.ones(tokens, tokens, dtype=torch.bool).tril(), torch.eye(tokens, dtype=torch.bool)

    def inputs(num_steps: int) -> list[list[Tensor]]:
        widths = (heads, groups, groups)
        return [
            [torch.randn(tokens, n, size, generator=generator).requires_grad_() for n in widths]
            for _ in range(num_steps)
        ]

    def ours(steps: list[list[Tensor]]) -> Tensor:
        first, own = steps[0], [(k, v) for _, k, v in steps[1:]]
        outputs = [unrolled_attention(layout, q, (first[1], first[2]), own[:i]) for i, (q, _, _) in enumerate(steps)]
        return torch.stack(outputs).sum()

    def plain(steps: list[list[Tensor]]) -> Tensor:
        outputs = []
        for i, (q, _, _) in enumerate(steps):
            keys, values = (torch.cat([step[place] for step in steps[: i + 1]]) for place in (1, 2))
            outputs.append(attend(q, keys, values, torch.cat([causal] + [diagonal] * i, dim=1)))
        return torch.stack(outputs).sum()

    found: dict[str, dict[str, float]] = {"ours": {}, "plain": {}}
    for num_steps in (1, 2, 4, 8):
        steps = inputs(num_steps)
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(repeats + 1):
            for kind, path in (("ours", ours), ("plain", plain)):
                start = time.process_time()
                path(steps).backward()
                times[kind].append(time.process_time() - start)
        for kind, values in times.items():
            found[kind][str(num_steps)] = statistics.median(values[1:])
    return found


def memory_by_vocabulary(tokens: int, hidden: int, device: torch.device) -> list[dict[str, float]]:
    """Peak memory of EAGLE-3's loss at growing vocabularies, whole and pruned to 8192, in bytes and in heads."""
    found = []
    for vocab in (32768, 65536, 151936):
        for kept in (vocab, 8192):
            shape = Shape("", tokens, hidden, vocab, kept, 0, 1)
            case = make_case("eagle3", shape, device)
            _, meter = run(case, case.ours, device, measured=True)
            head = kept * hidden * 4
            row = {"vocab": vocab, "draft_vocab": kept, "loss_peak_bytes": meter.loss_peak(), "head_bytes": head}
            found.append(row | {"loss_peak_in_heads": meter.loss_peak() / head})
    return found


def shapes_of(name: str, small: bool) -> tuple[Shape, ...]:
    if small:
        return SHAPES[:1]
    return (*SHAPES[:2], PUBLISHED) if name == "eagle3" else SHAPES


def report(names: list[str], small: bool, device: torch.device, console: Console) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    }
    rows, table = (
        [],
        Table("algorithm", "shape", "ours tok/s", "plain tok/s", "step", "cpu", "loss MB", "plain MB", "loss", "all"),
    )
    for name in names:
        for shape in shapes_of(name, small):
            free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0]
            if free < shape.memory_gb * 1e9:
                console.print(f"{name}, {shape.name}: left out, needs {shape.memory_gb} GB, free are {free / 1e9:.1f}")
                continue
            row = compare(name, shape, device)
            rows.append(row)
            figures |= {f"{name}_{ratio}": value for ratio, value in row.items() if ratio.endswith("_ratio")}
            table.add_row(*table_row(row))
            console.print(f"{name}, {shape.name}: step {row['step_ratio']:.2f}, loss {row['loss_peak_ratio']:.1f}")
    figures["runs"] = rows
    console.print(table)
    if "eagle3" in names:
        figures |= eagle3_growth(small, device, console)
    return figures


def eagle3_growth(small: bool, device: torch.device, console: Console) -> dict[str, Any]:
    """How attention grows with the unroll and the loss with the vocabulary."""
    attention = attention_by_steps(256 if small else 512, 3)
    for kind, values in attention.items():
        shares = ", ".join(f"{steps} steps {seconds / values['1']:.1f}" for steps, seconds in values.items())
        console.print(f"attention of the unroll, {kind}, in units of one step: {shares}")
    by_vocabulary = memory_by_vocabulary(128, 64 if small else 512, device)
    for row in by_vocabulary:
        console.print(
            f"vocabulary {row['vocab']:6} drafted {row['draft_vocab']:6}: loss {row['loss_peak_bytes'] / 1e6:7.1f} MB"
            f" = {row['loss_peak_in_heads']:.2f} heads"
        )
    return {"eagle3_attention_s_by_steps": attention, "eagle3_loss_by_vocabulary": by_vocabulary}


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["algorithm"],
        row["shape"],
        f"{row['ours_tokens_per_s']:.0f}",
        f"{row['plain_tokens_per_s']:.0f}",
        f"{row['step_ratio']:.2f}x",
        f"{row['step_cpu_ratio']:.2f}x",
        f"{row['ours_loss_peak_bytes'] / 1e6:.1f}",
        f"{row['plain_loss_peak_bytes'] / 1e6:.1f}",
        f"{row['loss_peak_ratio']:.1f}x",
        f"{row['step_peak_ratio']:.1f}x",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps beside their plain paths: time and peak memory.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--algorithm", choices=list(PLAIN_PATHS), help="only this one")
    parser.add_argument("--small", action="store_true", help="only the smallest shape")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = [arguments.algorithm] if arguments.algorithm else list(PLAIN_PATHS)
    figures = report(names, arguments.small, torch.device(arguments.device), Console(width=150))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
