"""The dialect against a server that answers as vLLM does, and as it should not."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import (
    CapturedItem,
    CaptureItem,
    CaptureRequest,
    Generate,
    GenerateRequest,
    InlineSink,
    ServerInfo,
    SharedMemorySink,
    Sink,
)
from specforge.contracts.capture_wire import Refusal
from specforge.data_plane.tensors import fill, specs_of
from specforge.errors import PromptRefused, ServerBusy, ServerRefused, ServerUnavailable
from specforge.inference.plugins.orders import FIELD, RECEIPT, Order, Receipt, read_order, write_order
from specforge.inference.servers.base import Captured
from specforge.inference.servers.vllm import VllmServer

INFO = ServerInfo(
    protocol=1,
    engine="vllm",
    engine_version="0.32.0 on cuda",
    target_revision="revision",
    num_layers=8,
    hidden_size=4,
    vocab_size=32,
    dtype="float32",
    layers=(1, 3, 7),
    last_hidden=True,
    sinks=("inline", "shared_memory"),
    strict=False,
    max_tokens=100,
    max_in_flight=8,
)
SPEC = CaptureSpec((1, 3), True)
MEMORY = SharedMemorySink("run", 1 << 20, 64)
TIMEOUT_S = 60.0


class FakeVllm(ThreadingHTTPServer):
    """Answers orders as the connector does. ``broken`` is what it answers to the completions of captures instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.info = INFO
        self.bodies: list[dict[str, Any]] = []
        self.broken: tuple[int, bytes] | None = None
        self.refusal: Refusal | None = None
        self.cut: str | None = None
        self.silent = threading.Event()
        self.released = threading.Event()

    def answer(self, path: str, token: str | None, body: dict[str, Any] | None) -> tuple[int, bytes]:
        if token != "Bearer key":
            return 401, b'{"error": "Unauthorized"}'
        if path == "/v1/models":
            return 200, json.dumps({"object": "list", "data": [{"id": "the-target", "max_model_len": 108}]}).encode()
        assert body is not None
        assert path == "/v1/completions"
        self.bodies.append(body)
        if "kv_transfer_params" not in body:
            return 200, json.dumps(self.responses(body)).encode()
        order = read_order(body["kv_transfer_params"][FIELD])
        if order.capture is not None and self.silent.is_set():
            self.released.wait(TIMEOUT_S)
        if order != Order() and self.broken is not None:
            return self.broken
        receipt = json.loads(RECEIPT.write(self.receipt(order, body["prompt"])))
        return 200, json.dumps({"id": "cmpl-1", "choices": [], "kv_transfer_params": {FIELD: receipt}}).encode()

    def receipt(self, order: Order, prompt: list[int]) -> Receipt:
        if order.capture is None or self.refusal is not None:
            return Receipt(self.info, refusal=self.refusal if order != Order() else None)
        (item,) = order.capture.items
        names = item.sample_id, item.generation, len(prompt)
        if order.capture.sink.kind != "inline":
            features, num_bytes = order.capture.spec.layout(4, len(prompt))
            return Receipt(self.info, CapturedItem(*names, "shared_memory", "arena:0:1", num_bytes, features))
        tensors = features_of(prompt)
        specs, num_bytes = specs_of(tensors)
        buffer = torch.zeros(num_bytes, dtype=torch.uint8)
        fill(buffer, specs, tensors)
        data = base64.b64encode(bytes(buffer.tolist())).decode()
        return Receipt(self.info, CapturedItem(*names, "inline", "0", num_bytes, specs), data=data)

    def responses(self, body: dict[str, Any]) -> dict[str, Any]:
        """In no order: each prompt continues with its successors, until 31 ends it."""
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            new = [prompt[-1] + step for step in range(1, body["max_tokens"] + 1)]
            stopped = 31 in new
            new = new[: new.index(31) + 1] if stopped else new
            reason = self.cut or ("stop" if stopped else "length")
            choices.append({"index": index, "text": "", "token_ids": new, "finish_reason": reason})
        return {"choices": choices[::-1], "kv_transfer_params": None}


class _Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: dict[str, Any] | None) -> None:
        status, content = self.server.answer(self.path, self.headers.get("Authorization"), body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def features_of(prompt: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(prompt, dtype=torch.int32)
    aux = ids[:, None].float() * torch.arange(8.0)
    return {"input_ids": ids, "aux": aux, "last": -ids[:, None].float() * torch.ones(4)}


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    server = FakeVllm()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(fake: FakeVllm) -> Iterator[VllmServer]:
    connection = VllmServer(fake.url, "key")
    yield connection
    connection.close()


def request_of(sink: Sink, *prompts: tuple[int, ...]) -> CaptureRequest:
    items = tuple(CaptureItem(f"sample-{number}", 1, prompt) for number, prompt in enumerate(prompts))
    return CaptureRequest(items, SPEC, sink, "revision")


def captured(server: VllmServer, *prompts: tuple[int, ...], sink: Sink = MEMORY) -> Captured:
    return server.capture(request_of(sink, *prompts), TIMEOUT_S)


def test_info_is_what_the_connector_says(server: VllmServer, fake: FakeVllm):
    assert server.info(TIMEOUT_S) == INFO
    assert fake.bodies[0]["model"] == "the-target"
    fake.info = ServerInfo(**{**{name: getattr(INFO, name) for name in INFO.__slots__}, "target_revision": "other"})
    assert server.info(TIMEOUT_S).target_revision == "other"


def test_sample_is_a_completion_with_an_order(server: VllmServer, fake: FakeVllm):
    answer = captured(server, (5, 6, 7))
    (item,) = answer.reply.items
    assert (answer.reply.target_revision, item.store, item.num_tokens, item.failure) == (
        "revision",
        "shared_memory",
        3,
        None,
    )
    body = fake.bodies[-1]
    assert (body["prompt"], body["temperature"], body["ignore_eos"]) == ([5, 6, 7], 0.0, True)
    # enough tokens for the connector to report before the request ends
    assert body["max_tokens"] == body["min_tokens"] == 4
    order = read_order(body["kv_transfer_params"][FIELD])
    assert order.capture == CaptureRequest((CaptureItem("sample-0", 1, ()),), SPEC, MEMORY, "revision")


def test_items_of_a_request_come_back_in_order_and_unfit_ones_alone_fail(server: VllmServer):
    prompts = [(1, 2), (), (3,), (32,), (4,) * 101, (9, 8, 7)]
    answer = captured(server, *prompts, sink=InlineSink())
    items = answer.reply.items
    assert [item.sample_id for item in items] == [f"sample-{number}" for number in range(6)]
    assert [item.failure is None for item in items] == [True, False, True, False, False, True]
    assert {item.failure.whose for item in items if item.failure is not None} == {"prompt"}
    for prompt, tensors in zip(prompts, answer.tensors, strict=True):
        if tensors is not None:
            assert all(torch.equal(tensors[name], value) for name, value in features_of(list(prompt)).items())
    assert [tensors is None for tensors in answer.tensors] == [False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("request", ServerRefused),
        ("model", ServerRefused),
        ("busy", ServerBusy),
        ("engine", ServerUnavailable),
    ],
)
def test_refusals_of_the_connector(server: VllmServer, fake: FakeVllm, what: Any, expected: type[Exception]):
    fake.refusal = Refusal(what, "for a reason")
    with pytest.raises(expected, match="for a reason") as raised:
        captured(server, (5,))
    assert type(raised.value) is expected
    assert fake.url in str(raised.value)


@pytest.mark.parametrize(
    ("broken", "expected", "said"),
    [
        ((500, b'{"error": {"message": "it broke"}}'), ServerUnavailable, "it broke"),
        ((503, b""), ServerBusy, "503"),
        ((429, b""), ServerUnavailable, "429"),
        ((400, b'{"error": {"message": "too long"}}'), PromptRefused, "too long"),  # one token is taken
        ((404, b"<html>"), ServerRefused, "no vLLM server"),
        ((200, b"{"), ServerUnavailable, "not JSON"),
        ((200, b"[]"), ServerUnavailable, "what is none: AttributeError"),
        ((200, b"{}"), ServerRefused, "without the SpecForge plug-in"),
        ((200, b'{"kv_transfer_params": {"other": 1}}'), ServerRefused, "without the SpecForge plug-in"),
        ((200, b'{"kv_transfer_params": {"specforge": {"info": 1}}}'), ServerRefused, "another version"),
        (
            (200, json.dumps({"kv_transfer_params": {FIELD: json.loads(RECEIPT.write(Receipt(INFO)))}}).encode()),
            ServerUnavailable,
            "without an item",
        ),
        ((200, b" " * (1 << 20)), ServerUnavailable, "bytes"),
    ],
)
def test_other_answers_name_server_and_reason(
    server: VllmServer, fake: FakeVllm, broken: tuple[int, bytes], expected: type[Exception], said: str
):
    fake.broken = broken
    with pytest.raises(expected, match=said) as raised:
        captured(server, (5,))
    assert type(raised.value) is expected
    assert fake.url in str(raised.value)


@pytest.mark.parametrize("change", ["short", "not base64"])
def test_torn_inline_features_are_no_answer(
    server: VllmServer, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, change: str
):
    whole = fake.receipt(Order(request_of(InlineSink(), ())), [5, 6])
    data = whole.data[:-8] if change == "short" else "*" + whole.data[1:]
    monkeypatch.setattr(
        fake, "receipt", lambda order, prompt: Receipt(INFO, whole.item if prompt[0] else None, None, data)
    )
    with pytest.raises(ServerUnavailable, match="features"):
        captured(server, (5, 6), sink=InlineSink())


def test_wrong_key_is_named(fake: FakeVllm):
    stranger = VllmServer(fake.url, "another")
    with pytest.raises(ServerRefused, match="api-key"):
        stranger.info(TIMEOUT_S)
    stranger.close()


def test_nobody_there_is_unavailable(fake: FakeVllm):
    gone = VllmServer("http://127.0.0.1:1", "key")
    with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
        gone.info(TIMEOUT_S)
    gone.close()


def test_silent_server_is_left_at_the_deadline_and_when_closed(server: VllmServer, fake: FakeVllm):
    server.info(TIMEOUT_S)
    fake.silent.set()
    with pytest.raises(ServerUnavailable, match="within"):
        server.capture(request_of(MEMORY, (5,)), 0.2)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            captured(server, (5,))
        except ServerUnavailable as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    server.close()
    waiting.join(TIMEOUT_S)
    assert len(errors) == 1


def test_responses_are_in_the_order_of_the_prompts(server: VllmServer, fake: FakeVllm):
    options = Generate(4, temperature=0.5, top_p=0.9, top_k=7, seed=11)
    reply = server.generate(GenerateRequest(((1, 2), (29,), (8,)), options, "revision"), TIMEOUT_S)
    assert [(item.token_ids, item.stopped) for item in reply.items] == [
        ((3, 4, 5, 6), False),
        ((30, 31), True),
        ((9, 10, 11, 12), False),
    ]
    body = fake.bodies[-1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["seed"]) == (0.5, 0.9, 7, 11)
    # not what a model's directory names
    assert (body["repetition_penalty"], body["min_p"], body["return_token_ids"]) == (1.0, 0.0, True)


@pytest.mark.parametrize("reason", ["abort", "error", "repetition"])
def test_response_that_was_cut_short_is_none(server: VllmServer, fake: FakeVllm, reason: str):
    """It would be recorded as the target's, for good."""
    fake.cut = reason
    with pytest.raises(ServerUnavailable, match=f"ended by '{reason}'"):
        server.generate(GenerateRequest(((1, 2),), Generate(4)), TIMEOUT_S)


def test_what_cannot_be_generated_is_refused_before_it_is_asked_for(server: VllmServer, fake: FakeVllm):
    for prompt, reason in (((), "no tokens"), ((99,), "vocabulary"), ((1,) * 98, "98 tokens before 4 new")):
        with pytest.raises(PromptRefused, match=reason):
            server.generate(GenerateRequest(((1,), prompt), Generate(4)), TIMEOUT_S)
    with pytest.raises(ServerRefused, match="another target"):
        server.generate(GenerateRequest(((1,),), Generate(4), "another"), TIMEOUT_S)
    fake.info = ServerInfo(**{**{name: getattr(INFO, name) for name in INFO.__slots__}, "engine_version": "1 on cpu"})
    server.info(TIMEOUT_S)
    with pytest.raises(ServerRefused, match="greedily"):
        server.generate(GenerateRequest(((1,),), Generate(4, temperature=1.0)), TIMEOUT_S)
    assert all(write_order(Order()) == body["kv_transfer_params"][FIELD] for body in fake.bodies)


def test_sink_is_closed_by_an_order_and_a_server_that_is_gone_says_so(server: VllmServer, fake: FakeVllm):
    server.close_sink(MEMORY)
    close = read_order(fake.bodies[-1]["kv_transfer_params"][FIELD]).close
    assert close is not None
    assert close.sink == MEMORY
    fake.broken = 500, b""
    with pytest.raises(ServerUnavailable, match="500"):
        server.close_sink(MEMORY)
