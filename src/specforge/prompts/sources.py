"""JSONL lines to conversations, texts and recorded tokens. Every problem is one sentence in a :class:`DataError`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from specforge.errors import DataError

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_CONTENT_KEYS = {"messages": "messages", "sharegpt": "conversations", "text": "text", "tokens": "input_ids"}

_SAMPLE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RecordedTokens:
    """Token ids that were recorded before, with half-open loss spans, ascending and disjoint.

    ``sample_id``: the one that they were recorded under; ``None``: a new one.
    """

    input_ids: tuple[int, ...]
    loss_spans: tuple[tuple[int, int], ...]
    attributes: dict[str, str]
    sample_id: str | None = None


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One line: a conversation (``messages``, with ``role`` and ``content`` each), a plain ``text``, or ``tokens``."""

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    tokens: RecordedTokens | None = None


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file that are not blank, with their numbers from 1, read as they are needed."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    yield number, content
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; data.path should name a JSONL file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a JSONL file was expected, this is a directory") from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read: {error.strerror}") from None


def parse_line(line: bytes, data_format: str = "auto") -> SourceSample:
    """The sample in one line of JSON. ``data_format``: auto, messages, sharegpt, text or tokens.

    Raises :class:`DataError` without the place; the caller knows file and line.
    """
    return parse_row(parse_object(line), data_format)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of one line, with any keys."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"UTF-8 text was expected, byte {error.start} of the line is not") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"one JSON object a line was expected, but this line alone is not JSON ({error.msg}); a file with one "
            "array of objects has to be rewritten as JSONL"
        ) from None
    except ValueError as error:  # a number with too many digits
        raise DataError(f"one JSON object a line was expected: {error}") from None
    except RecursionError:
        raise DataError("the JSON is nested too deeply") from None
    if not isinstance(row, dict):
        raise DataError(f"one JSON object a line was expected, got {_kind(row)}")
    check_characters(row)
    return row


def check_characters(row: dict[str, Any]) -> None:
    """Raise :class:`DataError` for a text in ``row`` that UTF-8 cannot hold, and for too deep an object."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("a text holds half of a surrogate pair, which is no Unicode character") from None
    except RecursionError:
        raise DataError("the JSON is nested too deeply") from None


def parse_row(row: dict[str, Any], data_format: str = "auto") -> SourceSample:
    """The sample that an object holds."""
    found = _detected(row) if data_format == "auto" else data_format
    if found == "text":
        return SourceSample(text=_text(row))
    if found == "tokens":
        return SourceSample(tokens=_tokens(row))
    key = _CONTENT_KEYS[found]
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise DataError(f'"{key}" should be a list of at least one message, got {_kind(turns)}')
    convert = _message if found == "messages" else _sharegpt_message
    return SourceSample(messages=tuple(convert(turn, position) for position, turn in enumerate(turns)))


def _detected(row: dict[str, Any]) -> str:
    for name, key in _CONTENT_KEYS.items():
        if key in row:
            return name
    keys = ", ".join(sorted(map(repr, row))[:5]) or "none"
    raise DataError(f'a key "messages", "conversations", "text" or "input_ids" was expected, got {keys}')


def _text(row: dict[str, Any]) -> str:
    text = row.get("text")
    if not isinstance(text, str) or not text:
        raise DataError(f'"text" should be a text that is not empty, got {_kind(text)}')
    return text


def _tokens(row: dict[str, Any]) -> RecordedTokens:
    ids, spans, attributes = row.get("input_ids"), row.get("loss_spans"), row.get("attributes", {})
    if not _are_ids(ids) or not ids:
        raise DataError('"input_ids" should be a list of token ids, each a whole number from 0 up')
    if not isinstance(spans, list) or not all(_are_ids(span) and len(span) == 2 for span in spans):
        raise DataError('"loss_spans" should be a list of [start, end] pairs')
    edges = [edge for span in spans for edge in span]
    if edges != sorted(edges) or (edges and edges[-1] > len(ids)):
        raise DataError(f'"loss_spans" should be ascending, disjoint and within the {len(ids)} tokens, got {spans}')
    if not isinstance(attributes, dict) or not all(isinstance(value, str) for value in attributes.values()):
        raise DataError('"attributes" should be an object of texts')
    name = row.get("sample_id")
    if name is not None and not (isinstance(name, str) and _SAMPLE_ID.fullmatch(name)):
        raise DataError(f'"sample_id" should be 1 to 128 letters, digits, ".", "-" or "_", got {name!r:.80}')
    return RecordedTokens(tuple(ids), tuple((start, end) for start, end in spans if start < end), attributes, name)


def _are_ids(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**31 for value in values)


def _message(turn: Any, position: int) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise DataError(f'message {position} should have a text as "role"')
    content = turn.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, position)
    elif content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f'message {position} should have a text as "content", got {_kind(content)}')
    return {**turn, "content": content}


def _sharegpt_message(turn: Any, position: int) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise DataError(f'message {position} should have texts as "from" and "value"')
    role = _SHAREGPT_ROLES.get(turn["from"].lower())
    if role is None:
        raise DataError(f"message {position} is from {turn['from']!r}; expected human, gpt, system or tool")
    return {"role": role, "content": turn["value"]}


def _joined_parts(parts: list[Any], position: int) -> str:
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise DataError(f"message {position} has content parts that are not text; only text can be trained on")
    return "".join(part["text"] for part in parts)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    if value in ([], ""):
        return f"an empty {'list' if isinstance(value, list) else 'text'}"
    return names.get(type(value), "a number")
