"""The composition root: the only file, with ``stores``, that names concrete classes.

    prompts          load_prompt_tasks            JSONL -> PromptTask (in ``inputs``)
    control plane    DataFlowController           the life of every sample, over a MetadataStore
                     ControlPlaneServer/Client    the same protocol between processes
                     memory channel               committed refs -> StreamingRefQueue
    data plane       the feature stores           in ``stores``
                     FeatureDataLoader            refs + store -> StepBatches
    capture          HFTargetEngine, RolloutWorker
                     OfflineManifestReader        the same over features that were captured earlier
    training         Trainer, MasterOptimizer, Checkpointer

Builders, one a topology: ``build_online_runtime`` (one process), ``build_disagg_online_consumer`` and
``build_disagg_online_producer`` (the two kinds of process), ``build_disagg_online_runtime`` (all of them, as children
of this one) and ``run_disagg_online_interleaved`` (both halves of the disaggregated path in this process, alternating).
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import Pace
from specforge.algorithms.parts.tables import load_target_tables
from specforge.config.load import dump_run_config
from specforge.config.run import RunConfig
from specforge.contracts.batches import StepBatches
from specforge.contracts.capture import TargetInfo
from specforge.contracts.codec import to_json
from specforge.control_plane.base import CaptureControl
from specforge.control_plane.channel.base import RefWriter
from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.channel.queue import StreamingRefQueue
from specforge.control_plane.client import ControlPlaneClient
from specforge.control_plane.config import Ledger as LedgerConfig
from specforge.control_plane.config import MemoryLedger, NoLedger, PostgresLedger, SqliteLedger
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.base import Position
from specforge.control_plane.modes import Deployment, DeploymentMode, resolve_control_plane
from specforge.control_plane.prompts import ListedTasks, SampleOrder
from specforge.control_plane.server import ControlPlaneServer
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.config import LocalStore, SharedMemoryStore
from specforge.data_plane.loader import FeatureDataLoader, LoaderSettings, RefSource, step_bytes
from specforge.data_plane.offline import FeatureSet
from specforge.data_plane.prefetch import PrefetchIterator
from specforge.data_plane.retention import RetainingFeatureStore
from specforge.errors import ConfigError
from specforge.inference.engine import TargetEngine
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.offline import OfflineManifestReader
from specforge.inference.rollout import RolloutSettings, RolloutWorker
from specforge.launch.child import ChildSpec
from specforge.launch.endpoint import Endpoint
from specforge.launch.host import ROLES, HostExecutor
from specforge.launch.inputs import (
    RESOLVED_FILE,
    RunInputs,
    TargetInputs,
    read_run_inputs,
    read_target_inputs,
    resolve_device,
    resolve_dtype,
)
from specforge.launch.offline import verify_features
from specforge.launch.plan import ARENA_SHARE, Plan, capture_names
from specforge.launch.runtime import (
    CaptureRuntime,
    HandOver,
    HostRuntime,
    InlineCapture,
    StepLog,
    TrainOutcome,
    TrainRuntime,
)
from specforge.launch.stores import (
    clear_at_the_end,
    make_room,
    open_reader,
    open_writer,
    start_service,
    with_namespace,
    with_retention,
)
from specforge.launch.vocabulary import draft_vocabulary
from specforge.monitor.console import ConsoleMonitor
from specforge.monitor.fanout import FanoutMonitor
from specforge.monitor.jsonl import JsonlMonitor
from specforge.training.checkpoint import Checkpointer, Provenance, TrainPosition, weights_sha256
from specforge.training.config import TrainingConfig
from specforge.training.optimizer import MasterOptimizer, OptimizerSettings
from specforge.training.schedule import Schedule
from specforge.training.trainer import Ledger, Trainable, Trainer, TrainerSettings, check_same_run

_LOG = logging.getLogger(__name__)

MAX_LEASES = 8
"""Samples that a rollout worker leases at a time."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a supervisor gives the train process: the socket to serve on, the token, and the ids of living workers.

    ``listener`` None: the process listens by itself, where the configuration says.
    """

    listener: socket.socket | None
    token: str
    live_workers: frozenset[str] = frozenset()


def build_online_runtime(config: RunConfig, *, resume: bool = False) -> TrainRuntime:
    """One process: the trainer's thread captures what it is about to train on."""
    inputs = read_run_inputs(config)
    verify_features(config, inputs.tasks)
    with contextlib.ExitStack() as resources:
        inputs = replace(inputs, config=resolve(config, inputs.plan, resources))
        make_room(inputs.config, inputs.plan, resume)
        resources.callback(clear_at_the_end, inputs.config)
        store = open_writer(inputs.config)
        resources.callback(store.close)
        runtime = _train_side(inputs, store, resources, resume, engine=make_engine(inputs.config, inputs.target))
    return runtime


def build_offline_runtime(config: RunConfig, *, resume: bool = False) -> TrainRuntime:
    """One process over features that were captured earlier."""
    _check_offline(config, "colocated")
    return build_online_runtime(config, resume=resume)


def build_disagg_offline_runtime(
    config: RunConfig, *, resume: bool = False, keep_open: tuple[int, ...] = (), command: Sequence[str] = ROLES
) -> HostRuntime:
    """Processes over features that were captured earlier: those that capture read the files, none loads the target."""
    _check_offline(config, "disaggregated")
    return build_disagg_online_runtime(config, resume=resume, keep_open=keep_open, command=command)


def _check_offline(config: RunConfig, topology: str) -> None:
    if config.data.features is None or config.topology != topology:
        raise ConfigError(
            f"a {topology} offline run has data.features and topology = {topology}; got data.features = "
            f"{config.data.features} and topology = {config.topology}"
        )


def build_disagg_online_consumer(
    config: RunConfig, *, resume: bool = False, served: Served | None = None
) -> TrainRuntime:
    """The train process: ledger, controller and its server, loader, trainer. ``serve()`` gives the endpoint."""
    inputs = read_run_inputs(config)
    with contextlib.ExitStack() as resources:
        store = open_reader(config)
        resources.callback(store.close)
        served = served or Served(None, secrets.token_urlsafe(32))
        runtime = _train_side(inputs, store, resources, resume, served=served)
    return runtime


def build_disagg_online_producer(config: RunConfig, *, worker_id: str) -> CaptureRuntime:
    """The capture process: target, store and rollout worker. ``config`` is resolved: it names the store's size."""
    inputs = read_target_inputs(config)
    with contextlib.ExitStack() as resources:
        store = open_writer(config)
        resources.callback(store.close)
        engine = make_engine(config, inputs.target)

        def connect(url: str, token: str, open_until_end: contextlib.ExitStack) -> RolloutWorker:
            client = ControlPlaneClient(url, token, reconnect_s=config.control_plane.reconnect_s)
            open_until_end.callback(client.close)
            return make_worker(inputs, client, engine, store, worker_id)

        runtime = CaptureRuntime(connect, resources.pop_all())
    return runtime


def build_disagg_online_runtime(
    config: RunConfig, *, resume: bool = False, keep_open: tuple[int, ...] = (), command: Sequence[str] = ROLES
) -> HostRuntime:
    """All processes as children of this one. Everything that can be refused is refused before they start.

    ``keep_open``: file descriptors that the children inherit, such as the lock of the run. ``command`` starts a child.
    """
    inputs = read_run_inputs(config)
    verify_features(config, inputs.tasks)
    newest = make_checkpointer(config).newest_state() if resume else None
    if newest is not None:
        check_same_run(newest.path, newest.provenance, make_provenance(inputs))
    with contextlib.ExitStack() as resources:
        endpoint = Endpoint.open(config.control_plane.host, config.control_plane.port)
        resources.callback(endpoint.close)
        executor = HostExecutor(endpoint, config.launch.restarts, command)
        resolved = resolve(config, inputs.plan, resources, executor.fail)
        make_room(resolved, inputs.plan, resume)
        resources.callback(clear_at_the_end, resolved)
        config_file = config.run_dir / RESOLVED_FILE
        dump_run_config(resolved, config_file)
        logs = config.run_dir / "logs"
        children = [ChildSpec("train", "train", config_file, log_file=None, resume=resume, keep_open=keep_open)]
        children += [
            ChildSpec(name, "capture", config_file, log_file=logs / f"{name}.log", keep_open=keep_open)
            for name in capture_names(config)
        ]
        runtime = HostRuntime(executor, children, resources.pop_all())
    return runtime


def run_disagg_online_interleaved(config: RunConfig, *, resume: bool = False) -> TrainOutcome:
    """Both halves of the disaggregated path in this process, alternating: its ledger and its arena, no network."""
    return build_online_runtime(config, resume=resume).run()


def resolve(
    config: RunConfig, plan: Plan, resources: contextlib.ExitStack, on_given_up: Callable[[str], None] = _LOG.error
) -> RunConfig:
    """``config`` with every automatic choice of ``plan`` written down: what children read.

    A managed service is started for it, and ends when ``resources`` close. ``on_given_up`` hears why it ended earlier.
    """
    found: dict[str, Any] = {}
    if plan.store == "shared_memory":
        found["store"] = SharedMemoryStore(capacity_bytes=plan.store_capacity_bytes or 1)
    elif plan.store == "local":
        found["store"] = LocalStore()
    if plan.transfer_bytes is not None:
        found["mooncake"] = config.data_plane.mooncake.model_copy(update={"buffer_bytes": plan.transfer_bytes})
    data_plane = config.data_plane.model_copy(update=found)
    control_plane = config.control_plane.model_copy(update={"ledger": resolved_ledger(plan)})
    resolved = config.model_copy(update={"data_plane": data_plane, "control_plane": control_plane})
    return start_service(with_namespace(resolved), plan, resources, on_given_up)


def resolved_ledger(plan: Plan) -> LedgerConfig:
    """The options of the ledger that ``plan`` chose, with its place."""
    if plan.ledger_url is not None:
        return PostgresLedger(url=plan.ledger_url, name=plan.ledger_name)
    if plan.ledger == "sqlite":
        return SqliteLedger(path=plan.ledger_path)
    return MemoryLedger() if plan.ledger == "memory" else NoLedger()


def make_engine(config: RunConfig, target: TargetInfo) -> TargetEngine:
    """The frozen target, in this process; or what was captured of it earlier."""
    torch.set_num_threads(config.training.threads)
    if config.data.features is not None:
        return OfflineManifestReader(target, FeatureSet(config.data.features))
    device = resolve_device(config.target.device)
    dtype = str(resolve_dtype(config.target.dtype, device)).removeprefix("torch.")
    return HFTargetEngine(target, dtype, device, config.target.trust_remote_code)


def make_worker(
    inputs: TargetInputs | RunInputs, control: CaptureControl, engine: TargetEngine, store: FeatureStore, name: str
) -> RolloutWorker:
    settings = RolloutSettings(
        worker_id=name,
        spec=inputs.spec,
        max_tasks=MAX_LEASES,
        poll_s=30.0,
        target_revision=inputs.target.revision,
    )
    return RolloutWorker(control, engine, store, settings)


def make_trainable(inputs: RunInputs) -> Trainable:
    """A fresh draft: a function of the seed, the target's tables and, where pruned, the training tokens' counts."""
    config, target, algorithm = inputs.config, inputs.target, inputs.algorithm
    device = resolve_device(config.training.device)
    tables = load_target_tables(target.path, resolve_dtype(config.training.dtype, device), device)
    draft = algorithm.build_draft(algorithm.draft_config(target), tables, config.seed, draft_vocabulary(inputs))
    return Trainable(algorithm, draft, tables, make_provenance(inputs))


def make_provenance(inputs: RunInputs) -> Provenance:
    """What this run writes into its checkpoints, and what it wants to find in those that it resumes from."""
    draft_config = inputs.algorithm.draft_config(inputs.target)
    return Provenance(inputs.identity(), draft_config.to_dict(), to_json(inputs.target))


def make_trainer(
    inputs: RunInputs, trainable: Trainable, ledger: Ledger, on_step: Callable[[int, dict[str, float]], None]
) -> Trainer:
    training, pace, plan = inputs.config.training, inputs.pace, inputs.plan
    device = resolve_device(training.device)
    optimizer = OptimizerSettings(
        kind=training.optimizer,
        betas=training.betas,
        weight_decay=training.weight_decay,
        max_grad_norm=pace.max_grad_norm,
    )
    return Trainer(
        trainable,
        MasterOptimizer(dict(trainable.draft.named_parameters()), optimizer, trainable.draft.vocabulary_tables()),
        make_schedule(training, pace, plan.total_steps),
        TrainerSettings(
            total_steps=plan.total_steps,
            checkpoint_every=training.checkpoint_every,
            seed=inputs.config.seed,
            device_type=device.type,
            compute_dtype=resolve_dtype(training.dtype, device),
        ),
        make_checkpointer(inputs.config),
        ledger,
        on_step,
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


def make_checkpointer(config: RunConfig) -> Checkpointer:
    return Checkpointer(config.run_dir / "checkpoints", config.training.keep_last)


def _train_side(
    inputs: RunInputs,
    store: FeatureStore,
    resources: contextlib.ExitStack,
    resume: bool,
    *,
    engine: TargetEngine | None = None,
    served: Served | None = None,
) -> TrainRuntime:
    """Controller, loader and trainer over ``store``; takes ``resources`` over. ``engine``: capture in this thread."""
    config, plan, control = inputs.config, inputs.plan, inputs.config.control_plane
    torch.set_num_threads(config.training.threads)
    config.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    checkpoint = make_checkpointer(config).latest() if resume else None
    position = checkpoint.position if checkpoint else TrainPosition()
    trainable = make_trainable(inputs)
    writer, reader = memory_channel()
    store = with_retention(config, store, resources)
    controller = make_controller(inputs, writer, store)
    resources.callback(controller.close)
    monitor = make_monitor(config, plan, position)
    resources.callback(monitor.close)
    trainer = make_trainer(
        inputs, trainable, controller, StepLog(monitor, controller.summary, config.training.log_every)
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
    controller.resume(
        Position(position.num_slots, position.step, prefix=control.order == "strict"),
        checkpoint.ledger if checkpoint else None,
        served.live_workers if served else (),
    )
    queue = StreamingRefQueue(reader, idle_timeout_s=control.idle_timeout_s)
    refs: RefSource = HandOver(queue)
    if engine is not None:
        worker = make_worker(inputs, controller, engine, store, "inline")
        refs = InlineCapture(worker, writer.in_flight, refs.get)
    loader = FeatureDataLoader(refs, store, loader_settings(inputs, position))
    batches: Iterator[StepBatches[Tensor]] = loader
    if engine is None and config.data_plane.prefetch_steps:
        batches = prefetched(config, loader, controller.finish, resources)
    endpoint = None
    if served is not None:
        server = ControlPlaneServer(controller, served.token, control.host, control.port, listener=served.listener)
        endpoint = server, served.token
    return TrainRuntime(
        trainer,
        controller,
        batches,
        lambda: weights_sha256(trainable.draft.served_state()),
        resources.pop_all(),
        endpoint,
    )


def prefetched(
    config: RunConfig, loader: FeatureDataLoader, unblock: Callable[[], None], resources: contextlib.ExitStack
) -> PrefetchIterator[StepBatches[Tensor]]:
    """The steps of ``loader``, prepared ahead in a thread until ``resources`` close."""
    options = config.data_plane
    prefetch = PrefetchIterator(
        loader, options.prefetch_steps, unblock, size=step_bytes, max_bytes=options.prefetch_bytes
    )
    resources.callback(prefetch.close)
    return prefetch


def make_controller(inputs: RunInputs, writer: RefWriter, store: RetainingFeatureStore) -> DataFlowController:
    config, plan = inputs.config, inputs.plan
    controller, _ = resolve_control_plane(
        Deployment(MODES[plan.ledger], plan.ledger_url or plan.ledger_path, plan.ledger_name),
        SampleOrder(len(inputs.tasks), config.training.num_epochs, config.seed, config.control_plane.shuffle),
        ListedTasks(inputs.tasks),
        writer,
        controller_settings(inputs),
        store,
        store if plan.retain_memory_bytes or plan.retain_file_bytes else None,
    )
    return controller


MODES = {
    "none": DeploymentMode.LOCAL_COLOCATED,
    "memory": DeploymentMode.DATAFLOW_COLOCATED,
    "sqlite": DeploymentMode.DISAGGREGATED,
    "postgres": DeploymentMode.DISAGGREGATED,
}


def controller_settings(inputs: RunInputs) -> ControllerSettings:
    control, plan = inputs.config.control_plane, inputs.plan
    capacity, tolerated = plan.store_capacity_bytes, control.max_quarantined
    return ControllerSettings(
        window_slots=plan.window_slots,
        step_slots=inputs.config.training.global_batch_size,
        max_resident_bytes=None if capacity is None else int(capacity * ARENA_SHARE),
        bytes_per_token=plan.bytes_per_token,
        lease_s=control.lease_s,
        max_attempts=control.max_attempts,
        max_crash_attempts=control.max_crash_attempts,
        max_quarantined=tolerated if isinstance(tolerated, int) else math.floor(tolerated * plan.num_samples),
        low_watermark=control.low_watermark,
        in_order=control.order == "strict",
        release=control.release,
    )


def loader_settings(inputs: RunInputs, position: TrainPosition) -> LoaderSettings:
    training = inputs.config.training
    return LoaderSettings(
        global_batch_size=training.global_batch_size,
        max_tokens=training.micro_batch_tokens,
        device=str(resolve_device(training.device)),
        capture_fingerprint=inputs.spec.fingerprint,
        target_revision=inputs.target.revision,
        start_slot=position.num_slots,
        num_samples=inputs.plan.num_samples,
        in_order=inputs.config.control_plane.order == "strict",
    )


def make_monitor(config: RunConfig, plan: Plan, position: TrainPosition) -> FanoutMonitor:
    return FanoutMonitor(
        [JsonlMonitor(config.run_dir / "metrics.jsonl"), ConsoleMonitor(plan.total_steps, first_step=position.step)]
    )
