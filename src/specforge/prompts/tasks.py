"""A data section to the sequence of ``PromptTask``: a pure function of the file, the options and the tokenizer."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
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
            encoded = encoder.encode(sample)
        except DataError as error:
            num_invalid += 1
            if num_invalid > config.max_invalid:
                raise DataError(f"{config.path} line {number}: {error}") from None
            continue
        cut = _truncated(encoded, config.max_length)
        if len(cut.input_ids) < 2 or sum(end - start for start, end in cut.loss_spans) < config.min_loss_tokens:
            num_without_loss += 1
            continue
        num_truncated += cut is not encoded
        attributes = sample.tokens.attributes if sample.tokens is not None else {}
        tasks.append(make_task(len(tasks), cut.input_ids, cut.loss_spans, attributes))
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
    return prompts


def make_task(
    index: int, input_ids: Sequence[int], loss_spans: Sequence[Span], attributes: dict[str, str] | None = None
) -> PromptTask:
    """The task at position ``index``; its ``sample_id`` is a function of the position and the token ids."""
    digest = hashlib.sha256(struct.pack(f"<{len(input_ids)}i", *input_ids)).hexdigest()
    return PromptTask(f"{index:08d}-{digest[:12]}", index, tuple(input_ids), tuple(loss_spans), attributes or {})


class _Encoder:
    """Texts and conversations to tokens; the chat template is needed only where there is a conversation."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._template = None if config.chat_template is None else template_text(config.chat_template)
        self._chat: ChatEncoder | None = None

    def encode(self, sample: SourceSample) -> EncodedSample:
        if sample.tokens is not None:
            return EncodedSample(sample.tokens.input_ids, sample.tokens.loss_spans)
        if sample.messages is None:
            ids = tuple(self._tokenizer(sample.text, verbose=False)["input_ids"])
            return EncodedSample(ids, ((0, len(ids)),) if ids else ())
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, self._template)
        return self._chat.encode(sample.messages, self._config.last_turn_only)


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
