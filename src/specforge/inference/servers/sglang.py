"""SglangServer: an SGLang server with SpecForge's plug-in (``inference/plugins/sglang_capture.py``) inside.

A sample is a request for one token behind it, with the order in its ``custom_params`` and the receipt in the answer's
``meta_info``. Layer ids are the same on both sides.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

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
from specforge.errors import (
    ContractError,
    EngineError,
    PromptRefused,
    ServerBusy,
    ServerRefused,
    ServerUnavailable,
)
from specforge.inference.plugins.orders import FIELD, RECEIPT, Order, Receipt, write_order
from specforge.inference.plugins.sglang_capture import RID_PREFIX
from specforge.inference.servers.base import Captured, expected_features
from specforge.inference.servers.http_client import Answer, ServerHttp

HEAD_BYTES = 256 << 10
"""Room in an answer for what is said beside features and tokens."""
TOKEN_BYTES = 96
"""A generated token in JSON: its id, and its text."""
GOODBYE_S = 10.0
GENERATE = "/generate"
SERVER_INFO = "/server_info"

LATER = {408, 425, 429}
"""Of the statuses that are no server's fault (below 500) those after which the same request may succeed."""

_ADVICE = {
    401: "; give the run the key that the server was started with (--api-key)",
    403: "; give the run the key that the server was started with (--api-key)",
    404: "; what listens there is no SGLang server: check address and dialect",
    405: "; what listens there is no SGLang server: check address and dialect",
}


class SglangServer:
    """The SGLang server at ``url`` (``http://host:port``), with ``token`` as its API key. See ``CaptureServer``."""

    def __init__(self, url: str, token: str | None = None, max_connections: int = 16) -> None:
        self.url = url.rstrip("/")
        self._http = ServerHttp(self.url, token, max_connections)
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._info: ServerInfo | None = None

    def info(self, timeout_s: float) -> ServerInfo:
        """Asks anew: a server that was started again may be another."""
        info = self._receipt(self._ask("POST", GENERATE, _ordered((0,), Order()), timeout_s, HEAD_BYTES)).info
        with self._lock:
            self._info = info
        return info

    def capture(self, request: CaptureRequest, timeout_s: float) -> Captured:
        """One request to SGLang a sample; those of one call are in flight together."""
        info = self._known(timeout_s)
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
        """All prompts in one request. At near-ties a response may depend on its neighbours.

        SGLang draws by a request's seed only with ``--enable-deterministic-inference``; others are refused.
        """
        info, options = self._known(timeout_s), request.generate
        if request.target_revision not in (None, info.target_revision):
            raise self._refused(f"has another target (revision {info.target_revision:.16}) than was asked for")
        for prompt in request.prompts:
            reason = _unfit(prompt, options.max_new_tokens, info)
            if reason:
                raise PromptRefused(f"a prompt for the capture server {self.url} {reason}")
        if options.temperature > 0:
            self._check_draws_by_seed(timeout_s)
        sampling = {
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k or -1,
            **({"sampling_seed": options.seed} if options.temperature > 0 else {}),
            **_PLAIN,
        }
        body = {"input_ids": [list(prompt) for prompt in request.prompts], "sampling_params": sampling}
        most = HEAD_BYTES + len(request.prompts) * (HEAD_BYTES + options.max_new_tokens * TOKEN_BYTES)
        answered = self._ask("POST", GENERATE, body, timeout_s, most)
        if not isinstance(answered, list) or len(answered) != len(request.prompts):
            raise self._torn(GENERATE, f"expected {len(request.prompts)} responses, got {answered!r:.80}")
        try:
            items = tuple(map(_generated, answered))
        except (KeyError, TypeError, ValueError) as error:
            raise self._torn(GENERATE, f"{type(error).__name__}: {error}") from error
        return GenerateReply(info.target_revision, items)

    def close_sink(self, sink: Sink) -> None:
        with contextlib.suppress(EngineError):
            self._order((0,), Order(close=CloseSink(sink)), GOODBYE_S, HEAD_BYTES)

    def close(self) -> None:
        self._http.close()

    def _known(self, timeout_s: float) -> ServerInfo:
        with self._lock:
            info = self._info
        return info if info is not None else self.info(timeout_s)

    def _check_draws_by_seed(self, timeout_s: float) -> None:
        answered = self._ask("GET", SERVER_INFO, None, timeout_s, HEAD_BYTES)
        if not isinstance(answered, dict) or answered.get("enable_deterministic_inference") is not True:
            raise self._refused(
                "does not draw by the seed of a request: its responses could not be made again; start it with "
                "--enable-deterministic-inference, or generate greedily"
            )

    def _capture_one(
        self, info: ServerInfo, request: CaptureRequest, item: CaptureItem, timeout_s: float
    ) -> tuple[str, CapturedItem, dict[str, Tensor] | None]:
        """The server's revision, the item, and its tensors where they are inline."""
        num_tokens = len(item.input_ids)
        # an id outside the vocabulary would end SGLang's scheduler, and with it the server
        reason = _unfit(item.input_ids, 0, info)
        if reason:
            failure = ItemFailure("prompt", f"it {reason}")
            return (
                info.target_revision,
                CapturedItem(item.sample_id, item.generation, num_tokens, failure=failure),
                None,
            )
        most = HEAD_BYTES
        if request.sink.kind == "inline":
            most += 2 * expected_features(request.spec, info.hidden_size, num_tokens)[1]
        named = replace(item, input_ids=())
        receipt = self._order(item.input_ids, Order(replace(request, items=(named,))), timeout_s, most)
        if receipt.item is None:
            raise self._torn(GENERATE, "a receipt without an item")
        tensors = self._tensors(receipt) if receipt.item.failure is None and receipt.item.store == "inline" else None
        return receipt.info.target_revision, receipt.item, tensors

    def _order(self, token_ids: Sequence[int], order: Order, timeout_s: float, max_bytes: int) -> Receipt:
        """The receipt of ``order``, which was not refused."""
        receipt = self._receipt(self._ask("POST", GENERATE, _ordered(token_ids, order), timeout_s, max_bytes))
        if receipt.refusal is not None:
            raise self._explained(receipt.refusal)
        return receipt

    def _explained(self, refusal: Refusal) -> EngineError:
        said = f"the capture server {self.url} refused: {refusal.reason}"
        if refusal.what == "busy":
            return ServerBusy(said)
        return ServerUnavailable(said) if refusal.what == "engine" else ServerRefused(said)

    def _receipt(self, answered: Any) -> Receipt:
        try:
            said = answered["meta_info"]
            finish = said["finish_reason"]
            if finish["type"] == "abort":
                raise ServerUnavailable(
                    f"the capture server {self.url} gave up a request: {finish.get('message')!s:.300}"
                )
            receipts = said.get(FIELD)
        except (KeyError, TypeError, AttributeError) as error:
            raise self._torn(GENERATE, f"{type(error).__name__}: {error}") from error
        if not receipts:
            raise self._refused(
                "is an SGLang without SpecForge's plug-in, or one that keeps no hidden states (its log says which); "
                "start it as docs/howto/sglang-capture.md says"
            )
        try:
            return RECEIPT.read(receipts[0])
        except (ContractError, TypeError, KeyError, IndexError) as error:
            raise self._refused(
                f"has a SpecForge plug-in of another version ({error}); install the same specforge on both sides"
            ) from None

    def _tensors(self, receipt: Receipt) -> dict[str, Tensor]:
        item = receipt.item
        assert item is not None
        try:
            data = bytearray(base64.b64decode(receipt.data, validate=True))
        except ValueError as error:
            raise self._torn(GENERATE, f"its features are not base64 ({error})") from error
        if len(data) != item.num_bytes:
            raise self._torn(GENERATE, f"{len(data):,} of {item.num_bytes:,} bytes of features")
        own = torch.empty(len(data), dtype=torch.uint8)
        own.copy_(torch.frombuffer(data, dtype=torch.uint8))
        try:
            return views(own, item.features)
        except (KeyError, RuntimeError) as error:
            raise self._torn(GENERATE, f"features that do not fit their bytes ({error})") from error

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, max_bytes: int) -> Any:
        """The JSON of the answer, which is none of the refusals."""
        content = None if body is None else json.dumps(body).encode()
        answer = self._http.send(method, path, content, timeout_s, max_bytes)
        if answer.status == 200:
            try:
                return json.loads(bytes(answer.body))
            except ValueError as error:
                raise self._torn(path, f"not JSON: {error}") from error
        said = f"the capture server {self.url} answered {path} with {answer.status}: {_reason(answer)}"
        if answer.status == 503:
            raise ServerBusy(said)
        if answer.status >= 500 or answer.status in LATER:
            raise ServerUnavailable(said)
        raise ServerRefused(said + _ADVICE.get(answer.status, "; its version of SGLang may want another request"))

    def _refused(self, what: str) -> ServerRefused:
        return ServerRefused(f"the capture server {self.url} {what}")

    def _torn(self, path: str, why: str) -> ServerUnavailable:
        return ServerUnavailable(f"the capture server {self.url} answered {path} with what is none: {why}")


_PLAIN: dict[str, Any] = {
    # a model's directory may name defaults for these, and SGLang takes them
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def _ordered(token_ids: Sequence[int], order: Order) -> dict[str, Any]:
    """A request with ``order``. Its ``extra_key`` keeps the prefix cache out, which has no hidden states."""
    rid = RID_PREFIX + uuid.uuid4().hex
    return {
        "rid": rid,
        "extra_key": rid,
        "input_ids": list(token_ids),
        "sampling_params": {
            "max_new_tokens": 1,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "ignore_eos": True,
            "custom_params": {FIELD: json.dumps(write_order(order))},
            **_PLAIN,
        },
    }


def _generated(answered: Any) -> GeneratedItem:
    """SGLang keeps the stop token in ``output_ids``."""
    token_ids, finish = answered["output_ids"], answered["meta_info"]["finish_reason"]["type"]
    if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
        raise ValueError(f"token ids {token_ids!r:.80}")
    if finish not in {"stop", "length"}:
        raise ValueError(f"a response that ended by {finish!r}")
    return GeneratedItem(tuple(token_ids), finish == "stop")


def _unfit(token_ids: Sequence[int], num_new: int, info: ServerInfo) -> str | None:
    """Why the server of ``info`` does not take a prompt."""
    if not token_ids:
        return "has no tokens; expected at least one"
    if max(token_ids) >= info.vocab_size or min(token_ids) < 0:
        return f"has token ids outside the vocabulary of {info.vocab_size}"
    if len(token_ids) + num_new > info.max_tokens:
        return (
            f"has {len(token_ids)} tokens" + (f" before {num_new} new ones" if num_new else "") + ", the server takes "
            f"{info.max_tokens}; shorten it, or start SGLang with a larger --context-length or --max-total-tokens"
        )
    return None


def _reason(answer: Answer) -> str:
    """What SGLang says of an error; the beginning of what another answer says."""
    text = bytes(answer.body[:4096]).decode(errors="replace")
    try:
        said = json.loads(text)["error"]
        return str(said["message"] if isinstance(said, dict) else said)[:500]
    except (ValueError, KeyError, TypeError):
        return repr(text[:100])
