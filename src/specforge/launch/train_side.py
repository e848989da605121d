"""The side of a run that trains, on one rank: slots, loader and trainer, and the controller where it leads.

control plane    DataFlowController           the life of every sample, over a MetadataStore
                 ControlPlaneServer/Client    the same protocol between processes
                 memory channel               committed refs -> StreamingRefQueue
data plane       FeatureDataLoader            refs + store -> StepBatches
several ranks    LeaderSource/FollowerSource  the leader's slots, on all of them (in ``sources``)
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from specforge.config.run import RunConfig
from specforge.contracts.batches import StepBatches
from specforge.control_plane.base import CaptureControl
from specforge.control_plane.channel.base import RefWriter
from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.channel.queue import StreamingRefQueue
from specforge.control_plane.client import ControlPlaneClient
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.base import Position
from specforge.control_plane.modes import Deployment, DeploymentMode, resolve_control_plane
from specforge.control_plane.prompts import ListedTasks, SampleOrder
from specforge.control_plane.server import ControlPlaneServer
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.loader import FeatureDataLoader, LoaderSettings, RefSource, step_bytes
from specforge.data_plane.prefetch import PrefetchIterator
from specforge.data_plane.retention import RetainingFeatureStore
from specforge.inference.engine import TargetEngine
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.rollout import RolloutSettings, RolloutWorker
from specforge.launch.engines import load_target, make_evaluation_engine
from specforge.launch.group import worker_name
from specforge.launch.held_out import HeldOutEvaluation
from specforge.launch.inputs import RunInputs, TargetInputs, resolve_device
from specforge.launch.learner import make_checkpointer, make_trainable, make_trainer
from specforge.launch.plan import ARENA_SHARE, Plan
from specforge.launch.runtime import Follower, StepLog, TrainParts, TrainRuntime
from specforge.launch.sources import (
    CaptureWhileLeased,
    FollowerSource,
    HandOver,
    InlineCapture,
    LeaderSource,
    SharedCapture,
)
from specforge.launch.stores import with_retained, with_retention
from specforge.monitor.console import ConsoleMonitor
from specforge.monitor.fanout import FanoutMonitor
from specforge.monitor.jsonl import JsonlMonitor
from specforge.monitor.naming import hyperparameters
from specforge.monitor.trackers import TrackedRun, open_trackers
from specforge.prompts.responses import ResponseOptions
from specforge.training.checkpoint import CheckpointState, TrainPosition, best_state
from specforge.training.ranks import Ranks
from specforge.training.trainer import Surroundings

MAX_LEASES = 8
"""Samples that a rollout worker leases at a time."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a supervisor gives the train process: the socket to serve on, the token, the ids of living workers, and how
    those ended that died with leases of an earlier controller.

    ``listener`` None: the process listens by itself, where the configuration says.
    """

    listener: socket.socket | None
    token: str
    live_workers: frozenset[str] = frozenset()
    crashed: Mapping[str, str] = field(default_factory=dict)


def make_worker(
    inputs: TargetInputs | RunInputs, control: CaptureControl, engine: TargetEngine, store: FeatureStore, name: str
) -> RolloutWorker:
    # Ranks that capture share the work of a step; apart from training, more at a time is less talk.
    share = math.ceil(inputs.config.training.global_batch_size / inputs.config.launch.num_train_ranks)
    together = inputs.config.topology == "colocated" and inputs.config.launch.num_train_ranks > 1
    settings = RolloutSettings(
        worker_id=name,
        spec=inputs.spec,
        max_tasks=min(MAX_LEASES, share) if together else MAX_LEASES,
        poll_s=30.0,
        target_revision=inputs.target.revision,
        responses=ResponseOptions.of_run(inputs.config.data.generate, inputs.config.seed),
        waits_for_servers=inputs.config.target.servers is not None,
    )
    return RolloutWorker(control, engine, store, settings)


def build_train_side(
    inputs: RunInputs,
    store: FeatureStore,
    resources: contextlib.ExitStack,
    resume: bool,
    *,
    engine: TargetEngine | None = None,
    served: Served | None = None,
    ranks: Ranks | None = None,
) -> TrainRuntime:
    """One rank's loader and trainer over ``store``, the leader's with the controller; takes ``resources`` over.

    ``engine``: this process captures too. ``served``: others do.
    """
    config, ranks = inputs.config, ranks or Ranks()
    torch.set_num_threads(config.training.threads)
    config.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    checkpointer = make_checkpointer(config, ranks)
    checkpoint = checkpointer.latest() if resume else None
    position = checkpoint.position if checkpoint else TrainPosition()
    trainable = make_trainable(inputs, ranks)
    leads = _Lead.make(inputs, store, position, resources) if ranks.is_leader else None
    follows = Follower()
    evaluation = None
    if config.held_out.data is not None:
        # In one process with the capture, its target serves both.
        here = engine if isinstance(engine, HFTargetEngine) else None
        evaluation = HeldOutEvaluation(
            inputs,
            trainable,
            ranks,
            lambda: here or load_target(config, inputs.target),
            lambda: here or make_evaluation_engine(config, inputs.target),
        )
    around = Surroundings(
        checkpointer, leads.controller if leads else follows, leads.log if leads else follows, ranks, evaluation
    )
    trainer = make_trainer(inputs, trainable, around)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        trainer.knows_best(best_state(checkpointer.directory))
    if leads:
        leads.resume(checkpoint, served)
        turn = leads.turn(engine, served, ranks, resources)
    else:
        turn = _follow(inputs, with_retained(config, store, resources), engine, ranks, resources)
    loader = FeatureDataLoader(turn.source, turn.store, loader_settings(inputs, position, ranks))
    batches: Iterator[StepBatches[Tensor]] = loader
    close_ranks = turn.close
    if engine is None and config.data_plane.prefetch_steps:
        batches = ahead = prefetched(config, loader, turn.unblock, resources)
        close_ranks = _one_after_the_other(ahead.close, turn.close)
    parts = TrainParts(
        trainer,
        checkpointer,
        trainable.draft,
        leads.controller if leads else follows,
        batches,
        ranks,
        close_ranks,
        turn.endpoint,
        turn.stop_capture,
    )
    return TrainRuntime(parts, resources.pop_all())


@dataclass(frozen=True, slots=True)
class _Turn:
    """How a rank comes to its slots: the source, and the store that has their features.

    ``unblock`` ends a ``get`` that waits; ``close`` comes after the last one, and ends what ranks do together;
    ``stop_capture`` ends the capture of this process.
    """

    source: RefSource
    store: FeatureStore
    unblock: Callable[[], None]
    close: Callable[[], None] = lambda: None
    endpoint: tuple[ControlPlaneServer, str] | None = None
    stop_capture: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class _Lead:
    """The rank that has the controller; a single process leads itself."""

    inputs: RunInputs
    store: RetainingFeatureStore
    controller: DataFlowController
    log: StepLog
    writer: RefWriter
    queue: StreamingRefQueue

    @classmethod
    def make(
        cls, inputs: RunInputs, store: FeatureStore, position: TrainPosition, resources: contextlib.ExitStack
    ) -> Self:
        config = inputs.config
        writer, reader = memory_channel()
        retaining = with_retention(config, store, resources)
        controller = make_controller(inputs, writer, retaining)
        resources.callback(controller.close)
        monitor = make_monitor(config, inputs.plan, position)
        resources.callback(monitor.close)
        log = StepLog(monitor, controller.summary, config.training.log_every)
        queue = StreamingRefQueue(reader, idle_timeout_s=config.control_plane.idle_timeout_s)
        return cls(inputs, retaining, controller, log, writer, queue)

    def resume(self, checkpoint: CheckpointState | None, served: Served | None) -> None:
        """Reconcile the ledger to ``checkpoint``; before the first lease."""
        position = checkpoint.position if checkpoint else TrainPosition()
        self.controller.resume(
            Position(position.num_slots, position.step, prefix=self.inputs.config.control_plane.order == "strict"),
            checkpoint.ledger if checkpoint else None,
            served.live_workers if served else (),
            served.crashed if served else None,
        )

    def turn(
        self, engine: TargetEngine | None, served: Served | None, ranks: Ranks, resources: contextlib.ExitStack
    ) -> _Turn:
        control, take = self.inputs.config.control_plane, HandOver(self.queue).get
        endpoint, stop_capture = None, _nothing
        if served is not None:
            server = ControlPlaneServer(
                self.controller, served.token, control.host, control.port, listener=served.listener
            )
            endpoint = server, served.token
        if ranks.size == 1:
            alone: RefSource = HandOver(self.queue)
            if engine is not None:
                worker = make_worker(self.inputs, self.controller, engine, self.store, "inline")
                alone = InlineCapture(worker, self.writer.in_flight, take)
                stop_capture = alone.stop
            return _Turn(alone, self.store, self.controller.finish, endpoint=endpoint, stop_capture=stop_capture)
        source: RefSource = HandOver(self.queue)
        if engine is not None:
            assert endpoint is not None
            _tell_endpoint(endpoint, ranks, resources)
            source = SharedCapture(
                lambda control: make_worker(self.inputs, control, engine, self.store, worker_name(ranks.rank)),
                self.controller,
                self.writer.in_flight,
                take,
            )
            stop_capture = source.stop
        everywhere = LeaderSource(source, ranks.stream, asks=engine is not None)
        close = _one_after_the_other(everywhere.close, ranks.main.wait)
        return _Turn(everywhere, self.store, self.controller.finish, close, endpoint, stop_capture)


def _follow(
    inputs: RunInputs,
    store: FeatureStore,
    engine: TargetEngine | None,
    ranks: Ranks,
    resources: contextlib.ExitStack,
) -> _Turn:
    """A rank that takes its slots from the leader and, with an ``engine``, captures for it."""
    capture, stop_capture = _nothing, _nothing
    if engine is not None:
        url, token = json.loads(ranks.main.broadcast(b""))
        client = ControlPlaneClient(url, token, reconnect_s=inputs.config.control_plane.reconnect_s)
        resources.callback(client.close)
        capture = CaptureWhileLeased(
            lambda control: make_worker(inputs, control, engine, store, worker_name(ranks.rank)), client
        )
        stop_capture = capture.stop
    source = FollowerSource(ranks.stream, capture)
    close = _one_after_the_other(source.close, ranks.main.wait)
    return _Turn(source, store, source.cancel, close, stop_capture=stop_capture)


def _tell_endpoint(endpoint: tuple[ControlPlaneServer, str], ranks: Ranks, resources: contextlib.ExitStack) -> None:
    """Start the server and say where it is to the followers, who capture. The token goes nowhere else."""
    server, token = endpoint
    server.start()
    resources.callback(server.stop)
    ranks.main.broadcast(json.dumps([server.url, token]).encode())


def _nothing() -> None:
    """To do."""


def _one_after_the_other(*steps: Callable[[], None]) -> Callable[[], None]:
    def work() -> None:
        for step in steps:
            step()

    return work


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
    # Ranks that capture and train lose by capturing ahead: all wait in the next step for the one that does.
    ahead = inputs.config.topology == "disaggregated" or inputs.config.launch.num_train_ranks == 1
    return ControllerSettings(
        window_slots=plan.window_slots if ahead else inputs.config.training.global_batch_size,
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
        responses=_made_by(inputs),
    )


def _made_by(inputs: RunInputs) -> str:
    """Everything that the responses of a run depend on besides its prompts; empty where there are none."""
    if inputs.written_by is None:
        return ""
    return json.dumps({**inputs.written_by, "target_revision": inputs.target.revision}, sort_keys=True)


def loader_settings(inputs: RunInputs, position: TrainPosition, ranks: Ranks | None = None) -> LoaderSettings:
    training, ranks = inputs.config.training, ranks or Ranks()
    return LoaderSettings(
        global_batch_size=training.global_batch_size,
        max_tokens=training.micro_batch_tokens,
        device=str(resolve_device(training.device)),
        capture_fingerprint=inputs.spec.fingerprint,
        target_revision=inputs.target.revision,
        start_slot=position.num_slots,
        num_samples=inputs.plan.num_samples,
        rank=ranks.data_rank,
        world_size=ranks.data_size,
        in_order=inputs.config.control_plane.order == "strict",
    )


def make_monitor(config: RunConfig, plan: Plan, position: TrainPosition) -> FanoutMonitor:
    """The log and the terminal, and the trackers of the configuration, which never end a run that trains."""
    tracked = TrackedRun(config.run_dir, position.step, hyperparameters(config.model_dump(mode="json")))
    # first, because they alone can be refused
    trackers = open_trackers(config.monitor.trackers, tracked)
    log = JsonlMonitor(config.run_dir / "metrics.jsonl")
    return FanoutMonitor([log, *trackers, ConsoleMonitor(plan.total_steps, first_step=position.step)])
