"""SpecforgeServer: a capture server that speaks the capture protocol as it is (``specforge serve-target``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from specforge.contracts import capture_wire as wire
from specforge.contracts.capture_server import (
    PROTOCOL,
    CaptureReply,
    CaptureRequest,
    CloseSink,
    GenerateReply,
    GenerateRequest,
    ServerInfo,
    Sink,
)
from specforge.contracts.codec import Form
from specforge.contracts.features import ALIGNMENT
from specforge.data_plane.inline import MEDIA_TYPE, read_inline
from specforge.errors import (
    ContractError,
    CorruptFeature,
    PromptRefused,
    ServerUnavailable,
)
from specforge.inference.servers.base import Captured
from specforge.inference.servers.http_client import Answer, ServerHttp, Unfit, refusal

JSON = "application/json"
HEAD_BYTES = 64 << 10
ITEM_BYTES = 8 << 10
"""Room in an answer for what is said beside features and tokens, in all and for every item."""
TOKEN_BYTES = 12
"""A token id in JSON, at most."""
GOODBYE_S = 10.0

ReplyT = TypeVar("ReplyT")


class SpecforgeServer:
    """The server at ``url`` (``http://host:port``), which wants ``token``. See ``CaptureServer``."""

    def __init__(self, url: str, token: str | None = None, max_connections: int = 16) -> None:
        self.url = url.rstrip("/")
        self._http = ServerHttp(self.url, token, max_connections)
        self._hidden_size: int | None = None

    def info(self, timeout_s: float) -> ServerInfo:
        answer = self._ask("GET", "/v1/info", None, timeout_s, HEAD_BYTES)
        info = self._read("/v1/info", wire.INFO, answer)
        self._hidden_size = info.hidden_size
        return info

    def capture(self, request: CaptureRequest, timeout_s: float) -> Captured:
        path, body = "/v1/capture", wire.CAPTURE[0].write(request)
        try:
            answer = self._ask("POST", path, body, timeout_s, self._most_bytes(request, timeout_s))
        except Unfit as error:
            if self._is_about_the_prompt(request, body, timeout_s):
                raise PromptRefused(str(error)) from None
            raise
        if request.sink.kind != "inline":
            reply: CaptureReply = self._read(path, wire.CAPTURE[1], answer)
            return Captured(reply, (None,) * len(reply.items))
        self._check_media_type(path, MEDIA_TYPE, answer)
        try:
            reply, tensors = read_inline(answer.body)
        except (ContractError, CorruptFeature, ValueError) as error:
            raise self._torn(path, error) from error
        return Captured(reply, tuple(tensors))

    def generate(self, request: GenerateRequest, timeout_s: float) -> GenerateReply:
        path = "/v1/generate"
        most = HEAD_BYTES + len(request.prompts) * (ITEM_BYTES + TOKEN_BYTES * request.generate.max_new_tokens)
        try:
            answer = self._ask("POST", path, wire.GENERATE[0].write(request), timeout_s, most)
        except Unfit as error:
            # A reply to this has no place for what is wrong with one prompt.
            raise PromptRefused(str(error)) from None
        return self._read(path, wire.GENERATE[1], answer)

    def close_sink(self, sink: Sink) -> None:
        self._ask("POST", "/v1/sinks/close", wire.CLOSE_SINK.write(CloseSink(sink)), GOODBYE_S, HEAD_BYTES)

    def close(self) -> None:
        self._http.close()

    def _most_bytes(self, request: CaptureRequest, timeout_s: float) -> int:
        """What the answer to ``request`` may have."""
        said = HEAD_BYTES + ITEM_BYTES * len(request.items)
        if request.sink.kind != "inline":
            return said
        hidden_size = self._hidden_size or self.info(timeout_s).hidden_size
        sizes = [request.spec.layout(hidden_size, len(item.input_ids))[1] for item in request.items]
        return said + sum(sizes) + ALIGNMENT * len(sizes)

    def _ask(self, method: str, path: str, body: bytes | None, timeout_s: float, max_bytes: int) -> Answer:
        """The answer, which is none of the refusals."""
        answer = self._http.send(method, path, body, timeout_s, max_bytes)
        if answer.status == 200:
            return answer
        raise refusal(self.url, path, answer, _ADVICE, "; check its address")

    def _is_about_the_prompt(self, request: CaptureRequest, body: bytes, timeout_s: float) -> bool:
        """Whether a request was refused for what its one sample is: nobody could read it, or it is too large."""
        try:
            wire.read_capture(body)
        except ContractError:
            return True
        if request.sink.kind != "inline" or len(request.items) > 1 or len(request.items[0].input_ids) < 2:
            return False
        # Does the server take the first token alone? Its features come back, and nothing of it is kept.
        item = replace(request.items[0], input_ids=request.items[0].input_ids[:1])
        body = wire.CAPTURE[0].write(replace(request, items=(item,)))
        try:
            self._ask("POST", "/v1/capture", body, timeout_s, 2 * self._most_bytes(request, timeout_s))
        except Unfit:
            return False
        return True

    def _read(self, path: str, form: Form[ReplyT], answer: Answer) -> ReplyT:
        self._check_media_type(path, JSON, answer)
        try:
            return form.read(bytes(answer.body))
        except ContractError as error:
            raise self._torn(path, error) from error

    def _check_media_type(self, path: str, expected: str, answer: Answer) -> None:
        if answer.media_type != expected:
            raise ServerUnavailable(
                f"the capture server {self.url} answered {path} with {answer.media_type or 'no media type'!r}, "
                f"expected {expected!r}"
            )

    def _torn(self, path: str, error: Exception) -> ServerUnavailable:
        return ServerUnavailable(f"the capture server {self.url} answered {path} with what is none: {error}")


_ADVICE = {
    wire.STATUS["token"]: "; give the run the token that the server was started with",
    wire.STATUS["request"]: "",
    wire.STATUS["model"]: "; start it with the target of the run",
    404: f"; what listens there does not speak version {PROTOCOL} of the capture protocol: check address and version",
    405: f"; what listens there does not speak version {PROTOCOL} of the capture protocol: check address and version",
}
