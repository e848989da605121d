"""Evaluation during training: the features of held-out samples, captured once, and the draft's numbers on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from specforge.config.run import RunConfig
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.offline import FeatureSet
from specforge.evaluation.cache import EvalCache, EvalKey, chat_template_sha256, data_sha256, default_directory
from specforge.evaluation.config import EvaluationConfig
from specforge.evaluation.evaluator import PREFIX, Evaluator, EvaluatorSettings
from specforge.evaluation.held_out import is_better
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.export.draft import TrainedDraft
from specforge.inference.engine import TargetEngine
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.target import load_tokenizer
from specforge.launch.feature_sets import capture_tasks
from specforge.launch.inputs import RunInputs, check_vocabulary, resolve_device, resolve_dtype, tokenizer_sha256
from specforge.prompts.config import DataConfig
from specforge.prompts.tasks import load_prompt_tasks
from specforge.training.ranks import Ranks
from specforge.training.sharding import ShardedDraft
from specforge.training.trainer import Trainable

ACCEPTED_LENGTH = PREFIX + "accepted_length"
PROMPT_TOKENS = EvaluationConfig().prompt_tokens
"""Of a plain text, its beginning; as ``specforge eval`` has it by default."""

LoadTarget = Callable[[], HFTargetEngine]
LoadEngine = Callable[[], TargetEngine]


@dataclass(frozen=True, slots=True)
class _EveryRank:
    """All ranks evaluate, each its own micro-batches: the weights are whole then."""

    rank: int
    size: int
    gather: Callable[[list[float]], list[list[float]]]


class HeldOutEvaluation:
    """The evaluation of a run, as its trainer wants it.

    ``load_engine`` is called where features must be captured, ``load_target`` where the target must decode.
    """

    def __init__(
        self,
        inputs: RunInputs,
        trainable: Trainable,
        ranks: Ranks,
        load_target: LoadTarget,
        load_engine: LoadEngine | None = None,
    ) -> None:
        self._options = inputs.config.held_out
        self._inputs, self._trainable, self._ranks, self._load_target = inputs, trainable, ranks, load_target
        self._engine: HFTargetEngine | None = None
        self._tasks = held_out_tasks(inputs)
        training = inputs.config.training
        device = resolve_device(training.device)
        key = held_out_key(inputs, self._tasks)
        self._evaluator = Evaluator(
            trainable.algorithm,
            trainable.tables,
            held_out_features(inputs, self._tasks, key, load_engine or load_target),
            EvaluatorSettings(
                self._options.micro_batch_tokens or training.micro_batch_tokens,
                str(device),
                resolve_dtype(training.dtype, device),
            ),
            _EveryRank(ranks.rank, ranks.size, ranks.main.gather),
        )
        self.every = self._options.every
        self.metric = PREFIX + self._options.best
        self.key = key.name

    def __call__(self, draft: ShardedDraft, step: int) -> dict[str, float]:
        with draft.whole() as whole:
            scalars = self._evaluator.run(whole)
        every = self._options.speculative_every
        if every and step % every == 0:
            scalars |= self._decoded(draft)
        return scalars

    def is_better(self, value: float, than: float | None) -> bool:
        return is_better(self._options.best, value, than)

    def _decoded(self, draft: ShardedDraft) -> dict[str, float]:
        """What real speculative decoding of the first prompts finds. The leader decodes, the others wait for it."""
        state = draft.served_state(keep=self._ranks.is_leader)
        found: dict[str, float] = {}
        if self._ranks.is_leader:
            self._engine = self._engine or self._load_target()
            inputs, tables = self._inputs, self._engine.tables
            config = inputs.algorithm.draft_config(inputs.target)
            algorithm = inputs.config.algorithm.model_dump(mode="json")
            copied = TrainedDraft(algorithm, config, state, inputs.spec.dtype, inputs.target.revision).build(tables)
            spec = inputs.algorithm.capture_spec(config, inputs.spec.dtype)
            decoder = SpeculativeDecoder(
                self._engine, inputs.algorithm.proposer(copied, tables), spec, self._options.num_proposals
            )
            prompts = [_prompt_of(task) for task in self._tasks[: self._options.num_prompts]]
            with torch.inference_mode():
                report = decoder.evaluate(prompts, self._options.max_new_tokens)
            if report.accepted_length_mean is not None:
                found[ACCEPTED_LENGTH] = report.accepted_length_mean
        answer: dict[str, float] = json.loads(self._ranks.main.broadcast(json.dumps(found).encode()))
        return answer


def held_out_tasks(inputs: RunInputs) -> list[PromptTask]:
    """The evaluation samples, tokenized as those of the training are."""
    config = inputs.config
    tasks = load_prompt_tasks(
        held_out_data(config), load_tokenizer(config.target.path, config.target.trust_remote_code)
    )
    check_vocabulary(config, tasks, inputs.target)
    return tasks


def held_out_data(config: RunConfig) -> DataConfig:
    """The options of the data, for the evaluation samples."""
    options = config.held_out
    changed = {"path": options.data, "features": None, "generate": None, "limit": options.num_samples}
    if options.max_length is not None:
        changed["max_length"] = options.max_length
    return config.data.model_copy(update=changed)


def held_out_key(inputs: RunInputs, tasks: list[PromptTask]) -> EvalKey:
    """Everything that the features of ``tasks`` depend on."""
    config, data = inputs.config, held_out_data(inputs.config)
    device = resolve_device(config.target.device)
    return EvalKey(
        data_sha256=data_sha256(tasks),
        num_samples=len(tasks),
        target_revision=inputs.target.revision,
        target_dtype=str(resolve_dtype(config.target.dtype, device)).removeprefix("torch."),
        device_type=device.type,
        tokenizer_sha256=tokenizer_sha256(Path(inputs.target.path)),
        chat_template_sha256=chat_template_sha256(inputs.target, data.chat_template),
        spec=inputs.spec,
        max_length=data.max_length,
    )


def held_out_features(inputs: RunInputs, tasks: list[PromptTask], key: EvalKey, load: LoadEngine) -> FeatureSet:
    """Features of ``tasks``: from the cache, or captured now for this run and every later one."""
    cache = EvalCache(inputs.config.held_out.cache_dir or default_directory())
    return cache.features(key, lambda into: capture_tasks(replace(inputs, tasks=tasks), into, load))


def _prompt_of(task: PromptTask) -> tuple[int, ...]:
    """The tokens before the first answer; of a sample that is all answer (plain text), its beginning."""
    return task.input_ids[: task.loss_spans[0][0] or PROMPT_TOKENS]
