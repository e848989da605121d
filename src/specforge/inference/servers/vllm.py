"""VllmServer: a vLLM server with the SpecForge connector (``inference/plugins/vllm_connector.py``) inside.

A sample is a request for a completion of its tokens, with the order beside it and the receipt in the answer. Layer ids
are converted on the connector's side.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from specforge.inference.plugins.orders import FIELD, NUM_HOLD_TOKENS, RECEIPT, Order, Receipt, write_order
from specforge.inference.servers.base import Captured, expected_features
from specforge.inference.servers.http_client import Answer, ServerHttp

HEAD_BYTES = 256 << 10
"""Room in an answer for what is said beside features and tokens."""
TOKEN_BYTES = 64
"""A generated token in JSON: its id, and its text."""
GOODBYE_S = 10.0
COMPLETIONS = "/v1/completions"

LATER = {408, 425, 429}
"""Of the statuses that are no server's fault (below 500) those after which the same request may succeed."""

_ADVICE = {
    401: "; give the run the key that the server was started with (--api-key)",
    403: "; give the run the key that the server was started with (--api-key)",
    404: "; what listens there is no vLLM server: check address and dialect",
    405: "; what listens there is no vLLM server: check address and dialect",
}


@dataclass(frozen=True, slots=True)
class _Facts:
    """``model``: the name under which vLLM serves the target."""

    info: ServerInfo
    model: str


class VllmServer:
    """The vLLM server at ``url`` (``http://host:port``), with ``token`` as its API key. See ``CaptureServer``."""

    def __init__(self, url: str, token: str | None = None, max_connections: int = 16) -> None:
        self.url = url.rstrip("/")
        self._http = ServerHttp(self.url, token, max_connections)
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._facts: _Facts | None = None

    def info(self, timeout_s: float) -> ServerInfo:
        """Asks anew: a server that was started again may be another."""
        facts = self._ask_facts(timeout_s)
        with self._lock:
            self._facts = facts
        return facts.info

    def capture(self, request: CaptureRequest, timeout_s: float) -> Captured:
        """One completion a sample; those of one request are in flight together."""
        facts = self._known(timeout_s)
        if len(request.items) == 1:
            answers = [self._capture_one(facts, request, request.items[0], timeout_s)]
        else:
            with ThreadPoolExecutor(min(len(request.items), self._max_connections)) as pool:
                answers = list(pool.map(lambda item: self._capture_one(facts, request, item, timeout_s), request.items))
        revisions = {revision for revision, _, _ in answers}
        if len(revisions) > 1:
            raise ServerUnavailable(f"the capture server {self.url} was started with another target meanwhile")
        reply = CaptureReply(revisions.pop(), tuple(item for _, item, _ in answers))
        return Captured(reply, tuple(tensors for _, _, tensors in answers))

    def generate(self, request: GenerateRequest, timeout_s: float) -> GenerateReply:
        """All prompts in one request. At near-ties a response may depend on its neighbours."""
        facts = self._known(timeout_s)
        info, options = facts.info, request.generate
        if request.target_revision not in (None, info.target_revision):
            raise self._refused(f"has another target (revision {info.target_revision:.16}) than was asked for")
        if options.temperature > 0 and _draws_wrongly(info):
            raise self._refused(f"({info.engine_version}) draws wrongly while it captures; generate greedily")
        for prompt in request.prompts:
            reason = _unfit(prompt, options.max_new_tokens, info)
            if reason:
                raise PromptRefused(f"a prompt for the capture server {self.url} {reason}")
        body = {
            "model": facts.model,
            "prompt": [list(prompt) for prompt in request.prompts],
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "seed": options.seed,
            "return_token_ids": True,
            **_PLAIN,
        }
        most = HEAD_BYTES + len(request.prompts) * options.max_new_tokens * TOKEN_BYTES
        most += TOKEN_BYTES * sum(map(len, request.prompts))
        answered = self._ask("POST", COMPLETIONS, body, timeout_s, most)
        try:
            items = {choice["index"]: _generated(choice) for choice in answered["choices"]}
            found = tuple(items[index] for index in range(len(request.prompts)))
        except (KeyError, TypeError, ValueError) as error:
            raise self._torn(COMPLETIONS, f"{type(error).__name__}: {error}") from error
        return GenerateReply(info.target_revision, found)

    def close_sink(self, sink: Sink) -> None:
        with contextlib.suppress(EngineError):
            self._order(self._known(GOODBYE_S), (0,), Order(close=CloseSink(sink)), GOODBYE_S, HEAD_BYTES)

    def close(self) -> None:
        self._http.close()

    def _known(self, timeout_s: float) -> _Facts:
        with self._lock:
            facts = self._facts
        if facts is None:
            facts = self._ask_facts(timeout_s)
            with self._lock:
                self._facts = facts
        return facts

    def _ask_facts(self, timeout_s: float) -> _Facts:
        answered = self._ask("GET", "/v1/models", None, timeout_s, HEAD_BYTES)
        try:
            name = str(answered["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise self._torn("/v1/models", f"{type(error).__name__}: {error}") from error
        receipt = self._receipt(
            self._ask("POST", COMPLETIONS, _completion(name, (0,), Order(), 1), timeout_s, HEAD_BYTES)
        )
        return _Facts(receipt.info, name)

    def _capture_one(
        self, facts: _Facts, request: CaptureRequest, item: CaptureItem, timeout_s: float
    ) -> tuple[str, CapturedItem, dict[str, Tensor] | None]:
        """The server's revision, the item, and its tensors where they are inline."""
        num_tokens, revision = len(item.input_ids), facts.info.target_revision
        reason = _unfit(item.input_ids, 0, facts.info)
        if reason:
            failure = ItemFailure("prompt", f"it {reason}")
            return revision, CapturedItem(item.sample_id, item.generation, num_tokens, failure=failure), None
        named = replace(item, input_ids=())
        most = HEAD_BYTES
        if request.sink.kind == "inline":
            most += 2 * expected_features(request.spec, facts.info.hidden_size, num_tokens)[1]
        receipt = self._order(facts, item.input_ids, Order(replace(request, items=(named,))), timeout_s, most)
        if receipt.item is None:
            raise self._torn(COMPLETIONS, "a receipt without an item")
        tensors = self._tensors(receipt) if receipt.item.failure is None and receipt.item.store == "inline" else None
        return receipt.info.target_revision, receipt.item, tensors

    def _order(
        self, facts: _Facts, token_ids: Sequence[int], order: Order, timeout_s: float, max_bytes: int
    ) -> Receipt:
        """The receipt of ``order``, which was not refused."""
        body = _completion(facts.model, token_ids, order, NUM_HOLD_TOKENS)
        receipt = self._receipt(self._ask("POST", COMPLETIONS, body, timeout_s, max_bytes))
        if receipt.refusal is not None:
            raise self._explained(receipt.refusal)
        return receipt

    def _explained(self, refusal: Refusal) -> EngineError:
        said = f"the capture server {self.url} refused: {refusal.reason}"
        if refusal.what == "busy":
            return ServerBusy(said)
        return ServerUnavailable(said) if refusal.what == "engine" else ServerRefused(said)

    def _receipt(self, answered: dict[str, Any]) -> Receipt:
        parameters = answered.get("kv_transfer_params")
        if not isinstance(parameters, dict) or FIELD not in parameters:
            raise self._refused(
                "is a vLLM without the SpecForge connector; start it as docs/howto/vllm-capture.md says"
            )
        try:
            return RECEIPT.read(json.dumps(parameters[FIELD]))
        except ContractError as error:
            raise self._refused(
                f"has a SpecForge connector of another version ({error}); install the same specforge on both sides"
            ) from None

    def _tensors(self, receipt: Receipt) -> dict[str, Tensor]:
        item = receipt.item
        assert item is not None
        try:
            data = bytearray(base64.b64decode(receipt.data, validate=True))
        except ValueError as error:
            raise self._torn(COMPLETIONS, f"its features are not base64 ({error})") from error
        if len(data) != item.num_bytes:
            raise self._torn(COMPLETIONS, f"{len(data):,} of {item.num_bytes:,} bytes of features")
        own = torch.empty(len(data), dtype=torch.uint8)
        own.copy_(torch.frombuffer(data, dtype=torch.uint8))
        try:
            return views(own, item.features)
        except (KeyError, RuntimeError) as error:
            raise self._torn(COMPLETIONS, f"features that do not fit their bytes ({error})") from error

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float, max_bytes: int
    ) -> dict[str, Any]:
        """The JSON object of the answer, which is none of the refusals."""
        content = None if body is None else json.dumps(body).encode()
        answer = self._http.send(method, path, content, timeout_s, max_bytes)
        if answer.status == 200:
            try:
                value = json.loads(bytes(answer.body))
            except ValueError as error:
                raise self._torn(path, f"not JSON: {error}") from error
            if not isinstance(value, dict):
                raise self._torn(path, f"not a JSON object: {value!r:.80}")
            return value
        said = f"the capture server {self.url} answered {path} with {answer.status}: {_reason(answer)}"
        if answer.status == 503:
            raise ServerBusy(said)
        if answer.status >= 500 or answer.status in LATER:
            raise ServerUnavailable(said)
        raise ServerRefused(said + _ADVICE.get(answer.status, "; its version of vLLM may want another request"))

    def _refused(self, what: str) -> ServerRefused:
        return ServerRefused(f"the capture server {self.url} {what}")

    def _torn(self, path: str, why: str) -> ServerUnavailable:
        return ServerUnavailable(f"the capture server {self.url} answered {path} with what is none: {why}")


_PLAIN: dict[str, Any] = {
    "add_special_tokens": False,
    # a model's directory may name defaults for these, and vLLM takes them
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
}


def _completion(model: str, token_ids: Sequence[int], order: Order, num_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "ignore_eos": True,
        "min_tokens": num_tokens,
        "kv_transfer_params": {FIELD: write_order(order)},
        **_PLAIN,
    }


def _generated(choice: dict[str, Any]) -> GeneratedItem:
    """vLLM keeps the stop token in ``token_ids``."""
    token_ids = choice["token_ids"]
    if not isinstance(token_ids, list) or not all(type(token) is int for token in token_ids):
        raise ValueError(f"token ids {token_ids!r:.80}")
    return GeneratedItem(tuple(token_ids), choice["finish_reason"] == "stop")


def _unfit(token_ids: Sequence[int], num_new: int, info: ServerInfo) -> str | None:
    """Why no server of this kind takes a prompt."""
    if not token_ids:
        return "has no tokens; expected at least one"
    if max(token_ids) >= info.vocab_size or min(token_ids) < 0:
        return f"has token ids outside the vocabulary of {info.vocab_size}"
    if len(token_ids) + num_new > info.max_tokens:
        return (
            f"has {len(token_ids)} tokens" + (f" before {num_new} new ones" if num_new else "") + ", the server takes "
            f"{info.max_tokens}; shorten it, or start vLLM with a larger --max-model-len"
        )
    return None


def _draws_wrongly(info: ServerInfo) -> bool:
    """vLLM on a CPU gives its sampler no temperature where a request speculates, as all do that extract."""
    return info.engine_version.endswith(" on cpu")


def _reason(answer: Answer) -> str:
    """What vLLM says of an error; the beginning of what another answer says."""
    text = bytes(answer.body[:4096]).decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return repr(text[:100])
