"""A data section to the sequence of ``PromptTask``: a pure function of the file, the options and the tokenizer."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from specforge.contracts.tasks import PromptTask
from specforge.errors import DataError
from specforge.prompts.chat import ChatEncoder, EncodedSample, Span
from specforge.prompts.config import DataConfig
from specforge.prompts.sources import SourceSample, numbered_lines, parse_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The tasks of a file, and what happened to its lines.

    ``num_invalid`` lines could not be read, ``num_without_loss`` samples had too few tokens under the loss (both are
    left out); ``num_truncated`` samples were cut to the longest length (and kept).
    """

    tasks: list[PromptTask]
    num_lines: int
    num_invalid: int
    num_without_loss: int
    num_truncated: int

    @property
    def summary(self) -> str:
        """One line for a person."""
        parts = [f"{len(self.tasks)} samples from {self.num_lines} lines"]
        parts += [f"{self.num_truncated} cut to the longest length"] if self.num_truncated else []
        parts += [f"{self.num_without_loss} skipped: too few tokens under the loss"] if self.num_without_loss else []
        parts += [f"{self.num_invalid} bad lines skipped"] if self.num_invalid else []
        return ", ".join(parts)


def load_prompt_tasks(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[PromptTask]:
    """The tasks of :func:`read_prompts`; what was skipped or cut is logged as a warning."""
    prompts = read_prompts(config, tokenizer)
    dropped = prompts.num_truncated or prompts.num_without_loss or prompts.num_invalid
    _log.log(logging.WARNING if dropped else logging.INFO, "%s: %s", config.path, prompts.summary)
    return prompts.tasks


def read_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Read, render and tokenize ``config.path``. Raises :class:`DataError`, also where no sample is left."""
    assert config.path is not None
    encoder = _Encoder(config, tokenizer)
    tasks: list[PromptTask] = []
    num_lines = num_invalid = num_without_loss = num_truncated = 0
    for number, line in numbered_lines(config.path):
        num_lines += 1
        try:
            sample = parse_line(line, config.format)
            encoded, is_prompt = encoder.encode(sample)
        except DataError as error:
            num_invalid += 1
            if num_invalid > config.max_invalid:
                raise DataError(f"{config.path} line {number}: {error}") from None
            continue
        cut = encoded if is_prompt else _truncated(encoded, config.max_length)
        num_to_generate = _longest_response(config, len(cut.input_ids)) if is_prompt else 0
        num_loss = num_to_generate or sum(end - start for start, end in cut.loss_spans)
        given = sample.tokens
        attributes, name = ({}, None) if given is None else (given.attributes, given.sample_id)
        # A row with a name was chosen when it was recorded, and its run trains it, however short the response.
        is_short = len(cut.input_ids) + num_to_generate < 2 or num_loss < config.min_loss_tokens
        if is_short and name is None:
            num_without_loss += 1
            continue
        num_truncated += cut is not encoded
        task = make_task(len(tasks), cut.input_ids, cut.loss_spans, attributes, name)
        tasks.append(replace(task, num_to_generate=num_to_generate) if num_to_generate else task)
        if len(tasks) == config.limit:
            break
    prompts = PromptSet(tasks, num_lines, num_invalid, num_without_loss, num_truncated)
    if not num_lines:
        raise DataError(f"{config.path}: the file is empty; it should hold one JSON object a line")
    if not tasks:
        raise DataError(
            f"{config.path}: no sample is left ({prompts.summary}); each needs an answer of the assistant, or a text, "
            f"with at least {config.min_loss_tokens} of its tokens (data.min_loss_tokens) among the first "
            f"{config.max_length} of the sample (data.max_length)"
        )
    check_sample_ids(config.path, tasks)
    return prompts


def check_sample_ids(path: Path, tasks: Sequence[PromptTask]) -> None:
    """Refuse rows of ``path`` that give one ``sample_id`` twice."""
    seen: set[str] = set()
    for task in tasks:
        if task.sample_id in seen:
            raise DataError(
                f'{path}: "sample_id" {task.sample_id!r} is given to two rows; leave it out of rows that were put '
                "together from several files"
            )
        seen.add(task.sample_id)


def make_task(
    index: int,
    input_ids: Sequence[int],
    loss_spans: Sequence[Span],
    attributes: dict[str, str] | None = None,
    sample_id: str | None = None,
) -> PromptTask:
    """The task at position ``index``; a ``sample_id`` that is not given is a function of the position and the ids."""
    if sample_id is None:
        digest = hashlib.sha256(struct.pack(f"<{len(input_ids)}i", *input_ids)).hexdigest()
        sample_id = f"{index:08d}-{digest[:12]}"
    return PromptTask(sample_id, index, tuple(input_ids), tuple(loss_spans), attributes or {})


class _Encoder:
    """Texts and conversations to tokens; the chat template is needed only where there is a conversation.

    With ``data.generate`` they become prompts: up to where the last answer begins.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._template = None if config.chat_template is None else template_text(config.chat_template)

    def encode(self, sample: SourceSample) -> tuple[EncodedSample, bool]:
        """The sample, and whether it is a prompt that the target is to answer."""
        options = self._config.generate
        if options is None or (options.keep_original and _is_answered(sample)):
            return self._whole(sample), False
        return EncodedSample(self._prompt(sample), ()), True

    def _whole(self, sample: SourceSample) -> EncodedSample:
        if sample.tokens is not None:
            return EncodedSample(sample.tokens.input_ids, sample.tokens.loss_spans)
        if sample.messages is None:
            ids = self._text(sample)
            return EncodedSample(ids, ((0, len(ids)),) if ids else ())
        return self._conversations.encode(sample.messages, self._config.last_turn_only)

    def _prompt(self, sample: SourceSample) -> tuple[int, ...]:
        if sample.tokens is not None:
            ids, spans = sample.tokens.input_ids, sample.tokens.loss_spans
            return ids[: spans[-1][0]] if _is_answered(sample) else ids
        if sample.messages is None:
            return self._text(sample)
        messages = sample.messages[:-1] if _is_answered(sample) else sample.messages
        if not messages:
            raise DataError("the conversation has no message before the assistant's, so there is nothing to answer")
        return self._conversations.prompt(messages)

    def _text(self, sample: SourceSample) -> tuple[int, ...]:
        return tuple(self._tokenizer(sample.text, verbose=False)["input_ids"])

    @cached_property
    def _conversations(self) -> ChatEncoder:
        return ChatEncoder(self._tokenizer, self._template)


def _is_answered(sample: SourceSample) -> bool:
    """Whether a prompt is followed by an answer; a plain text, or tokens that are all under the loss, are a prompt."""
    if sample.tokens is not None:
        return bool(sample.tokens.loss_spans) and sample.tokens.loss_spans[-1][0] > 0
    return sample.messages is not None and sample.messages[-1]["role"] == "assistant"


def _longest_response(config: DataConfig, num_tokens: int) -> int:
    """Of a prompt with ``num_tokens``; 0: there is no room for one."""
    assert config.generate is not None
    return max(0, min(config.generate.max_new_tokens, config.max_length - num_tokens)) if num_tokens else 0


def template_text(path: Path, option: str = "data.chat_template") -> str:
    """The chat template in a file, which ``option`` names."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the chat template ({option}) cannot be read: {error}") from None


def _truncated(encoded: EncodedSample, max_length: int) -> EncodedSample:
    if len(encoded.input_ids) <= max_length:
        return encoded
    spans = tuple((start, min(end, max_length)) for start, end in encoded.loss_spans if start < max_length)
    return EncodedSample(encoded.input_ids[:max_length], spans)
