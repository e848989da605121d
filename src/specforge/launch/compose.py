"""The composition root: what runs where. ``train_side``, ``stores``, ``engines`` and ``learner`` name classes too.

    prompts          load_prompt_tasks            JSONL -> PromptTask (in ``inputs``)
    control plane    DataFlowController           the life of every sample (in ``train_side``)
    data plane       the feature stores           in ``stores``
                     FeatureDataLoader            refs + store -> StepBatches (in ``train_side``)
    capture          HFTargetEngine, RolloutWorker
                     ServedRollout                the same over live servers (in ``served_capture``)
                     OfflineManifestReader        the same over features that were captured earlier (in ``engines``)
    training         Trainer, MasterOptimizer, Checkpointer (in ``learner``)

Builders, one a topology: ``build_online_runtime`` (one process), ``build_online_rank`` (one of several that capture and
train together) and ``build_online_ranks_runtime`` (all of them, as children of this one),
``build_disagg_online_consumer`` and ``build_disagg_online_producer`` (the two kinds of process),
``build_disagg_online_runtime`` (all of them, as children) and ``run_disagg_online_interleaved`` (both halves of the
disaggregated path in this process, alternating).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from specforge.config.load import dump_run_config
from specforge.config.run import RunConfig
from specforge.control_plane.client import ControlPlaneClient
from specforge.control_plane.config import Ledger as LedgerConfig
from specforge.control_plane.config import MemoryLedger, NoLedger, PostgresLedger, SqliteLedger
from specforge.data_plane.config import LocalStore, SharedMemoryStore
from specforge.errors import ConfigError
from specforge.inference.rollout import RolloutWorker
from specforge.launch.child import ChildSpec
from specforge.launch.endpoint import Endpoint
from specforge.launch.engines import open_engine
from specforge.launch.host import ROLES, HostExecutor
from specforge.launch.inputs import RESOLVED_FILE, read_run_inputs, read_target_inputs
from specforge.launch.learner import make_provenance
from specforge.launch.offline import verify_features
from specforge.launch.plan import Plan, capture_names, idle_ranks, rank_names
from specforge.launch.runtime import CaptureRuntime, HostRuntime, TrainOutcome, TrainRuntime
from specforge.launch.served_capture import build_served_capture
from specforge.launch.servers import close_sinks
from specforge.launch.stores import clear_at_the_end, make_room, open_reader, open_writer, start_service, with_namespace
from specforge.launch.train_side import Served, build_train_side, make_worker
from specforge.training.checkpoint import list_checkpoints, newest_state
from specforge.training.ranks import Ranks
from specforge.training.trainer import check_same_run

_LOG = logging.getLogger(__name__)


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
        engine = open_engine(inputs.config, inputs.target, resources)
        runtime = build_train_side(inputs, store, resources, resume, engine=engine)
    return runtime


def build_online_rank(
    config: RunConfig, ranks: Ranks, *, resume: bool = False, served: Served | None = None
) -> TrainRuntime:
    """One of several processes that capture and train together. ``config`` is resolved and this rank's own."""
    inputs = read_run_inputs(config)
    with contextlib.ExitStack() as resources:
        if ranks.is_leader:
            # Of the processes that were here before no one lives: what they left is in nobody's ledger.
            make_room(config, inputs.plan, resume)
        ranks.main.wait()
        store = open_writer(config)
        resources.callback(store.close)
        engine = open_engine(config, inputs.target, resources)
        served = served or Served(None, secrets.token_urlsafe(32))
        runtime = build_train_side(inputs, store, resources, resume, engine=engine, served=served, ranks=ranks)
    return runtime


def build_online_ranks_runtime(
    config: RunConfig, *, resume: bool = False, keep_open: tuple[int, ...] = (), command: Sequence[str] = ROLES
) -> HostRuntime:
    """Several processes that capture and train together, as children of this one."""
    return _children(config, resume, keep_open, command)


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
    config: RunConfig, *, resume: bool = False, served: Served | None = None, ranks: Ranks | None = None
) -> TrainRuntime:
    """A train process, of which the first has ledger, controller and its server. ``serve()`` gives the endpoint."""
    inputs = read_run_inputs(config)
    with contextlib.ExitStack() as resources:
        store = open_reader(config)
        resources.callback(store.close)
        served = served or Served(None, secrets.token_urlsafe(32))
        runtime = build_train_side(inputs, store, resources, resume, served=served, ranks=ranks or Ranks())
    return runtime


def build_disagg_online_producer(config: RunConfig, *, worker_id: str) -> CaptureRuntime:
    """The capture process: store, rollout worker, and the target or the servers that have it.

    ``config`` is resolved: it names the store's size.
    """
    inputs = read_target_inputs(config)
    if config.target.servers is not None:
        return build_served_capture(inputs, worker_id)
    with contextlib.ExitStack() as resources:
        store = open_writer(config)
        resources.callback(store.close)
        engine = open_engine(config, inputs.target, resources)

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
    return _children(config, resume, keep_open, command)


def run_disagg_online_interleaved(config: RunConfig, *, resume: bool = False) -> TrainOutcome:
    """Both halves of the disaggregated path in this process, alternating: its ledger and its arena, no network."""
    return build_online_runtime(config, resume=resume).run()


def _children(config: RunConfig, resume: bool, keep_open: tuple[int, ...], command: Sequence[str]) -> HostRuntime:
    """The train ranks of a run and its capture processes."""
    inputs = read_run_inputs(config)
    verify_features(config, inputs.tasks)
    for warning in idle_ranks(config):
        _LOG.warning("%s", warning)
    newest = newest_state(config.run_dir / "checkpoints") if resume else None
    if newest is not None:
        check_same_run(newest.path, newest.provenance, make_provenance(inputs))
    with contextlib.ExitStack() as resources:
        endpoint = Endpoint.open(config.control_plane.host, config.control_plane.port)
        resources.callback(endpoint.close)
        executor = HostExecutor(endpoint, config.launch.restarts, command, last_step=lambda: _last_step(config))
        resolved = resolve(config, inputs.plan, resources, executor.fail)
        if not resume:
            close_sinks(resolved)
        make_room(resolved, inputs.plan, resume)
        resources.callback(clear_at_the_end, resolved)
        resources.callback(close_sinks, resolved)
        config_file = config.run_dir / RESOLVED_FILE
        dump_run_config(resolved, config_file)
        logs = config.run_dir / "logs"
        leader, *followers = rank_names(config)
        children = [ChildSpec(leader, "train", config_file, log_file=None, resume=resume, keep_open=keep_open)]
        children += [
            ChildSpec(name, "train", config_file, log_file=logs / f"{name}.log", resume=resume, keep_open=keep_open)
            for name in followers
        ]
        children += [
            ChildSpec(name, "capture", config_file, log_file=logs / f"{name}.log", keep_open=keep_open)
            for name in capture_names(config)
        ]
        runtime = HostRuntime(executor, children, resources.pop_all())
    return runtime


def _last_step(config: RunConfig) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    found = list_checkpoints(config.run_dir / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


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
