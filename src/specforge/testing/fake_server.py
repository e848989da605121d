"""A capture server that misbehaves on purpose: real HTTP on loopback, made-up features, faults by the name.

For authors of dialects, and of whatever works with capture servers: what comes of each fault must be a retry, a
quarantined prompt or a refusal that names the server and the reason, and never a wrong feature.
"""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch

from specforge.contracts import capture_wire as wire
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.capture_server import (
    PROTOCOL,
    CapturedItem,
    CaptureItem,
    CaptureReply,
    CaptureRequest,
    GeneratedItem,
    GenerateReply,
    ItemFailure,
    ServerInfo,
    Sink,
)
from specforge.data_plane.base import FeatureStore, PutRequest
from specforge.data_plane.encoding import encoded
from specforge.data_plane.inline import MEDIA_TYPE, write_inline
from specforge.data_plane.tensors import Source, specs_of
from specforge.errors import ContractError

Fault = Literal[
    "never",  # no byte of an answer
    "slow",  # the right answer, after ``slow_s``
    "trickle",  # the right answer, a byte now and then
    "trickled_head",  # a head that never ends
    "hang_up",  # the connection is closed before the answer
    "cut",  # ... in the middle of its body
    "long_length",  # Content-Length promises more than is there
    "short_length",  # ... and less
    "truncated",  # an answer in itself, whose body lacks its end
    "huge",  # more bytes than any answer has
    "garbage",  # 200, and no JSON
    "page",  # 200, and a page of HTML
    "moved",  # a redirect
    "broken",  # 500
    "busy",  # 503
    "unfit",  # 422
    "unauthorized",  # 401
    "other_revision",  # features of another target
    "other_width",
    "fewer_layers",
    "fewer_tokens",
    "nan",
    "swapped",  # the answer to another sample
    "swapped_tokens",  # features of other tokens under the right name
    "duplicate",  # the sample twice
    "prompt",  # says that the prompt cannot be captured
    "no_room",  # says that the store is full
]

JSON = "application/json"


def made_features(
    input_ids: Sequence[int], spec: CaptureSpec, hidden_size: int, num_layers: int | None = None
) -> dict[str, Source]:
    """Features that depend on the tokens, and on nothing else; ``num_layers`` of ``spec.aux_layers``."""
    draw = torch.Generator().manual_seed(hash(tuple(input_ids)) % 2**31)
    shape = len(input_ids), hidden_size
    layers = [torch.randn(shape, generator=draw) for _ in spec.aux_layers][:num_layers]
    made: dict[str, Source] = {"input_ids": torch.tensor(list(input_ids), dtype=torch.int32)}
    if layers:
        made |= encoded("aux", layers, spec.dtype)
    if spec.last_hidden:
        made |= encoded("last", [torch.randn(shape, generator=draw)], spec.dtype)
    return made


class FakeServer:
    """Serves at ``url`` between ``start`` and ``stop``, and again on the same port after another ``start``.

    Requests to capture meet ``faults`` one after the other, and ``always`` when these are used up. ``poison``: samples
    that kill the server (``hang_up``) whenever they are asked for. ``store``: where features go for sinks that are not
    inline. ``most_tokens`` of a sample: a longer one is refused as unfit. ``captured`` lists what was asked for,
    (sample id, generation), whatever came of it; ``closed`` the sinks that were.
    """

    def __init__(
        self,
        target: TargetInfo,
        *,
        faults: Sequence[Fault] = (),
        always: Fault | None = None,
        poison: Sequence[str] = (),
        store: FeatureStore | None = None,
        token: str | None = None,
        max_in_flight: int = 8,
        slow_s: float = 0.5,
    ) -> None:
        self.most_tokens: int | None = None
        self.closed: list[Sink] = []
        self.target, self.faults, self.always, self.poison = target, deque(faults), always, set(poison)
        self.store, self.token, self.slow_s = store, token, slow_s
        self.info = ServerInfo(
            protocol=PROTOCOL,
            engine="fake",
            engine_version="1",
            target_revision=target.revision,
            num_layers=target.num_layers,
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            dtype="float32",
            layers=None,
            last_hidden=True,
            sinks=("inline", "shared_memory", "shared_dir", "mooncake"),
            strict=True,
            max_tokens=target.max_position_embeddings,
            max_in_flight=max_in_flight,
        )
        self.captured: list[tuple[str, int]] = []
        self.num_infos = 0
        self.most_in_flight = 0
        self._num_in_flight = 0
        self._lock = threading.Lock()
        self._port = 0
        self._http: _Http | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> FakeServer:
        self._http = _Http(("127.0.0.1", self._port), self)
        self._port = self._http.server_address[1]
        self._http.begin()
        return self

    def stop(self) -> None:
        """As a process that dies: connections are reset, requests in flight get nothing. Idempotent."""
        if self._http is not None:
            self._http.die()
            self._http = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def next_fault(self, request: CaptureRequest) -> Fault | None:
        with self._lock:
            self.captured += [(item.sample_id, item.generation) for item in request.items]
            if self.poison.intersection(item.sample_id for item in request.items):
                return "hang_up"
            if self.most_tokens and max(len(item.input_ids) for item in request.items) > self.most_tokens:
                return "unfit"
            return self.faults.popleft() if self.faults else self.always

    @contextlib.contextmanager
    def counted(self) -> Any:
        with self._lock:
            self._num_in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._num_in_flight)
        try:
            yield
        finally:
            with self._lock:
                self._num_in_flight -= 1

    def reply(
        self, request: CaptureRequest, fault: Fault | None
    ) -> tuple[CaptureReply, list[dict[str, Source] | None]]:
        """What is answered, and the tensors of an inline answer."""
        items, tensors = [], []
        for item in request.items:
            answered, made = self._item(item, request, fault)
            items += [answered] * (2 if fault == "duplicate" else 1)
            tensors += [made] * (2 if fault == "duplicate" else 1)
        revision = "another" if fault == "other_revision" else self.target.revision
        return CaptureReply(revision, tuple(items)), tensors

    def _item(
        self, item: CaptureItem, request: CaptureRequest, fault: Fault | None
    ) -> tuple[CapturedItem, dict[str, Source] | None]:
        num_tokens = len(item.input_ids)
        if fault in {"prompt", "no_room"}:
            failure = ItemFailure("prompt" if fault == "prompt" else "store", f"made up: {fault}")
            return CapturedItem(item.sample_id, item.generation, num_tokens, failure=failure), None
        made = self._made(item, request.spec, fault)
        sample_id = "another" if fault == "swapped" else item.sample_id
        num_tokens -= fault == "fewer_tokens"
        specs, num_bytes = specs_of(made)
        kind = request.sink.kind
        answer = CapturedItem(sample_id, item.generation, num_tokens, kind, "", num_bytes, specs)
        if kind == "inline":
            return answer, made
        assert self.store is not None, "a sink that is not inline needs the store behind it"
        (stored,) = self.store.put([PutRequest(item.sample_id, item.generation, made)])
        return replace(answer, key=stored.key), None

    def _made(self, item: CaptureItem, spec: CaptureSpec, fault: Fault | None) -> dict[str, Source]:
        ids, width, num_layers = list(item.input_ids), self.target.hidden_size, None
        if fault == "fewer_tokens":
            ids = ids[:-1]
        elif fault == "swapped_tokens":
            ids = ids[::-1]
        elif fault == "other_width":
            width *= 2
        elif fault == "fewer_layers":
            num_layers = len(spec.aux_layers) - 1
        made = made_features(ids, spec, width, num_layers)
        if fault == "nan":
            last = next(name for name in reversed(made) if name != "input_ids")
            made[last] = torch.full(tuple(made[last].shape), torch.nan)
        return made


class _Http(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], fake: FakeServer) -> None:
        super().__init__(address, _Handler)
        self.fake = fake
        self.dying = threading.Event()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="fake server", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def die(self) -> None:
        self.dying.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base class
        """Nothing."""

    def do_GET(self) -> None:
        if not self._may_come_in():
            return
        self.server.fake.num_infos += 1
        if self.path == "/v1/info":
            self._answer(200, JSON, wire.INFO.write(self.server.fake.info))
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._may_come_in():
            return
        if self.path == "/v1/capture":
            try:
                request = wire.read_capture(body)
            except ContractError as error:
                self._refuse("request", str(error))
                return
            with self.server.fake.counted():
                self._capture(request, self.server.fake.next_fault(request))
        elif self.path == "/v1/generate":
            asked = wire.read_generate(body)
            # The prompt backwards is answer enough.
            made = tuple(GeneratedItem(row[::-1][: asked.generate.max_new_tokens], False) for row in asked.prompts)
            self._answer(200, JSON, wire.GENERATE[1].write(GenerateReply(self.server.fake.target.revision, made)))
        elif self.path == "/v1/sinks/close":
            self.server.fake.closed.append(wire.CLOSE_SINK.read(body).sink)
            self._answer(200, JSON, b"{}")
        else:
            self.send_error(404)

    def _may_come_in(self) -> bool:
        token = self.server.fake.token
        if token is None or self.headers.get("Authorization") == f"Bearer {token}":
            return True
        self._refuse("token", "who are you?")
        return False

    def _capture(self, request: CaptureRequest, fault: Fault | None) -> None:
        refusals: dict[str | None, wire.What] = {"broken": "engine", "busy": "busy", "unfit": "request"}
        if fault in refusals:
            self._refuse(refusals[fault], f"made up: {fault}")
        elif fault == "unauthorized":
            self._refuse("token", f"made up: {fault}")
        elif fault == "never":
            self._hold(3600.0)
        elif fault == "hang_up":
            self.close_connection = True
        elif fault == "moved":
            self._answer(302, JSON, b"", Location="/v1/info")
        elif fault == "garbage":
            self._answer(200, self._media_type(request), b"\xff{not what you think")
        elif fault == "page":
            self._answer(200, "text/html", b"<h1>It works!</h1>")
        elif fault == "huge":
            self._answer(200, self._media_type(request), bytes(8 << 20))
        else:
            self._deliver(request, fault)

    def _deliver(self, request: CaptureRequest, fault: Fault | None) -> None:
        reply, tensors = self.server.fake.reply(request, fault)
        kind, body = self._media_type(request), wire.CAPTURE[1].write(reply)
        if request.sink.kind == "inline":
            body = bytes(write_inline(reply, tensors))
        if fault == "slow":
            self._hold(self.server.fake.slow_s)
        if fault == "truncated":
            body = body[:-64]
        if fault == "trickled_head":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self._trickle(b"x" * 100_000)
        elif fault in {"trickle", "cut", "long_length"}:
            more = 10 if fault == "long_length" else 0
            self._head(200, kind, len(body) + more)
            if fault == "trickle":
                self._trickle(body)
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
            self.close_connection = True
        elif fault == "short_length":
            self._head(200, kind, len(body) - 10)
            self.wfile.write(body)
            self.close_connection = True
        else:
            self._answer(200, kind, body)

    @staticmethod
    def _media_type(request: CaptureRequest) -> str:
        return MEDIA_TYPE if request.sink.kind == "inline" else JSON

    def _hold(self, seconds: float) -> None:
        """As long as the server lives."""
        if self.server.dying.wait(seconds):
            raise ConnectionResetError

    def _trickle(self, data: bytes) -> None:
        give_up_at = time.monotonic() + 3600.0
        for position in range(len(data)):
            self.wfile.write(data[position : position + 1])
            self._hold(0.02)
            if time.monotonic() > give_up_at:
                return

    def _refuse(self, what: wire.What, reason: str) -> None:
        self._answer(wire.STATUS[what], JSON, wire.REFUSAL.write(wire.Refusal(what, reason)))

    def _answer(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self._head(status, kind, len(body), **headers)
        self.wfile.write(body)

    def _head(self, status: int, kind: str, num_bytes: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(num_bytes), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
