"""What learns: the draft of a run, its optimizer and schedule, and the trainer around them. The same on every rank."""

from __future__ import annotations

import json
from typing import Any

from specforge.algorithms.base import DraftModel, Pace
from specforge.algorithms.parts.tables import load_target_tables
from specforge.config.run import RunConfig
from specforge.contracts.codec import to_json
from specforge.errors import ConfigError
from specforge.launch.inputs import RunInputs, resolve_device, resolve_dtype
from specforge.launch.vocabulary import draft_vocabulary, vocabulary_sha256
from specforge.training.blocks import checkpoint_activations, compile_blocks
from specforge.training.checkpoint import Provenance, weights_sha256
from specforge.training.checkpointer import Checkpointer
from specforge.training.config import TrainingConfig
from specforge.training.optimizer import MasterOptimizer, OptimizerSettings
from specforge.training.ranks import LEADER, Ranks
from specforge.training.schedule import Schedule
from specforge.training.sharding import ShardedDraft, Sharding
from specforge.training.trainer import Surroundings, Trainable, Trainer, TrainerSettings


def make_trainable(inputs: RunInputs, ranks: Ranks | None = None) -> Trainable:
    """A fresh draft: a function of the seed, the target's tables and, where pruned, the training tokens' counts.

    With several ranks a collective, which a draft that differs between them ends with a :class:`ConfigError`.
    """
    config, target, algorithm = inputs.config, inputs.target, inputs.algorithm
    training, ranks = config.training, ranks or Ranks()
    device = resolve_device(training.device)
    tables = load_target_tables(target.path, resolve_dtype(training.dtype, device), device)
    draft = algorithm.build_draft(algorithm.draft_config(target), tables, config.seed, draft_vocabulary(inputs))
    provenance = make_provenance(inputs)
    check_same_start(ranks, draft, provenance)
    if training.activation_checkpointing:
        checkpoint_activations(draft)
    if training.compile:
        compile_blocks(draft)
    sharded = ShardedDraft(draft, ranks, Sharding(training.sharding, training.shard_size), device.type)
    return Trainable(algorithm, sharded, tables, provenance)


def make_provenance(inputs: RunInputs) -> Provenance:
    """What this run writes into its checkpoints, and what it wants to find in those that it resumes from."""
    draft_config = inputs.algorithm.draft_config(inputs.target)
    identity = inputs.identity() | {"vocabulary_sha256": vocabulary_sha256(draft_vocabulary(inputs))}
    return Provenance(identity, draft_config.to_dict(), to_json(inputs.target))


def check_same_start(ranks: Ranks, draft: DraftModel, provenance: Provenance) -> None:
    """All ranks begin with the same draft of the same run; a collective. Else a :class:`ConfigError` on all of them."""
    if ranks.size == 1:
        return
    own = {**provenance.identity, "draft_weights_sha256": weights_sha256(draft.served_state())}
    found = [json.loads(text) for text in ranks.main.collect(json.dumps(own).encode())]
    for rank, facts in enumerate(found):
        for key in sorted(set(facts) | set(found[LEADER])):
            if facts.get(key) != found[LEADER].get(key):
                raise ConfigError(
                    f"train rank {rank} starts with {key} = {facts.get(key)!r}, rank {LEADER} with "
                    f"{found[LEADER].get(key)!r}; give all ranks the same run file, target, prompts and versions"
                )


def make_trainer(inputs: RunInputs, trainable: Trainable, around: Surroundings) -> Trainer:
    training, plan = inputs.config.training, inputs.plan
    device = resolve_device(training.device)
    return Trainer(
        trainable,
        make_optimizer(inputs, trainable.draft, around.ranks),
        make_schedule(training, inputs.pace, plan.total_steps),
        TrainerSettings(
            total_steps=plan.total_steps,
            checkpoint_every=training.checkpoint_every,
            seed=inputs.config.seed,
            device_type=device.type,
            compute_dtype=resolve_dtype(training.dtype, device),
        ),
        around,
    )


def make_optimizer(inputs: RunInputs, sharded: ShardedDraft, ranks: Ranks) -> MasterOptimizer:
    """Over the parameters as they are now: after the draft was sharded."""
    training = inputs.config.training
    settings = OptimizerSettings(
        kind=training.optimizer,
        betas=training.betas,
        weight_decay=training.weight_decay,
        max_grad_norm=inputs.pace.max_grad_norm,
        decay=training.decay,
    )
    return MasterOptimizer(
        dict(sharded.draft.named_parameters()),
        settings,
        sharded.draft.vocabulary_tables(),
        over_shards=lambda square: ranks.main.sum([square])[0] / sharded.num_copies,
    )


def make_schedule(training: TrainingConfig, pace: Pace, total_steps: int) -> Schedule:
    return Schedule(
        training.schedule,
        pace.lr,
        total_steps,
        pace.warmup_ratio,
        training.min_lr_ratio,
        training.decay_ratio,
        training.decay_shape,
    )


def make_checkpointer(config: RunConfig, ranks: Ranks | None = None) -> Checkpointer:
    training = config.training
    return Checkpointer(config.run_dir / "checkpoints", training.keep_last, training.keep_every, ranks)


def at_rank(config: RunConfig, local_rank: int, num_ranks: int, num_devices: int) -> RunConfig:
    """``config`` with the devices of one of ``num_ranks`` processes on a host with ``num_devices`` CUDA devices.

    Where a device is left open every rank has one of its own, ``cuda:LOCAL_RANK``: for the draft, and for the target
    where every rank has that too.
    """
    if num_ranks == 1:
        return config
    found: dict[str, Any] = {}
    sections = ("training", "target") if config.topology == "colocated" else ("training",)
    for section in sections:
        options = getattr(config, section)
        if options.device.startswith("cuda:"):
            raise ConfigError(
                f"{section}.device is {options.device}, one device for {num_ranks} train ranks: use auto or cuda, "
                "which give each rank its own, or cpu"
            )
        wants_cuda = options.device == "cuda" or (options.device == "auto" and num_devices > 0)
        if wants_cuda and num_devices < num_ranks:
            raise ConfigError(
                f"{num_ranks} train ranks need a CUDA device each, and this machine has {num_devices}: lower "
                f"launch.num_train_ranks (under torchrun, --nproc-per-node), or set {section}.device to cpu"
            )
        if wants_cuda:
            found[section] = options.model_copy(update={"device": f"cuda:{local_rank}"})
    return config.model_copy(update=found)
