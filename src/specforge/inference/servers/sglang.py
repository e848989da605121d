"""SglangServer: an SGLang server with SpecForge's plug-in (``inference/plugins/sglang_capture.py``) inside.

A sample is a request for one token behind it, with the order in its ``custom_params`` and the receipt in the answer's
``meta_info``. Layer ids are the same on both sides.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from specforge.contracts.capture_server import GeneratedItem, GenerateRequest, ServerInfo
from specforge.errors import ServerUnavailable
from specforge.inference.plugins.orders import FIELD, Order, write_order
from specforge.inference.plugins.sglang_capture import RID_PREFIX
from specforge.inference.servers.ordered import HEAD_BYTES, OrderedServer, generated

SERVER_INFO = "/server_info"

_PLAIN: dict[str, Any] = {
    # a model's directory may name defaults for these, and SGLang takes them
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class SglangServer(OrderedServer):
    """See :class:`OrderedServer`. It draws by a request's seed only with ``--enable-deterministic-inference``."""

    engine = "SGLang"
    page = "docs/howto/sglang-capture.md"
    path = "/generate"
    longer = "--context-length or --max-total-tokens"

    def discover(self, timeout_s: float) -> ServerInfo:
        return self.receipt(self.ask("POST", self.path, self.ordered((0,), Order()), timeout_s, HEAD_BYTES)).info

    def ordered(self, token_ids: Sequence[int], order: Order) -> dict[str, Any]:
        """Its ``extra_key`` keeps the prefix cache out, which has no hidden states."""
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

    def receipt_in(self, answered: Any) -> str | None:
        said = answered["meta_info"]
        finish = said["finish_reason"]
        if finish["type"] == "abort":
            raise ServerUnavailable(f"the capture server {self.url} gave up a request: {finish.get('message')!s:.300}")
        receipts = said.get(FIELD)
        return str(receipts[0]) if receipts else None

    def generation(self, request: GenerateRequest, timeout_s: float) -> dict[str, Any]:
        options = request.generate
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
        return {"input_ids": [list(prompt) for prompt in request.prompts], "sampling_params": sampling}

    def responses_in(self, answered: Any) -> list[GeneratedItem]:
        if not isinstance(answered, list):
            raise TypeError(f"expected a list of responses, got {answered!r:.80}")
        return [_response(each) for each in answered]

    def _check_draws_by_seed(self, timeout_s: float) -> None:
        answered = self.ask("GET", SERVER_INFO, None, timeout_s, HEAD_BYTES)
        if not isinstance(answered, dict) or answered.get("enable_deterministic_inference") is not True:
            raise self.refused(
                "does not draw by the seed of a request: its responses could not be made again; start it with "
                "--enable-deterministic-inference, or generate greedily"
            )


def _response(answered: dict[str, Any]) -> GeneratedItem:
    return generated(answered["output_ids"], answered["meta_info"]["finish_reason"]["type"])
