"""RunConfig -> Plan: what would run, where, and what it costs. Pure; imports no tensor library."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from specforge.config.run import RunConfig
from specforge.contracts.capture import FLOAT8, CaptureSpec, TargetInfo
from specforge.contracts.features import ITEM_BYTES
from specforge.errors import ConfigError
from specforge.launch.mooncake import warnings

ARENA_SHARE = 0.75
"""A shared-memory arena never refuses a put while at most this share of it is live."""
OBJECT_OVERHEAD = 1024
"""Bytes that a sample takes beyond its features, at most."""
MAX_SAMPLE_SHARE = 1 / 64
"""No sample may be larger than this share of an arena."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the prompts are: counts and lengths in tokens."""

    num_samples: int
    num_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes of the two models: bytes of the target's weights as it computes, parameters of the draft."""

    target_bytes: int
    draft_parameters: int


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process of the run.

    ``memory_bytes``: weights, gradients, optimizer, frozen tables and features that the process holds. Of several train
    ranks each has whole weights and gradients during a step, and its share of all else. Activations and the runtime
    itself (some hundred MB) come on top.
    """

    name: str
    roles: tuple[str, ...]
    device: str
    threads: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before a run starts. Bytes are bytes; ``bytes_per_token`` counts features.

    ``store_capacity_bytes`` is the size of each arena, or of the managed Mooncake Store: every one can hold all
    features that are resident at a time. ``transfer_bytes``: the registered buffer of each process that uses Mooncake.
    ``retain_memory_bytes`` and ``retain_file_bytes`` is what may wait for a later epoch. ``window_bytes`` are
    the features of the window at most; ``resident_bytes`` those that each release policy keeps at most.
    ``num_train_ranks`` processes train; ``ranks_a_copy`` of them hold one copy of the training state together,
    ``ranks_a_sample`` have the same samples, and each has ``step_samples`` of an optimizer step at most.
    ``servers``: the capture servers that the run file names; those of a file come on top.
    ``ledger_path`` is of SQLite, ``ledger_url`` and ``ledger_name`` (the schema) are of PostgreSQL.
    """

    topology: str
    num_train_ranks: int
    ranks_a_copy: int
    ranks_a_sample: int
    step_samples: int
    processes: tuple[ProcessPlan, ...]
    store: str
    store_capacity_bytes: int | None
    transfer_bytes: int | None
    retain_memory_bytes: int
    retain_file_bytes: int
    servers: tuple[str, ...]
    warnings: tuple[str, ...]
    ledger: str
    ledger_path: Path | None
    ledger_url: str | None
    ledger_name: str | None
    order: str
    release: str
    channel: str
    aux_layers: tuple[int, ...]
    capture_dtype: str
    bytes_per_token: int
    max_sample_bytes: int
    window_slots: int
    window_bytes: int
    resident_bytes: dict[str, int]
    target_bytes: int
    draft_parameters: int
    num_samples: int
    total_slots: int
    total_steps: int
    total_feature_bytes: int
    run_dir: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ledger_path": None if self.ledger_path is None else str(self.ledger_path)}


def make_plan(config: RunConfig, target: TargetInfo, spec: CaptureSpec, data: DataFacts, models: ModelFacts) -> Plan:
    """Resolve every automatic choice; a run that cannot work is a ConfigError with the number that would do."""
    per_token = bytes_per_token(target, spec)
    max_sample = sample_bytes(target, spec, data.max_tokens)
    window_slots = config.control_plane.window_steps * config.training.global_batch_size
    _check_window(config)
    total_slots = data.num_samples * config.training.num_epochs
    total_steps = math.ceil(total_slots / config.training.global_batch_size)
    if config.training.max_steps is not None:
        total_steps = min(total_steps, config.training.max_steps)
    kind = store_kind(config)
    capacity = store_capacity(config, max_sample)
    transfer = transfer_bytes(config, max_sample, per_token) if kind == "mooncake" else 0
    in_memory, in_files = retained_bytes(config, per_token * data.num_tokens + data.num_samples * OBJECT_OVERHEAD)
    resident_bytes = {policy: num * max_sample for policy, num in resident_samples(config).items()}
    # What a process that captures holds of the features.
    held = {
        "local": resident_bytes[config.control_plane.release],
        "shared_memory": 0 if servers_write(config) else capacity or 0,
        "shared_dir": 0,
        "mooncake": transfer if config.topology == "disaggregated" else 0,
    }
    ledger = ledger_kind(config)
    return Plan(
        topology=config.topology,
        num_train_ranks=config.launch.num_train_ranks,
        ranks_a_copy=ranks_a_copy(config),
        ranks_a_sample=config.training.sequence_parallel,
        step_samples=step_samples(config),
        processes=(
            *_processes(config, models, train_bytes(config, target, spec, models) + in_memory + transfer, held[kind]),
            *_services(kind, capacity),
        ),
        store=kind,
        store_capacity_bytes=capacity,
        transfer_bytes=transfer or None,
        retain_memory_bytes=in_memory,
        retain_file_bytes=in_files,
        servers=server_urls(config),
        warnings=(
            *idle_ranks(config),
            *(warnings(config.data_plane.mooncake) if kind == "mooncake" else ()),
            *far_servers(config, kind),
        ),
        ledger=ledger,
        ledger_path=ledger_path(config) if ledger == "sqlite" else None,
        **ledger_place(config),
        order=config.control_plane.order,
        release=config.control_plane.release,
        channel="memory",
        aux_layers=spec.aux_layers,
        capture_dtype=spec.dtype,
        bytes_per_token=per_token,
        max_sample_bytes=max_sample,
        window_slots=window_slots,
        window_bytes=window_slots * max_sample,
        resident_bytes=resident_bytes,
        target_bytes=captured_by(config, models),
        draft_parameters=models.draft_parameters,
        num_samples=data.num_samples,
        total_slots=total_slots,
        total_steps=total_steps,
        total_feature_bytes=per_token * data.num_tokens * config.training.num_epochs,
        run_dir=str(config.run_dir),
    )


def bytes_per_token(target: TargetInfo, spec: CaptureSpec) -> int:
    """Feature bytes of one token: auxiliary layers, last hidden state, their scales, and the int32 token id."""
    widths = spec.widths(target.hidden_size)
    return ITEM_BYTES["int32"] + sum(width * ITEM_BYTES[dtype] for _, dtype, width in widths)


def sample_bytes(target: TargetInfo, spec: CaptureSpec, num_tokens: int) -> int:
    """Bytes of one sample's buffer: each feature padded to the alignment."""
    return spec.layout(target.hidden_size, num_tokens)[1]


def batch_bytes(target: TargetInfo, spec: CaptureSpec) -> int:
    """Bytes of one token in a packed batch: features (float8 as bfloat16), ids, position and document int64, a mask."""
    item = ITEM_BYTES["bfloat16" if spec.dtype == FLOAT8 else spec.dtype]
    width = (len(spec.aux_layers) + int(spec.last_hidden)) * target.hidden_size
    return item * width + 3 * ITEM_BYTES["int64"] + ITEM_BYTES["bool"]


def resident_samples(config: RunConfig) -> dict[str, int]:
    """Release policy -> samples whose features are kept at most: the window, and what waits for a checkpoint."""
    batch = config.training.global_batch_size
    window = config.control_plane.window_steps * batch
    return {"at_step": window, "at_checkpoint": window + config.training.checkpoint_every * batch}


def max_resident_samples(config: RunConfig) -> int:
    """``resident_samples`` of the policy that the run has."""
    return resident_samples(config)[config.control_plane.release]


def store_capacity(config: RunConfig, max_sample: int) -> int | None:
    """Bytes of each arena, or of a managed Mooncake Store: as configured, or the smallest that always holds what is
    kept. ``None`` of a store without a size of its own.

    Refuses one in which that could not always be resident. Any worker may come to hold all of it.
    """
    kind, store, mooncake = store_kind(config), config.data_plane.store, config.data_plane.mooncake
    if kind not in {"shared_memory", "mooncake"} or (kind == "mooncake" and not mooncake.managed):
        return None
    resident_bytes = max_resident_samples(config) * max_sample
    window_bytes = resident_samples(config)["at_step"] * max_sample
    # What waits for a checkpoint must not keep capture paused, hence a share of it below the low watermark.
    waiting_bytes = (resident_bytes - window_bytes) / config.control_plane.low_watermark
    needed = default_capacity(window_bytes + math.ceil(waiting_bytes), max_sample)
    if store.kind == "shared_memory":
        name, capacity = "data_plane.store.capacity_bytes", store.capacity_bytes
    elif kind == "mooncake" and mooncake.capacity_bytes is not None:
        name, capacity = "data_plane.mooncake.capacity_bytes", mooncake.capacity_bytes
    else:
        return needed
    if max_sample > capacity * MAX_SAMPLE_SHARE or resident_bytes > capacity * ARENA_SHARE:
        raise ConfigError(
            f"{name} is {capacity:,}, but with control_plane.release = "
            f"{config.control_plane.release} the samples kept may take {resident_bytes:,} bytes and one sample "
            f"{max_sample:,}: set it to {needed:,} or more, or lower control_plane.window_steps, "
            f"{_to_lower(config)}training.global_batch_size or data.max_length"
        )
    return capacity


def transfer_bytes(config: RunConfig, max_sample: int, per_token: int) -> int:
    """Bytes of a process's registered buffer: as configured, or room for two micro-batches and two samples.

    Refuses one that does not hold a micro-batch.
    """
    # Of each sample of a micro-batch: the alignment of its features and the header of its object.
    overhead = config.training.global_batch_size * OBJECT_OVERHEAD
    micro_batch = max(max_sample, config.training.micro_batch_tokens * per_token) + overhead
    given = config.data_plane.mooncake.buffer_bytes
    if given is None:
        return math.ceil((2 * micro_batch + 2 * max_sample) / 2**20 + 1) * 2**20
    if given < micro_batch + max_sample:
        raise ConfigError(
            f"data_plane.mooncake.buffer_bytes is {given:,}, but a micro-batch and a sample take "
            f"{micro_batch + max_sample:,}: raise it, or lower training.micro_batch_tokens or data.max_length"
        )
    return given


def retained_bytes(config: RunConfig, total_bytes: int) -> tuple[int, int]:
    """What may be kept for later epochs, in memory and in files, of the ``total_bytes`` of all samples."""
    if config.training.num_epochs == 1:
        return 0, 0
    options = config.data_plane
    kept = min(options.retain_bytes, total_bytes)
    in_memory = min(kept, retain_memory_bytes(config))
    return in_memory, kept - in_memory


def retain_memory_bytes(config: RunConfig) -> int:
    """How much may be kept for later epochs in memory: none where several ranks read it, which do so from files."""
    return 0 if config.launch.num_train_ranks > 1 else config.data_plane.retain_memory_bytes


def default_capacity(resident_bytes: int, max_sample: int) -> int:
    """The smallest arena, in whole MiB and at least 64 MiB, that always holds ``resident_bytes``."""
    needed = max(resident_bytes / ARENA_SHARE, max_sample / MAX_SAMPLE_SHARE)
    return max(64, math.ceil(needed / 2**20)) * 2**20


def store_kind(config: RunConfig) -> str:
    """``local``, ``shared_memory``, ``shared_dir`` or ``mooncake``."""
    kind, num_ranks = config.data_plane.store.kind, config.launch.num_train_ranks
    several = config.topology == "disaggregated" or num_ranks > 1
    if kind == "local" and several:
        whose = f"{num_ranks} train ranks" if num_ranks > 1 else "capture and training apart"
        raise ConfigError(
            f"data_plane.store.kind is local, which one process only can read, but this run has {whose}: "
            "use auto, shared_memory, shared_dir or mooncake"
        )
    if kind == "auto":
        return "shared_memory" if several else "local"
    return kind


def ledger_kind(config: RunConfig) -> str:
    """``none``, ``memory``, ``sqlite`` or ``postgres``."""
    kind, disaggregated = config.control_plane.ledger.kind, config.topology == "disaggregated"
    if kind == "auto":
        # What the target answered has to outlive the process.
        return "sqlite" if disaggregated or config.data.generate is not None else "none"
    return kind


def capture_names(config: RunConfig) -> list[str]:
    """The capture processes of a disaggregated run."""
    if config.topology != "disaggregated":
        return []
    return [f"capture-{number}" for number in range(config.launch.num_capture_workers)]


def rank_names(config: RunConfig) -> list[str]:
    """The train ranks, the leader first."""
    return ["train", *(f"train-{rank}" for rank in range(1, config.launch.num_train_ranks))]


def writer_names(config: RunConfig) -> list[str]:
    """The processes that write features: each has an arena where the store is in shared memory."""
    if servers_write(config):
        return list(server_urls(config)) or ["server"]
    return capture_names(config) or rank_names(config)


def servers_write(config: RunConfig) -> bool:
    """Whether capture servers put features into the store of the run, not a process of the run."""
    servers = config.target.servers
    return servers is not None and servers.transport == "store" and config.topology == "disaggregated"


def server_urls(config: RunConfig) -> tuple[str, ...]:
    return () if config.target.servers is None else config.target.servers.urls


def far_servers(config: RunConfig, kind: str) -> tuple[str, ...]:
    """A warning where servers seem to be on another host than their store."""
    if kind != "shared_memory" or not servers_write(config):
        return ()
    hosts = {urlsplit(url).hostname or "" for url in server_urls(config)}
    far = sorted(hosts - {"localhost", "127.0.0.1", "::1"})
    if not far:
        return ()
    warning = (
        f"features go into shared memory, so the capture servers at {', '.join(far)} must be processes of this host "
        "and of this user; for other hosts use data_plane.store.kind=mooncake or shared_dir, or "
        "target.servers.transport=inline"
    )
    return (warning,)


def run_id(config: RunConfig) -> str:
    """Short name of a run, a function of its directory: names its shared memory and its database schema."""
    return hashlib.sha256(str(config.run_dir.resolve()).encode()).hexdigest()[:12]


def shared_dir(config: RunConfig) -> Path:
    """The directory of a shared_dir store; the run has one of its own in it."""
    store = config.data_plane.store
    return (store.path if store.kind == "shared_dir" else None) or config.run_dir / "features"


def retain_dir(config: RunConfig) -> Path:
    """The directory of features that wait for a later epoch in files."""
    return config.data_plane.retain_dir or config.run_dir / "retained"


def ledger_path(config: RunConfig) -> Path:
    """The database file of a run with a SQLite ledger."""
    ledger = config.control_plane.ledger
    return (ledger.path if ledger.kind == "sqlite" else None) or config.run_dir / "ledger.sqlite"


def ranks_a_copy(config: RunConfig) -> int:
    """How many train ranks hold one copy of weights, gradients and optimizer state together."""
    training, num_ranks = config.training, config.launch.num_train_ranks
    if training.sharding != "hybrid":
        return num_ranks if training.sharding == "shard" else 1
    size = training.shard_size or 1
    if num_ranks % size:
        raise ConfigError(
            f"training.sharding is hybrid with training.shard_size = {size}, but there are {num_ranks} train ranks: "
            "set shard_size to a divisor of them, or sharding to shard or replicate"
        )
    return size


def data_ranks(config: RunConfig) -> int:
    """How many shares the samples of a step have: those of one share go to ``training.sequence_parallel`` ranks."""
    num_ranks, together = config.launch.num_train_ranks, config.training.sequence_parallel
    if num_ranks % together:
        raise ConfigError(
            f"training.sequence_parallel is {together}, which does not divide the {num_ranks} train ranks "
            "(launch.num_train_ranks); choose a divisor, or another number of ranks"
        )
    return num_ranks // together


def step_samples(config: RunConfig) -> int:
    """Samples of an optimizer step that one rank trains, at most."""
    return math.ceil(config.training.global_batch_size / data_ranks(config))


def idle_ranks(config: RunConfig) -> tuple[str, ...]:
    """A warning where some ranks would never have a sample."""
    batch, shares = config.training.global_batch_size, data_ranks(config)
    if batch >= shares:
        return ()
    found = f"training.global_batch_size is {batch}, for {shares} ranks that train different samples"
    return (f"{found}: {shares - batch} of them would have none in any step",)


def train_bytes(config: RunConfig, target: TargetInfo, spec: CaptureSpec, models: ModelFacts) -> int:
    """Of one rank: draft weights, gradients and both moments in fp32, the target's two tables, and the batches in hand
    and ahead.

    Several ranks hold shards of the first three, and during a step whole weights and gradients beside them. The step
    in hand is whole. Prefetching starts another one only while what is ahead is below its bound in bytes.
    """
    draft = ITEM_BYTES["float32"] * models.draft_parameters
    whole = 2 * draft if config.launch.num_train_ranks > 1 else 0
    tables = 2 * target.vocab_size * target.hidden_size * ITEM_BYTES["float32"]
    step = step_samples(config) * config.data.max_length * batch_bytes(target, spec)
    options = config.data_plane
    ahead = min(options.prefetch_steps * step, options.prefetch_bytes + step)
    return whole + math.ceil(4 * draft / ranks_a_copy(config)) + tables + step + ahead


def _check_window(config: RunConfig) -> None:
    needed_steps = 2 + config.data_plane.prefetch_steps
    if config.control_plane.window_steps < needed_steps:
        raise ConfigError(
            f"control_plane.window_steps is {config.control_plane.window_steps}, but with data_plane.prefetch_steps = "
            f"{config.data_plane.prefetch_steps} the trainer waits for itself: set it to {needed_steps} or more"
        )


def _to_lower(config: RunConfig) -> str:
    return "training.checkpoint_every, " if config.control_plane.release == "at_checkpoint" else ""


def ledger_place(config: RunConfig) -> dict[str, str | None]:
    """``ledger_url`` and ``ledger_name`` (the schema) of a run with a ledger in PostgreSQL; ``None`` of any other."""
    ledger = config.control_plane.ledger
    if ledger.kind != "postgres":
        return {"ledger_url": None, "ledger_name": None}
    return {"ledger_url": ledger.url, "ledger_name": ledger.name or f"specforge_{run_id(config)}"}


def captured_by(config: RunConfig, models: ModelFacts) -> int:
    """Bytes of the target in a process that captures; features that were captured earlier, or by servers, need none."""
    return 0 if config.data.features is not None or config.target.servers is not None else models.target_bytes


def _services(kind: str, capacity: int | None) -> tuple[ProcessPlan, ...]:
    """Processes of a managed Mooncake Store; ``capacity`` None: it is not managed."""
    if kind != "mooncake" or capacity is None:
        return ()
    return (
        ProcessPlan("mooncake-master", ("metadata of the store",), "cpu", 1, 0),
        ProcessPlan("mooncake-client", ("features",), "cpu", 1, capacity),
    )


def _processes(
    config: RunConfig, models: ModelFacts, num_train_bytes: int, num_store_bytes: int
) -> tuple[ProcessPlan, ...]:
    threads, device = config.training.threads, config.training.device
    num_capture_bytes = captured_by(config, models) + num_store_bytes
    names = rank_names(config)
    # The leader decodes evaluation prompts with a target that it has for the capture, or for this alone.
    decodes = config.held_out.data is not None and config.held_out.speculative_every > 0
    has_target = config.topology == "colocated" and captured_by(config, models) > 0
    num_decoding_bytes = models.target_bytes if decodes and not has_target else 0
    if config.topology == "colocated" and len(names) == 1:
        roles = ("capture", "controller", "train")
        held = num_train_bytes + num_capture_bytes + num_decoding_bytes
        return (ProcessPlan("specforge", roles, device, threads, held),)
    captures = ("capture",) if config.topology == "colocated" else ()
    held = num_train_bytes + (num_capture_bytes if captures else 0)
    devices = [f"cuda:{rank}" if device == "cuda" and len(names) > 1 else device for rank in range(len(names))]
    leads = ("controller", "control-plane server")
    return (
        *(
            ProcessPlan(name, (*captures, *leads, "train"), at, threads, held + num_decoding_bytes)
            if name == names[0]
            else ProcessPlan(name, (*captures, "train"), at, threads, held)
            for name, at in zip(names, devices, strict=True)
        ),
        *(
            ProcessPlan(name, ("capture",), config.target.device, threads, num_capture_bytes)
            for name in capture_names(config)
        ),
    )
