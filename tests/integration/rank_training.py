"""Trainers of small drafts on several gloo ranks, each a process of its own; and what is recorded of them."""

import contextlib
import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from children import child_process

from specforge.contracts.batches import StepBatches
from specforge.contracts.refs import Slot
from specforge.data_plane.packing import plan_rank
from specforge.testing.algorithm_world import make_world, packed, small_algorithm
from specforge.training.checkpoint import Provenance
from specforge.training.checkpointer import Checkpointer
from specforge.training.optimizer import MasterOptimizer, OptimizerSettings
from specforge.training.ranks import Ranks, Rendezvous
from specforge.training.schedule import Schedule
from specforge.training.sharding import ShardedDraft, Sharding, whole
from specforge.training.trainer import Surroundings, Trainable, Trainer, TrainerSettings

PRELOAD = ["specforge.testing.algorithm_world", "specforge.training.trainer"]
LENGTHS = (9, 14, 7, 11, 5, 12)
"""Of the samples of a step: an uneven number for two and four ranks, of uneven lengths."""
MAX_TOKENS = 24
TOTAL_STEPS = 60
WHOLE = Sharding()


@dataclass(frozen=True)
class Training:
    """One training of ``case`` from ``first_step`` (a checkpoint of ``directory``, if above 0) up to ``last_step``."""

    case: str
    directory: Path | None = None
    first_step: int = 0
    last_step: int = 50
    sharding: Sharding = WHOLE
    optimizer: str = "adamw"
    schedule: str = "constant"
    sequence_size: int = 1
    lr: float = 1e-3


@dataclass
class Recorded:
    """What a rank saw: scalars of every step, the slots, the first step's whole gradients, how often each parameter's
    gradient was reduced in every step, and the whole weights at the end.
    """

    scalars: list[dict[str, float]] = field(default_factory=list)
    slots: list[tuple[Slot, ...]] = field(default_factory=list)
    acked: list[tuple[tuple[Slot, ...], int]] = field(default_factory=list)
    first_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    reductions: list[list[int]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def ack(self, slots, step):
        self.acked.append((tuple(slots), step))

    def checkpoint_state(self):
        return {}

    def checkpointed(self, step): ...

    def on_step(self, step, scalars):
        self.scalars.append(scalars)

    def on_evaluation(self, step, scalars): ...


def batches(world, ranks, recorded, first_step, last_step):
    """Steps of six samples, each with one that has no supervised token. In every seventh none has any; in another the
    ranks with odd numbers have none.
    """
    for step in range(first_step, last_step):
        samples = world.samples(LENGTHS, seed=step)
        without = {step % 6, *(range(6) if step % 7 == 6 else range(1, 6, 2) if step % 7 == 3 else ())}
        samples = [sample.masked() if place in without else sample for place, sample in enumerate(samples)]
        slots = tuple(Slot(0, len(LENGTHS) * step + place) for place in range(len(LENGTHS)))
        recorded.slots.append(slots)
        bins = plan_rank(LENGTHS, MAX_TOKENS, ranks.data_rank, ranks.data_size)
        micro = tuple(packed([[samples[p] for p in bin_]])[0] if bin_ else world.empty for bin_ in bins)
        yield StepBatches(micro, slots, len(LENGTHS) * (step + 1))


def train(ranks: Ranks, training: Training) -> Recorded:
    """Run ``training`` as one of ``ranks``."""
    world, recorded = make_world(small_algorithm(training.case)), Recorded()
    sharded = ShardedDraft(world.draft, ranks, training.sharding, "cpu")
    optimizer = MasterOptimizer(
        dict(world.draft.named_parameters()),
        OptimizerSettings(kind=training.optimizer, weight_decay=0.01, decay="matrices"),
        world.draft.vocabulary_tables(),
        lambda squares: ranks.main.sum([squares])[0] / sharded.num_copies,
    )
    _record_gradients(optimizer, world, recorded)
    checkpointer = Checkpointer(training.directory or Path("/nowhere"), ranks=ranks)
    trainer = Trainer(
        Trainable(world.algorithm, sharded, world.tables, Provenance({}, {}, {})),
        optimizer,
        Schedule(training.schedule, lr=training.lr, total_steps=TOTAL_STEPS, warmup_ratio=0.1),
        TrainerSettings(TOTAL_STEPS, checkpoint_every=10_000, seed=5),
        Surroundings(checkpointer, recorded, recorded, ranks),
    )
    if training.first_step:
        checkpoint = checkpointer.latest()
        assert checkpoint is not None
        assert checkpoint.position.step == training.first_step
        trainer.restore(checkpoint)
    stream = batches(world, ranks, recorded, training.first_step, training.last_step)
    if training.directory is None:
        _train_without_checkpoints(trainer, stream, recorded)
    else:
        trainer.fit(stream)
    recorded.weights = {name: tensor.clone() for name, tensor in sharded.served_state().items()}
    return recorded


def _train_without_checkpoints(trainer, stream, recorded):
    with _counted_reductions(recorded):
        for step in stream:
            recorded.reductions.append([])
            recorded.scalars.append(trainer.train_step(step))


def _record_gradients(optimizer, world, recorded):
    step = optimizer.step

    @functools.wraps(step)
    def recording(lr):
        if not recorded.first_gradients:
            named = world.draft.named_parameters()
            recorded.first_gradients = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}
        return step(lr)

    optimizer.step = recording


class _counted_reductions:  # noqa: N801 - a context manager
    """Counts, by parameter, the gradient reductions that FSDP2 starts."""

    def __init__(self, recorded):
        self.recorded = recorded

    def __enter__(self):
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

        self.place, self.reduce = group, group.foreach_reduce

        def counting(fsdp_params, *arguments, **named):
            self.recorded.reductions[-1].extend(id(parameter) for parameter in fsdp_params)
            return self.reduce(fsdp_params, *arguments, **named)

        group.foreach_reduce = counting

    def __exit__(self, *_):
        self.place.foreach_reduce = self.reduce


def _run_rank(pipe, rank, size, rendezvous, trainings):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sequence_size = trainings[0].sequence_size
    ranks = Ranks.join(Rendezvous(f"file://{rendezvous}", rank, size), sequence_size=sequence_size)
    for training in trainings:
        recorded = train(ranks, training)
        tensors = [{k: v.numpy() for k, v in t.items()} for t in (recorded.first_gradients, recorded.weights)]
        recorded.first_gradients, recorded.weights = tensors
        pipe.send(recorded)
    ranks.leave()


def train_on(size, directory, trainings, deadline_s=300):
    """The records of every rank, for each of ``trainings``, which ``size`` processes run one after the other."""
    directory.mkdir(parents=True, exist_ok=True)
    rendezvous = directory / f"rendezvous-{size}-{len(list(directory.glob('rendezvous-*')))}"
    with contextlib.ExitStack() as stack:
        pipes = [
            stack.enter_context(child_process(_run_rank, rank, size, rendezvous, trainings, preload=PRELOAD))[1]
            for rank in range(size)
        ]
        found = [[_received(pipe, deadline_s) for pipe in pipes] for _ in trainings]
    return found


def _received(pipe, deadline_s):
    assert pipe.poll(deadline_s), "a rank never finished"
    recorded = pipe.recv()
    recorded.first_gradients = {k: torch.from_numpy(v) for k, v in recorded.first_gradients.items()}
    recorded.weights = {k: torch.from_numpy(v) for k, v in recorded.weights.items()}
    return recorded
