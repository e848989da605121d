"""VllmServer: a vLLM server with the SpecForge connector (``inference/plugins/vllm_connector.py``) inside.

A sample is a request for a completion of its tokens. Layer ids are converted on the connector's side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from specforge.contracts.capture_server import GeneratedItem, GenerateRequest, ServerInfo
from specforge.inference.plugins.orders import FIELD, NUM_HOLD_TOKENS, Order, write_order
from specforge.inference.servers.ordered import HEAD_BYTES, OrderedServer, generated

_PLAIN: dict[str, Any] = {
    "add_special_tokens": False,
    # a model's directory may name defaults for these, and vLLM takes them
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
}


class VllmServer(OrderedServer):
    """See :class:`OrderedServer`."""

    engine = "vLLM"
    page = "docs/howto/vllm-capture.md"
    path = "/v1/completions"
    longer = "--max-model-len"
    _model = ""
    """The name under which vLLM serves the target."""

    def discover(self, timeout_s: float) -> ServerInfo:
        answered = self.ask("GET", "/v1/models", None, timeout_s, HEAD_BYTES)
        try:
            self._model = str(answered["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise self.torn("/v1/models", f"{type(error).__name__}: {error}") from error
        asked = self._completion((0,), Order(), 1)
        return self.receipt(self.ask("POST", self.path, asked, timeout_s, HEAD_BYTES)).info

    def ordered(self, token_ids: Sequence[int], order: Order) -> dict[str, Any]:
        return self._completion(token_ids, order, NUM_HOLD_TOKENS)

    def receipt_in(self, answered: Any) -> str | None:
        parameters = answered.get("kv_transfer_params")
        if not isinstance(parameters, dict) or FIELD not in parameters:
            return None
        return json.dumps(parameters[FIELD])

    def generation(self, request: GenerateRequest, timeout_s: float) -> dict[str, Any]:
        options, version = request.generate, self.known(timeout_s).engine_version
        # On a CPU its sampler gets no temperature where a request speculates, as all do that extract.
        if options.temperature > 0 and version.endswith(" on cpu"):
            raise self.refused(f"({version}) draws wrongly while it captures; generate greedily")
        return {
            "model": self._model,
            "prompt": [list(prompt) for prompt in request.prompts],
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": options.top_k,
            "seed": options.seed,
            "return_token_ids": True,
            **_PLAIN,
        }

    def responses_in(self, answered: Any) -> list[GeneratedItem]:
        items = {
            choice["index"]: generated(choice["token_ids"], choice["finish_reason"]) for choice in answered["choices"]
        }
        return [items[index] for index in range(len(items))]

    def _completion(self, token_ids: Sequence[int], order: Order, num_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model,
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
