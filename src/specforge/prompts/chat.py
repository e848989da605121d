"""Conversations to tokens and loss spans, by the tokenizer's chat template.

The loss belongs to what the assistant writes: everything after the generation prompt, up to and including the token
that ends its turn, and nothing else. A conversation is rendered and tokenized once, as the target would see it; the
spans are found by one of three ways, and a template for which none is certain is an error, never a guess:

1. the template marks them with ``{% generation %}``;
2. *prefixes*: the conversation cut before and after an assistant message renders to two prefixes of the whole;
3. *replacement*, for templates that rewrite history (such as dropping earlier reasoning): the whole conversation with
   the message's content replaced by a mark renders to the same text around it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jinja2

from specforge.errors import DataError
from specforge.prompts.sources import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = "q7Zx0specforge0mark0x7Zq"

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """Token ids, and half-open token ranges under the loss, ascending and disjoint."""

    input_ids: tuple[int, ...]
    loss_spans: tuple[Span, ...]


class ChatEncoder:
    """Encodes conversations with one tokenizer and one template (``None``: the tokenizer's own)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        try:
            self._template = tokenizer.get_chat_template(template)
        except ValueError:
            raise DataError(
                "the data holds conversations but the target's tokenizer has no chat template; "
                "set data.chat_template to a template file (specforge eval: --chat-template), "
                'or give plain {"text": ...} lines'
            ) from None
        if not tokenizer.is_fast:
            raise DataError("the target's tokenizer cannot map tokens to text; conversations need a fast tokenizer")
        self._tokenizer = tokenizer
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    def encode(self, messages: Sequence[Message], last_turn_only: bool = False) -> EncodedSample:
        """Tokens of the rendered conversation and the spans of its assistant turns (or of the last one alone).

        Raises :class:`DataError` where the template refuses the conversation, or hides where a turn is.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if _GENERATION.search(self._template):
            ids, spans = self._marked_by_template(messages)
            spans = [self._turn_closed(ids, span) for span in spans]
        else:
            ids, spans = self._located(messages, turns)
        if last_turn_only:
            spans = spans[-1:]
        return EncodedSample(tuple(ids), tuple(_merged([span for span in spans if span[0] < span[1]])))

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Tokens of the conversation up to where the assistant is to answer."""
        text = self._render(messages, generation_prompt=True)
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _marked_by_template(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        try:
            encoded: Any = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, return_dict=True, return_assistant_tokens_mask=True
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise _refused(error) from None
        mask = [0, *encoded["assistant_masks"], 0]
        edges = [i for i, (before, here) in enumerate(pairwise(mask)) if before != here]
        return encoded["input_ids"], list(zip(edges[::2], edges[1::2], strict=True))

    def _located(self, messages: Sequence[Message], turns: list[int]) -> tuple[list[int], list[Span]]:
        text = self._render(messages)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = encoded["input_ids"]
        starts = [start for start, _ in encoded["offset_mapping"]]
        spans = []
        for turn in turns:
            start, end = self._turn_characters(messages, turn, text)
            # a token belongs to the span that its first character is in
            span = (bisect_left(starts, start), bisect_left(starts, end))
            spans.append(self._turn_closed(ids, span))
        return ids, spans

    def _turn_characters(self, messages: Sequence[Message], turn: int, text: str) -> Span:
        """Where assistant message ``turn`` is in ``text``, the rendered conversation. In characters."""
        before = self._render_prefix(messages[:turn], text)
        prompt = self._render_prefix(messages[:turn], text, generation_prompt=True)
        after = self._render_prefix(messages[: turn + 1], text)
        prompted = prompt is not None and prompt != before
        if prompted and after is not None and prompt is not None and after.startswith(prompt):
            return len(prompt), len(after)
        around = self._around(messages, turn, text)
        if around is None:
            raise DataError(
                f"the chat template drops or rewrites message {turn}, so the tokens of the assistant cannot be told "
                "apart; give data.chat_template a template that marks them with {% generation %}"
            )
        start, end = around
        if prompt is not None and len(prompt) <= start and (prompted or not text[len(prompt) : start].strip()):
            start = len(prompt)
        return start, end

    def _around(self, messages: Sequence[Message], turn: int, text: str) -> Span | None:
        """The characters of ``text`` that stand where a mark stands if it replaces the content of message ``turn``."""
        replaced = [*messages[:turn], {**messages[turn], "content": _MARK}, *messages[turn + 1 :]]
        head, mark, tail = self._render(replaced).partition(_MARK)
        fits = len(head) + len(tail) <= len(text) and text.startswith(head) and text.endswith(tail)
        if not mark or _MARK in tail or not fits:
            return None
        return len(head), len(text) - len(tail)

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise _refused(error) from None

    def _render_prefix(self, messages: Sequence[Message], text: str, generation_prompt: bool = False) -> str | None:
        """The rendering of the first messages if it is a prefix of ``text``."""
        if not messages:
            return None
        try:
            rendered = self._render(messages, generation_prompt)
        except DataError:  # some templates refuse a conversation that ends here
            return None
        return rendered if text.startswith(rendered) else None

    @cached_property
    def _turn_end_ids(self) -> set[int]:
        """The special token that the template puts after an assistant message; the tokenizer's eos if it shows none."""
        eos = self._tokenizer.eos_token_id
        fallback = set() if eos is None else {eos}
        try:
            text = self._render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": _MARK}])
        except DataError:
            return fallback
        tail = text.partition(_MARK)[2].lstrip()
        ids = self._tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
        return {ids[0]} if ids and ids[0] in self._special_ids else fallback

    def _turn_closed(self, ids: list[int], span: Span) -> Span:
        """``span`` so that it ends with the token that ends the turn, where the template writes one."""
        start, end = span
        last = end
        while last > start and self._is_blank(ids[last - 1]):
            last -= 1
        if last > start and ids[last - 1] in self._special_ids:
            return start, last  # white space after the end of a turn is the template's, not the assistant's
        following = end
        while following < len(ids) and self._is_blank(ids[following]):
            following += 1
        if following < len(ids) and ids[following] in self._turn_end_ids:
            return start, following + 1
        return span

    def _is_blank(self, token_id: int) -> bool:
        return token_id not in self._special_ids and not str(self._tokenizer.decode([token_id])).strip()


def _refused(error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"the chat template refuses the conversation: {reason}")


def _merged(spans: list[Span]) -> list[Span]:
    """Touching or overlapping spans joined."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
