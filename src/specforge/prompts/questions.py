"""Prompts to decode: questions of well-known benchmarks, and the formats of training data up to the first answer.

The format of a row follows from its keys:

    MT-Bench    question_id, category, turns      the first turn
    GSM8K       question, answer                  the question
    HumanEval   task_id, prompt, ...              the beginning of a program
    Alpaca      instruction, input, output        the instruction, and the input below it
    training    messages, conversations, text, input_ids (``specforge.prompts.sources``)

A file has one row a line, or is one JSON array of rows (as Alpaca is published).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge.errors import DataError
from specforge.prompts.chat import ChatEncoder
from specforge.prompts.sources import Message, SourceSample, check_characters, numbered_lines, parse_object, parse_row
from specforge.prompts.tasks import template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION_KEYS = {
    "MT-Bench": ("turns",),
    "GSM8K": ("question", "answer"),
    "HumanEval": ("task_id", "prompt"),
    "Alpaca": ("instruction",),
}
"""The keys that tell a format, all of them needed."""
TRAINING_KEYS = ("messages", "conversations", "text", "input_ids")
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt: what a user asks (``text``), or ``sample``, a row of training data. ``line``: its place in the file."""

    line: int
    category: str
    text: str | None = None
    sample: SourceSample | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the target reads it."""

    input_ids: tuple[int, ...]
    category: str
    file: str
    line: int


class QuestionEncoder:
    """Questions to tokens, by the chat template where there is one.

    ``template``: a file with one, ``None`` for the tokenizer's own; ``as_text``: no template. ``text_tokens``: tokens
    of a plain text that are its prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_tokens: int,
        template: Path | None = None,
        as_text: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_tokens = text_tokens
        self._as_text = as_text
        self._template = None if template is None else template_text(template, "--chat-template")
        self._chat: ChatEncoder | None = None

    def encode(self, question: Question) -> tuple[int, ...]:
        """The prompt's tokens. Raises :class:`DataError` for one that has none."""
        sample = question.sample
        if sample is None:
            assert question.text is not None
            return self._asked([{"role": "user", "content": question.text}])
        if sample.tokens is not None:
            ids, spans = sample.tokens.input_ids, sample.tokens.loss_spans
            start = spans[0][0] if spans else len(ids)
            return ids[:start] if start else ids[: self._text_tokens]
        if sample.messages is None:
            return self._plain(sample.text or "")[: self._text_tokens]
        before = [*sample.messages]
        answers = [place for place, message in enumerate(before) if message["role"] == "assistant"]
        before = before[: answers[0]] if answers else before
        if not before:
            raise DataError("the conversation begins with an answer; a prompt needs a message of the user before it")
        return self._asked(before)

    def _asked(self, messages: Sequence[Message]) -> tuple[int, ...]:
        has_template = self._template is not None or self._tokenizer.chat_template is not None
        if self._as_text or (not has_template and len(messages) == 1):
            return self._plain("\n\n".join(message["content"] for message in messages))
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, self._template)
        return self._chat.prompt(messages)

    def _plain(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer(text, verbose=False)["input_ids"])
        if not ids:
            raise DataError("a prompt has no tokens; expected at least one")
        return ids


def read_questions(path: Path, default_category: str | None = None) -> list[Question]:
    """All questions of a file. Raises :class:`DataError` that names file and place.

    ``default_category`` is of rows that name none (``None``: the file's name without its ending).
    """
    questions = []
    for place, row in _rows(path):
        try:
            questions.append(question_of(row, place, default_category or path.stem))
        except DataError as error:
            raise DataError(f"{path} line {place}: {error}") from None
    if not questions:
        raise DataError(f"{path}: the file is empty; it should hold one JSON object a line")
    return questions


def question_of(row: dict[str, Any], line: int, default_category: str) -> Question:
    """The question in one row; ``default_category`` where the row names none."""
    category = row.get("category")
    if category is not None and (not isinstance(category, str) or not category.strip()):
        raise DataError(f'"category" should be a text, got {category!r}')
    category = category or default_category
    found = next((name for name, keys in QUESTION_KEYS.items() if all(key in row for key in keys)), None)
    if found is None:
        if any(key in row for key in TRAINING_KEYS):
            return Question(line, category, sample=parse_row(row))
        known = "; ".join(f"{name}: {' and '.join(keys)}" for name, keys in QUESTION_KEYS.items())
        got = ", ".join(sorted(map(repr, row))[:6]) or "none"
        raise DataError(f"the keys {got} are those of no format ({known}; training data: {', '.join(TRAINING_KEYS)})")
    if found == "MT-Bench":
        turns = row["turns"]
        text = _text(turns[0] if isinstance(turns, list) and turns else None, "turns[0]")
    elif found == "Alpaca":
        more = row.get("input")
        text = "\n\n".join([_text(row["instruction"], "instruction"), *([_text(more, "input")] if more else [])])
    else:
        key = "question" if found == "GSM8K" else "prompt"
        text = _text(row[key], key)
    return Question(line, category, text=text)


def chosen_in_turn(questions: Sequence[Question], count: int) -> list[Question]:
    """``count`` of them, the first ones of every category in turn, in the order of the file."""
    seen: Counter[str] = Counter()
    ranks = []
    for question in questions:
        ranks.append(seen[question.category])
        seen[question.category] += 1
    order = sorted(range(len(questions)), key=lambda index: (ranks[index], index))
    return [questions[index] for index in sorted(order[:count])]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, or place in an array, from 1; the row)."""
    lines = numbered_lines(path)
    first = next(lines, None)
    if first is None:
        return
    number, line = first
    if line.startswith(_GZIP):
        raise DataError(f"{path}: this is a gzip archive; unpack it with gunzip first")
    if line.lstrip().startswith(b"["):
        yield from enumerate(_array(path), start=1)
        return
    while True:
        try:
            row = parse_object(line)
        except DataError as error:
            raise DataError(f"{path} line {number}: {error}") from None
        yield number, row
        following = next(lines, None)
        if following is None:
            return
        number, line = following


def _array(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: a JSON array of objects was expected ({error})") from None
    except RecursionError:
        raise DataError(f"{path}: the JSON is nested too deeply") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: a JSON array of objects was expected, but some of its items are no objects")
    for place, row in enumerate(rows, start=1):
        try:
            check_characters(row)
        except DataError as error:
            raise DataError(f"{path} line {place}: {error}") from None
    return rows


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'"{key}" should be a text that is not empty, got {value!r:.60}')
    return value
