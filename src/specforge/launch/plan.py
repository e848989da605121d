"""RunConfig -> Plan: what would run, where, and what it costs. Pure; imports no tensor library."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specforge.config.run import RunConfig
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.features import ITEM_BYTES, aligned
from specforge.errors import ConfigError

ARENA_SHARE = 0.75
"""A shared-memory arena never refuses a put while at most this share of it is live."""
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

    ``memory_bytes``: weights, gradients, optimizer, frozen tables and features that the process holds. Activations and
    the runtime itself (some hundred MB) come on top.
    """

    name: str
    roles: tuple[str, ...]
    device: str
    threads: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before a run starts. Bytes are bytes; ``bytes_per_token`` counts features.

    ``store_capacity_bytes`` is the size of each arena: every one can hold all features of the run. ``window_bytes`` are
    the features of the window at most; ``resident_bytes`` those that each release policy keeps at most.
    ``ledger_path`` is of SQLite, ``ledger_url`` and ``ledger_name`` (the schema) are of PostgreSQL.
    """

    topology: str
    processes: tuple[ProcessPlan, ...]
    store: str
    store_capacity_bytes: int | None
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
    capacity = arena_capacity(config, max_sample) if kind == "shared_memory" else None
    resident_bytes = {policy: num * max_sample for policy, num in resident_samples(config).items()}
    held_bytes = capacity or resident_bytes[config.control_plane.release]
    ledger = ledger_kind(config)
    return Plan(
        topology=config.topology,
        processes=_processes(config, models, train_bytes(config, target, per_token, models), held_bytes),
        store=kind,
        store_capacity_bytes=capacity,
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
        target_bytes=models.target_bytes,
        draft_parameters=models.draft_parameters,
        num_samples=data.num_samples,
        total_slots=total_slots,
        total_steps=total_steps,
        total_feature_bytes=per_token * data.num_tokens * config.training.num_epochs,
        run_dir=str(config.run_dir),
    )


def bytes_per_token(target: TargetInfo, spec: CaptureSpec) -> int:
    """Feature bytes of one token: auxiliary layers, last hidden state, and the int32 token id."""
    width = (len(spec.aux_layers) + int(spec.last_hidden)) * target.hidden_size
    return width * ITEM_BYTES[spec.dtype] + ITEM_BYTES["int32"]


def sample_bytes(target: TargetInfo, spec: CaptureSpec, num_tokens: int) -> int:
    """Bytes of one sample's buffer: each feature padded to the alignment."""
    item = ITEM_BYTES[spec.dtype] * target.hidden_size * num_tokens
    return (
        aligned(ITEM_BYTES["int32"] * num_tokens)
        + (aligned(item * len(spec.aux_layers)) if spec.aux_layers else 0)
        + (aligned(item) if spec.last_hidden else 0)
    )


def resident_samples(config: RunConfig) -> dict[str, int]:
    """Release policy -> samples whose features are kept at most: the window, and what waits for a checkpoint."""
    batch = config.training.global_batch_size
    window = config.control_plane.window_steps * batch
    return {"at_step": window, "at_checkpoint": window + config.training.checkpoint_every * batch}


def max_resident_samples(config: RunConfig) -> int:
    """``resident_samples`` of the policy that the run has."""
    return resident_samples(config)[config.control_plane.release]


def arena_capacity(config: RunConfig, max_sample: int) -> int:
    """Bytes of one arena: as configured, or the smallest that always holds what is kept.

    Refuses an arena in which that could not always be resident. Any worker may come to hold all of it.
    """
    resident_bytes = max_resident_samples(config) * max_sample
    window_bytes = resident_samples(config)["at_step"] * max_sample
    # What waits for a checkpoint must not keep capture paused, hence a share of it below the low watermark.
    waiting_bytes = (resident_bytes - window_bytes) / config.control_plane.low_watermark
    needed = default_capacity(window_bytes + math.ceil(waiting_bytes), max_sample)
    store = config.data_plane.store
    if store.kind != "shared_memory":
        return needed
    capacity = store.capacity_bytes
    if max_sample > capacity * MAX_SAMPLE_SHARE or resident_bytes > capacity * ARENA_SHARE:
        raise ConfigError(
            f"data_plane.store.capacity_bytes is {capacity:,}, but with control_plane.release = "
            f"{config.control_plane.release} the samples kept may take {resident_bytes:,} bytes and one sample "
            f"{max_sample:,}: set it to {needed:,} or more, or lower control_plane.window_steps, "
            f"{_to_lower(config)}training.global_batch_size or data.max_length"
        )
    return capacity


def default_capacity(resident_bytes: int, max_sample: int) -> int:
    """The smallest arena, in whole MiB and at least 64 MiB, that always holds ``resident_bytes``."""
    needed = max(resident_bytes / ARENA_SHARE, max_sample / MAX_SAMPLE_SHARE)
    return max(64, math.ceil(needed / 2**20)) * 2**20


def store_kind(config: RunConfig) -> str:
    """``local`` or ``shared_memory``."""
    kind, disaggregated = config.data_plane.store.kind, config.topology == "disaggregated"
    if kind == "local" and disaggregated:
        raise ConfigError("data_plane.store.kind is local, which one process only can read: use shared_memory")
    if kind == "auto":
        return "shared_memory" if disaggregated else "local"
    return kind


def ledger_kind(config: RunConfig) -> str:
    """``none``, ``memory``, ``sqlite`` or ``postgres``."""
    kind, disaggregated = config.control_plane.ledger.kind, config.topology == "disaggregated"
    if kind == "auto":
        return "sqlite" if disaggregated else "none"
    return kind


def capture_names(config: RunConfig) -> list[str]:
    """The capture processes of a disaggregated run."""
    return [f"capture-{number}" for number in range(config.launch.num_capture_workers)]


def run_id(config: RunConfig) -> str:
    """Short name of a run, a function of its directory: names its shared memory and its database schema."""
    return hashlib.sha256(str(config.run_dir.resolve()).encode()).hexdigest()[:12]


def ledger_path(config: RunConfig) -> Path:
    """The database file of a run with a SQLite ledger."""
    ledger = config.control_plane.ledger
    return (ledger.path if ledger.kind == "sqlite" else None) or config.run_dir / "ledger.sqlite"


def train_bytes(config: RunConfig, target: TargetInfo, per_token: int, models: ModelFacts) -> int:
    """Draft weights, gradients and both moments in fp32, the target's two tables, and the batches in hand and ahead."""
    tables = 2 * target.vocab_size * target.hidden_size * ITEM_BYTES["float32"]
    batch = config.training.global_batch_size * config.data.max_length
    tokens = min(batch, config.training.micro_batch_tokens) + config.data_plane.prefetch_steps * batch
    return 4 * ITEM_BYTES["float32"] * models.draft_parameters + tables + tokens * per_token


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


def _processes(
    config: RunConfig, models: ModelFacts, num_train_bytes: int, num_store_bytes: int
) -> tuple[ProcessPlan, ...]:
    threads, device = config.training.threads, config.training.device
    num_capture_bytes = models.target_bytes + num_store_bytes
    if config.topology == "colocated":
        roles = ("capture", "controller", "train")
        return (ProcessPlan("specforge", roles, device, threads, num_train_bytes + num_capture_bytes),)
    train = ProcessPlan("train", ("controller", "control-plane server", "train"), device, threads, num_train_bytes)
    return (
        train,
        *(
            ProcessPlan(name, ("capture",), config.target.device, threads, num_capture_bytes)
            for name in capture_names(config)
        ),
    )
