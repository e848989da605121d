"""Answers: a call that comes again with its key is not carried out again, it gets the answer it got."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from specforge.errors import ContractError


@dataclass(frozen=True, slots=True)
class Answer:
    """``final``: repeating the call may give this answer again; else (the server is stopping, say) it is made anew."""

    status: int
    body: bytes
    final: bool = True


@dataclass(slots=True)
class _Call:
    what: tuple[str, int]
    done: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Answer | None = None


class Answers:
    """The final answers of the last ``max_answers`` keys, at most ``max_bytes`` of them. For one event loop."""

    def __init__(self, max_answers: int = 4096, max_bytes: int = 64 << 20) -> None:
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._calls: OrderedDict[str, _Call] = OrderedDict()

    async def once(self, key: str, what: tuple[str, bytes], work: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer of ``work``, carried out once a key; who comes while it is at work waits for its answer.

        ``what`` (path and body) tells calls apart: another call with a key that was used is a ``ContractError``.
        """
        path, body = what
        told_apart = (path, hash(body))
        while (call := self._calls.get(key)) is not None:
            if call.what != told_apart:
                raise ContractError(f"the key {key!r} was used for another call; give every call a key of its own")
            if call.answer is not None:
                self._calls.move_to_end(key)
                return call.answer
            await call.done.wait()
            if call.answer is not None:
                return call.answer
        call = self._calls[key] = _Call(told_apart)
        try:
            answer = await work()
        except BaseException:
            del self._calls[key]
            raise
        else:
            if answer.final:
                self._keep(key, call, answer)
            else:
                del self._calls[key]
            return answer
        finally:
            call.done.set()

    def _keep(self, key: str, call: _Call, answer: Answer) -> None:
        call.answer = answer
        self._calls.move_to_end(key)
        self._num_bytes += len(answer.body)
        while len(self._calls) > self._max_answers or self._num_bytes > self._max_bytes:
            oldest = next((name for name, kept in self._calls.items() if kept.answer is not None), key)
            dropped = self._calls.pop(oldest).answer
            self._num_bytes -= 0 if dropped is None else len(dropped.body)
            if oldest == key:
                break
