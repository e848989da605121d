"""What every process of a run reads first: the target's facts, the algorithm, the prompts, and the plan of it all."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specforge.algorithms.base import Algorithm, Pace
from specforge.algorithms.catalog import get_algorithm
from specforge.config.run import RunConfig
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.features import ITEM_BYTES
from specforge.contracts.tasks import PromptTask
from specforge.errors import ConfigError, DataError
from specforge.inference.target import count_parameters, load_tokenizer, read_target_info
from specforge.launch.offline import read_feature_prompts
from specforge.launch.plan import DataFacts, ModelFacts, Plan, make_plan
from specforge.prompts.responses import ResponseOptions
from specforge.prompts.tasks import load_prompt_tasks
from specforge.training.trainer import check_sequences

RESOLVED_FILE = "resolved.yaml"
"""The configuration as it ran, in the run's directory."""
TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TargetInputs:
    """What the capture side needs: no prompt, no plan."""

    config: RunConfig
    target: TargetInfo
    algorithm: Algorithm
    spec: CaptureSpec


@dataclass(frozen=True, slots=True)
class RunInputs:
    """What the train side, the plan and the reports need."""

    config: RunConfig
    target: TargetInfo
    algorithm: Algorithm
    spec: CaptureSpec
    tasks: list[PromptTask]
    plan: Plan

    @property
    def responses(self) -> ResponseOptions | None:
        """How the target answers the prompts; ``None`` where they have their answers."""
        return ResponseOptions.of_run(self.config.data.generate, self.config.seed)

    @property
    def written_by(self) -> dict[str, Any] | None:
        """Everything that responses depend on besides prompts and target; ``None`` where there are none to write."""
        return None if self.responses is None else {**self.responses.identity(), **writer_of(self.config)}

    @property
    def pace(self) -> Pace:
        """How fast the draft learns: what the run says, else what the algorithm recommends."""
        chosen = {name: getattr(self.config.training, name) for name in asdict(self.algorithm.recommended)}
        return replace(
            self.algorithm.recommended, **{name: value for name, value in chosen.items() if value is not None}
        )

    def identity(self) -> dict[str, Any]:
        """What must agree between two processes that train the same draft: everything that changes its bits.

        How many ranks train it, and how they share the work, is no part of it: a run may go on at any size.
        """
        training = self.config.training
        return {
            "seed": self.config.seed,
            "algorithm": self.config.algorithm.model_dump(mode="json"),
            "target_revision": self.target.revision,
            "capture_dtype": self.spec.dtype,
            "aux_layers": list(self.spec.aux_layers),
            "tokenizer_sha256": tokenizer_sha256(Path(self.target.path)),
            "data_sha256": tasks_sha256(self.tasks),
            **({} if self.written_by is None else {"generate": self.written_by}),
            "shuffle": self.config.control_plane.shuffle,
            "order": self.config.control_plane.order,
            "total_steps": self.plan.total_steps,
            **training.model_dump(
                mode="json",
                include={
                    "num_epochs", "global_batch_size", "micro_batch_tokens", "schedule", "min_lr_ratio", "decay_ratio",
                    "decay_shape", "optimizer", "weight_decay", "decay", "betas", "dtype",
                },
            ),
            **asdict(self.pace),
        }  # fmt: skip


def writer_of(config: RunConfig) -> dict[str, str]:
    """Who writes responses: numerics differ between engines, and at near-ties the tokens with them."""
    if config.target.servers is not None:
        return {"engine": config.target.servers.dialect}
    device = resolve_device(config.target.device)
    return {"engine": "local", "dtype": str(resolve_dtype(config.target.dtype, device)).removeprefix("torch.")}


def read_target_inputs(config: RunConfig) -> TargetInputs:
    target = read_target_info(config.target.path, config.target.trust_remote_code)
    algorithm = get_algorithm(config.algorithm)
    spec = algorithm.capture_spec(algorithm.draft_config(target), config.data_plane.capture_dtype)
    return TargetInputs(config, target, algorithm, spec)


def read_run_inputs(config: RunConfig) -> RunInputs:
    """Read target and prompts and resolve the plan; a :class:`UserError` for everything that cannot be run."""
    inputs = read_target_inputs(config)
    draft_config = inputs.algorithm.draft_config(inputs.target)
    check_sequences(inputs.algorithm, config.training.sequence_parallel, draft_config)
    tasks = read_tasks(config, inputs)
    check_vocabulary(config, tasks, inputs.target)
    facts = DataFacts(
        num_samples=len(tasks),
        num_tokens=sum(task.max_tokens for task in tasks),
        max_tokens=max(task.max_tokens for task in tasks),
    )
    width = ITEM_BYTES[
        str(resolve_dtype(config.target.dtype, resolve_device(config.target.device))).removeprefix("torch.")
    ]
    models = ModelFacts(
        target_bytes=width * count_parameters(inputs.target.path),
        draft_parameters=draft_config.num_parameters,
    )
    plan = make_plan(config, inputs.target, inputs.spec, facts, models)
    return RunInputs(config, inputs.target, inputs.algorithm, inputs.spec, tasks, plan)


def read_tasks(config: RunConfig, inputs: TargetInputs) -> list[PromptTask]:
    """The prompts of ``data.path``, or those that were recorded with ``data.features``."""
    if config.data.features is not None:
        return read_feature_prompts(config, inputs.target, inputs.spec)
    return load_prompt_tasks(config.data, load_tokenizer(config.target.path, config.target.trust_remote_code))


def check_vocabulary(config: RunConfig, tasks: list[PromptTask], target: TargetInfo) -> None:
    """Refuse token ids that the target does not have; recorded ones may come from another target."""
    for task in tasks:
        if max(task.input_ids) >= target.vocab_size:
            raise DataError(
                f"{config.data.path or config.data.features}: sample {task.index} has token id {max(task.input_ids)}, "
                f"but the vocabulary of {target.path} has {target.vocab_size} tokens; give "
                "samples that were made for this target"
            )


def tasks_sha256(tasks: list[PromptTask]) -> str:
    """SHA-256 over ids, tokens and loss spans in order, and how long the responses may be that are to be generated."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(repr((task.sample_id, task.input_ids, task.loss_spans)).encode())
        if task.num_to_generate:
            digest.update(repr(task.num_to_generate).encode())
    return digest.hexdigest()


def tokenizer_sha256(target: Path) -> str:
    """SHA-256 over the tokenizer's files in a target's directory; empty where it has none."""
    files = [target / name for name in TOKENIZER_FILES if (target / name).is_file()]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name}|{len(content)}|".encode() + content)
    return digest.hexdigest() if files else ""


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name} was asked for, but this machine has no usable CUDA device; use auto or cpu")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and bfloat16 on CUDA."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
