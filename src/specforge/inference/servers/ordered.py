"""OrderedServer: what the dialects of engines with our plug-in inside have in common.

A sample is a request of the engine's own kind, with the order beside its tokens and the receipt in its answer
(``inference.plugins.orders``). Features come back in the receipt only where the sink is inline.
"""

from __future__ import annotations

import base64
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from specforge.contracts.capture_server import (
    CapturedItem,
    CaptureItem,
    CaptureReply,
    CaptureRequest,
    CloseSink,
    GeneratedItem,
    GenerateReply,
    GenerateRequest,
    ItemFailure,
    ServerInfo,
    Sink,
)
from specforge.contracts.capture_wire import Refusal
from specforge.data_plane.tensors import views
from specforge.errors import ContractError, EngineError, PromptRefused, ServerBusy, ServerRefused, ServerUnavailable
from specforge.inference.plugins.orders import RECEIPT, Order, Receipt
from specforge.inference.servers.base import Captured
from specforge.inference.servers.http_client import ServerHttp, Unfit, refusal

HEAD_BYTES = 256 << 10
"""Room in an answer for what is said beside features and tokens."""
TOKEN_BYTES = 96
"""A token of a response in JSON: its id, and its text."""
GOODBYE_S = 10.0


class OrderedServer(ABC):
    """A server at ``url`` (``http://host:port``), with ``token`` as its API key. See ``CaptureServer``.

    A dialect says what the engine is called, where it is asked (``path``), how it takes longer prompts, and how an
    order becomes a request and an answer a receipt.
    """

    engine: ClassVar[str]
    page: ClassVar[str]
    path: ClassVar[str]
    longer: ClassVar[str]

    def __init__(self, url: str, token: str | None = None, max_connections: int = 16) -> None:
        self.url = url.rstrip("/")
        self._http = ServerHttp(self.url, token, max_connections)
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._info: ServerInfo | None = None

    # What a dialect adds

    @abstractmethod
    def discover(self, timeout_s: float) -> ServerInfo:
        """What the plug-in says of itself, by a request for one token."""

    @abstractmethod
    def ordered(self, token_ids: Sequence[int], order: Order) -> dict[str, Any]:
        """The request that carries ``order``; answered after its features are readable."""

    @abstractmethod
    def receipt_in(self, answered: Any) -> str | None:
        """The JSON of the receipt; ``None`` where no plug-in gave one. ``KeyError`` or ``TypeError``: no answer."""

    @abstractmethod
    def generation(self, request: GenerateRequest, timeout_s: float) -> dict[str, Any]:
        """The one request for the responses to all prompts. ``ServerRefused`` for options that it cannot keep to."""

    @abstractmethod
    def responses_in(self, answered: Any) -> list[GeneratedItem]:
        """The responses, in the order of the prompts. ``KeyError``, ``TypeError`` or ``ValueError``: no answer."""

    # CaptureServer

    def info(self, timeout_s: float) -> ServerInfo:
        """Asks anew: a server that was started again may be another."""
        info = self.discover(timeout_s)
        with self._lock:
            self._info = info
        return info

    def capture(self, request: CaptureRequest, timeout_s: float) -> Captured:
        """One request to the engine a sample; those of one call are in flight together."""
        info = self.known(timeout_s)
        if len(request.items) == 1:
            answers = [self._capture_one(info, request, request.items[0], timeout_s)]
        else:
            with ThreadPoolExecutor(min(len(request.items), self._max_connections)) as pool:
                answers = list(pool.map(lambda item: self._capture_one(info, request, item, timeout_s), request.items))
        revisions = {revision for revision, _, _ in answers}
        if len(revisions) > 1:
            raise ServerUnavailable(f"the capture server {self.url} was started with another target meanwhile")
        reply = CaptureReply(revisions.pop(), tuple(item for _, item, _ in answers))
        return Captured(reply, tuple(tensors for _, _, tensors in answers))

    def generate(self, request: GenerateRequest, timeout_s: float) -> GenerateReply:
        """All prompts in one request. At near-ties a response may depend on its neighbours."""
        info, num_new = self.known(timeout_s), request.generate.max_new_tokens
        if request.target_revision not in (None, info.target_revision):
            raise self.refused(f"has another target (revision {info.target_revision:.16}) than was asked for")
        for prompt in request.prompts:
            reason = self._unfit(prompt, num_new, info)
            if reason:
                raise PromptRefused(f"a prompt for the capture server {self.url} {reason}")
        most = HEAD_BYTES + sum(HEAD_BYTES + TOKEN_BYTES * (len(prompt) + num_new) for prompt in request.prompts)
        answered = self.ask("POST", self.path, self.generation(request, timeout_s), timeout_s, most)
        try:
            items = self.responses_in(answered)
        except (KeyError, TypeError, ValueError) as error:
            raise self.torn(self.path, f"{type(error).__name__}: {error}") from error
        if len(items) != len(request.prompts):
            raise self.torn(self.path, f"{len(items)} responses to {len(request.prompts)} prompts")
        return GenerateReply(info.target_revision, tuple(items))

    def close_sink(self, sink: Sink) -> None:
        self.known(GOODBYE_S)
        self._carry_out((0,), Order(close=CloseSink(sink)), GOODBYE_S, HEAD_BYTES)

    def close(self) -> None:
        self._http.close()

    # For dialects

    def known(self, timeout_s: float) -> ServerInfo:
        """What the server said of itself last, asked now where it never was."""
        with self._lock:
            info = self._info
        return info if info is not None else self.info(timeout_s)

    def ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, max_bytes: int) -> Any:
        """The JSON of the answer, which is none of the refusals."""
        content = None if body is None else json.dumps(body).encode()
        answer = self._http.send(method, path, content, timeout_s, max_bytes)
        if answer.status == 200:
            try:
                return json.loads(bytes(answer.body))
            except ValueError as error:
                raise self.torn(path, f"not JSON: {error}") from error
        key = "; give the run the key that the server was started with (--api-key)"
        nobody = f"; what listens there is no {self.engine} server: check address and dialect"
        advice = {401: key, 403: key, 404: nobody, 405: nobody}
        raise refusal(self.url, path, answer, advice, f"; its version of {self.engine} may want another request")

    def receipt(self, answered: Any) -> Receipt:
        """What the plug-in says in an answer."""
        try:
            text = self.receipt_in(answered)
        except (KeyError, TypeError, AttributeError) as error:
            raise self.torn(self.path, f"{type(error).__name__}: {error}") from error
        if text is None:
            raise self.refused(
                f"is a {self.engine} without the SpecForge plug-in, or its log says why that captures nothing; start "
                f"it as {self.page} says"
            )
        try:
            return RECEIPT.read(text)
        except ContractError as error:
            raise self.refused(
                f"has a SpecForge plug-in of another version ({error}); install the same specforge on both sides"
            ) from None

    def refused(self, what: str) -> ServerRefused:
        return ServerRefused(f"the capture server {self.url} {what}")

    def torn(self, path: str, why: str) -> ServerUnavailable:
        return ServerUnavailable(f"the capture server {self.url} answered {path} with what is none: {why}")

    def _capture_one(
        self, info: ServerInfo, request: CaptureRequest, item: CaptureItem, timeout_s: float
    ) -> tuple[str, CapturedItem, dict[str, Tensor] | None]:
        """The server's revision, the item, and its tensors where they are inline."""
        num_tokens = len(item.input_ids)
        # an id outside the vocabulary can end an engine
        reason = self._unfit(item.input_ids, 0, info)
        if reason:
            failure = ItemFailure("prompt", f"it {reason}")
            failed = CapturedItem(item.sample_id, item.generation, num_tokens, failure=failure)
            return info.target_revision, failed, None
        most = HEAD_BYTES
        if request.sink.kind == "inline":
            most += 2 * request.spec.layout(info.hidden_size, num_tokens)[1]
        named = replace(item, input_ids=())
        order = Order(replace(request, items=(named,)))
        try:
            receipt = self._carry_out(item.input_ids, order, timeout_s, most)
        except Unfit as error:
            raise self._whose(error, timeout_s) from None
        if receipt.item is None:
            raise self.torn(self.path, "a receipt without an item")
        is_inline = receipt.item.failure is None and receipt.item.store == "inline"
        tensors = self._tensors(receipt.item, receipt.data) if is_inline else None
        return receipt.info.target_revision, receipt.item, tensors

    def _whose(self, error: Unfit, timeout_s: float) -> EngineError:
        """The prompt's fault, unless the same request for one token is not read either."""
        try:
            self.discover(timeout_s)
        except Unfit:
            return ServerRefused(str(error))
        return PromptRefused(str(error))

    def _carry_out(self, token_ids: Sequence[int], order: Order, timeout_s: float, max_bytes: int) -> Receipt:
        """The receipt of ``order``, which was not refused."""
        receipt = self.receipt(self.ask("POST", self.path, self.ordered(token_ids, order), timeout_s, max_bytes))
        if receipt.refusal is not None:
            raise self._explained(receipt.refusal)
        return receipt

    def _explained(self, refusal: Refusal) -> EngineError:
        said = f"the capture server {self.url} refused: {refusal.reason}"
        if refusal.what == "busy":
            return ServerBusy(said)
        return ServerUnavailable(said) if refusal.what == "engine" else ServerRefused(said)

    def _tensors(self, item: CapturedItem, text: str) -> dict[str, Tensor]:
        try:
            data = bytearray(base64.b64decode(text, validate=True))
        except ValueError as error:
            raise self.torn(self.path, f"its features are not base64 ({error})") from error
        if len(data) != item.num_bytes:
            raise self.torn(self.path, f"{len(data):,} of {item.num_bytes:,} bytes of features")
        own = torch.empty(len(data), dtype=torch.uint8)
        own.copy_(torch.frombuffer(data, dtype=torch.uint8))
        try:
            return views(own, item.features)
        except (KeyError, RuntimeError) as error:
            raise self.torn(self.path, f"features that do not fit their bytes ({error})") from error

    def _unfit(self, token_ids: Sequence[int], num_new: int, info: ServerInfo) -> str | None:
        """Why the server of ``info`` does not take a prompt."""
        if not token_ids:
            return "has no tokens; expected at least one"
        if max(token_ids) >= info.vocab_size or min(token_ids) < 0:
            return f"has token ids outside the vocabulary of {info.vocab_size}"
        if len(token_ids) + num_new > info.max_tokens:
            more = f" before {num_new} new ones" if num_new else ""
            return (
                f"has {len(token_ids)} tokens{more}, the server takes {info.max_tokens}; shorten it, or start "
                f"{self.engine} with a larger {self.longer}"
            )
        return None


def generated(token_ids: Any, finish_reason: Any) -> GeneratedItem:
    """A response of which both engines keep the stop token. ``ValueError`` for what is no row of token ids, and for a
    response that the engine cut short (an abort, an error): it would be recorded as the target's.
    """
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"a response that ended by {finish_reason!r:.80}")
    if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
        raise ValueError(f"token ids {token_ids!r:.80}")
    return GeneratedItem(tuple(token_ids), finish_reason == "stop")
