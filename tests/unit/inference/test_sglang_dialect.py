"""SglangServer against answers of a real SGLang with the plug-in, written by ``tests/live_sglang/record_answers.py``.

A small server on loopback gives them again; what it was asked is looked at too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import (
    CaptureItem,
    CaptureRequest,
    Generate,
    GenerateRequest,
    InlineSink,
    SharedMemorySink,
)
from specforge.demo.run import PACKAGED_TARGET
from specforge.errors import ConfigError, PromptRefused, ServerBusy, ServerRefused, ServerUnavailable
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.plugins.orders import RECEIPT
from specforge.inference.plugins.recorder import Recorder, RecorderLimits
from specforge.inference.plugins.sglang_capture import Rows, _Capture, check_version, limits_of
from specforge.inference.servers.base import check_info, verify_capture
from specforge.inference.servers.sglang import SglangServer
from specforge.inference.target import read_target_info

RECORDED = Path(__file__).parent / "recorded" / "sglang-0.5.23"
TIMEOUT_S = 60.0
PROMPT = (5, 6, 7)
SPEC = CaptureSpec((1,), True, "bfloat16")
REQUEST = CaptureRequest((CaptureItem("recorded", 1, PROMPT),), SPEC, InlineSink())


def recorded(name: str) -> dict[str, Any]:
    return dict(json.loads((RECORDED / f"{name}.json").read_text()))


class Replay(ThreadingHTTPServer):
    """Answers from ``answers`` in their order, and with the last one again; ``asked``: (path, body, authorization)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Replayed)
        self.answers: list[dict[str, Any]] = []
        self.asked: list[tuple[str, Any, str | None]] = []

    def will(self, *answers: str | dict[str, Any]) -> None:
        self.answers = [recorded(answer) if isinstance(answer, str) else answer for answer in answers]


class Replayed(BaseHTTPRequestHandler):
    server: Replay
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.asked.append((self.path, json.loads(content or b"null"), self.headers.get("Authorization")))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        body = answer["raw"] if "raw" in answer else json.dumps(answer["body"]).encode()
        self.send_response(answer["status"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815 - the name is the library's

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def replay() -> Iterator[Replay]:
    with Replay() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(replay: Replay) -> Iterator[SglangServer]:
    connection = SglangServer(f"http://127.0.0.1:{replay.server_address[1]}/", "secret")
    yield connection
    connection.close()


def with_receipt(name: str, **changes: Any) -> dict[str, Any]:
    """The recorded answer ``name`` with ``changes`` to its receipt."""
    answer = recorded(name)
    said = answer["body"]["meta_info"]
    said["specforge"] = [json.dumps(json.loads(said["specforge"][0]) | changes)]
    return answer


def test_info_is_what_the_plug_in_says_and_fits_the_target(replay: Replay, server: SglangServer) -> None:
    replay.will("info")
    info = server.info(TIMEOUT_S)
    assert (info.engine, info.engine_version, info.dtype) == ("sglang", "0.5.23", "bfloat16")
    assert info.layers == (1, 3, 5)
    check_info(server.url, info, read_target_info(PACKAGED_TARGET), SPEC, InlineSink())
    path, body, authorization = replay.asked[0]
    assert (path, authorization) == ("/generate", "Bearer secret")
    assert body["rid"].startswith("specforge-")
    assert json.loads(body["sampling_params"]["custom_params"]["specforge"]) == {}


def test_captured_features_are_the_targets(replay: Replay, server: SglangServer) -> None:
    replay.will("info", "captured")
    captured = server.capture(REQUEST, TIMEOUT_S)
    verify_capture(server.url, REQUEST, captured, read_target_info(PACKAGED_TARGET))
    tensors = captured.tensors[0]
    assert tensors is not None
    assert tensors["input_ids"].tolist() == list(PROMPT)
    with torch.no_grad():
        expected = HFTargetEngine(PACKAGED_TARGET, "bfloat16")._backbone(
            input_ids=torch.tensor([PROMPT]), output_hidden_states=True, use_cache=False
        )
    layers = [layer[0].float() for layer in expected.hidden_states]
    assert distance(tensors["aux"], layers[2]) < 0.02  # behind the embeddings and layers 0 and 1
    assert distance(tensors["aux"], layers[1]) > 0.2
    assert distance(tensors["aux"], layers[3]) > 0.2
    assert distance(tensors["last"], layers[-1]) < 0.02


def distance(captured: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference, relative to that of ``expected``."""
    return float((captured.float() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def test_an_order_keeps_the_prefix_cache_out_and_carries_no_tokens(replay: Replay, server: SglangServer) -> None:
    replay.will("info", "captured")
    server.capture(REQUEST, TIMEOUT_S)
    server.capture(REQUEST, TIMEOUT_S)
    (_, first, _), (_, second, _) = replay.asked[1:]
    assert first["input_ids"] == list(PROMPT)
    assert first["extra_key"] != second["extra_key"]
    assert first["sampling_params"]["max_new_tokens"] == 1
    order = json.loads(first["sampling_params"]["custom_params"]["specforge"])
    assert order["capture"]["items"] == [{"sample_id": "recorded", "generation": 1, "input_ids": []}]


@pytest.mark.parametrize(
    ("input_ids", "reason"),
    [((), "no tokens"), ((5, 1024), "vocabulary of 1024"), ((5, -1), "vocabulary of 1024"), ((1,) * 2042, "2041")],
)
def test_prompts_that_would_end_the_server_never_reach_it(
    replay: Replay, server: SglangServer, input_ids: tuple[int, ...], reason: str
) -> None:
    replay.will("info", "captured")
    request = replace(REQUEST, items=(CaptureItem("wrong", 3, input_ids), *REQUEST.items))
    wrong, right = server.capture(request, TIMEOUT_S).reply.items
    assert wrong.failure is not None
    assert (wrong.generation, wrong.failure.whose) == (3, "prompt")
    assert reason in wrong.failure.reason
    assert right.failure is None
    with pytest.raises(PromptRefused, match=reason):
        server.generate(GenerateRequest((PROMPT, input_ids), Generate(1)), TIMEOUT_S)
    assert [body["input_ids"] for _, body, _ in replay.asked] == [[0], list(PROMPT)]


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        ("other_layers", ServerRefused, r"layers \[2\] are not captured here"),
        ("other_revision", ServerRefused, "another target"),
        ("forbidden_dir", ServerRefused, "does not write to shared_dir"),
        ("without_plugin", ServerRefused, "without the SpecForge plug-in"),
        ("unauthorized", ServerRefused, "Unauthorized; give the run the key"),
        ("too_long", ServerRefused, "Input length"),
        ({"status": 404, "body": {"detail": "Not Found"}}, ServerRefused, "no SGLang server"),
        ({"status": 500, "body": {"error": "x"}}, ServerUnavailable, "500: x"),
        ({"status": 503, "body": None}, ServerBusy, "503"),
        ({"status": 429, "body": None}, ServerUnavailable, "429"),
        ({"status": 200, "raw": b'{"meta_info": '}, ServerUnavailable, "not JSON"),
        ({"status": 200, "body": [1]}, ServerUnavailable, "TypeError"),
        ({"status": 200, "body": {"meta_info": {}}}, ServerUnavailable, "finish_reason"),
        (
            {"status": 200, "body": {"meta_info": {"finish_reason": {"type": "abort", "message": "memory"}}}},
            ServerUnavailable,
            "gave up a request: memory",
        ),
        (with_receipt("captured", item=None), ServerUnavailable, "without an item"),
        (with_receipt("captured", data="AAAA"), ServerUnavailable, "3 of "),
        (with_receipt("captured", data="?"), ServerUnavailable, "base64"),
        (with_receipt("captured", unknown=1), ServerRefused, "another version"),
        (with_receipt("captured", refusal={"what": "busy", "reason": "sinks"}), ServerBusy, "refused: sinks"),
        (with_receipt("captured", refusal={"what": "engine", "reason": "disk"}), ServerUnavailable, "refused: disk"),
    ],
)
def test_what_is_wrong_is_named_with_the_server(
    replay: Replay, server: SglangServer, answer: str | dict[str, Any], error: type[Exception], reason: str
) -> None:
    replay.will("info", answer)
    with pytest.raises(error, match=reason) as raised:
        server.capture(REQUEST, TIMEOUT_S)
    assert type(raised.value) is error
    assert server.url in str(raised.value)


def test_responses_are_token_ids_with_their_stop_token(replay: Replay, server: SglangServer) -> None:
    replay.will("info", "generated", "stopped")
    both = server.generate(GenerateRequest(((5, 6, 7, 8), (9, 10, 11)), Generate(4)), TIMEOUT_S)
    assert [(len(item.token_ids), item.stopped) for item in both.items] == [(4, False), (4, False)]
    assert both.items[0].token_ids == (5, 63, 63, 5)
    one = server.generate(GenerateRequest(((5, 6, 7, 8),), Generate(4)), TIMEOUT_S)
    assert (one.items[0].token_ids, one.items[0].stopped) == ((5, 63), True)
    with pytest.raises(ServerUnavailable, match="1 responses to 2 prompts"):
        server.generate(GenerateRequest(((5, 6, 7, 8), (9, 10, 11)), Generate(4)), TIMEOUT_S)


def test_drawn_responses_need_a_server_that_draws_by_seed(replay: Replay, server: SglangServer) -> None:
    request = GenerateRequest(((5, 6, 7, 8), (9, 10, 11)), Generate(4, 0.8, 0.9, 20, 7))
    replay.will("info", "server_info")
    with pytest.raises(ServerRefused, match="--enable-deterministic-inference"):
        server.generate(request, TIMEOUT_S)
    replay.will({"status": 200, "body": {"enable_deterministic_inference": True}}, "generated")
    server.generate(request, TIMEOUT_S)
    sampling = replay.asked[-1][1]["sampling_params"]
    assert {name: sampling[name] for name in ("temperature", "top_p", "top_k", "sampling_seed")} == {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 20,
        "sampling_seed": 7,
    }


def test_a_request_that_is_refused_where_one_token_is_taken_is_the_prompts_fault(
    replay: Replay, server: SglangServer
) -> None:
    replay.will("info", "too_long", "info")
    with pytest.raises(PromptRefused, match="Input length"):
        server.capture(REQUEST, TIMEOUT_S)


def test_closing_a_sink_is_asked_for_and_says_what_went_wrong(replay: Replay, server: SglangServer) -> None:
    sink = SharedMemorySink("run", 1 << 20, 4)
    replay.will("info")
    server.close_sink(sink)
    order = json.loads(replay.asked[-1][1]["sampling_params"]["custom_params"]["specforge"])
    assert order["close"]["sink"]["run_id"] == "run"
    replay.will({"status": 500, "body": None})
    with pytest.raises(ServerUnavailable, match="500"):
        server.close_sink(sink)
    server.close()
    with pytest.raises(ServerUnavailable, match="closed"):
        server.close_sink(sink)
    with pytest.raises(ServerUnavailable):
        server.info(TIMEOUT_S)


# What the plug-in does with the rows that SGLang hands it, without SGLang


def test_a_prompt_in_chunks_is_whole_when_every_token_is_known(server: SglangServer, replay: Replay) -> None:
    replay.will("info")
    recorder = Recorder(RecorderLimits(), lambda hidden: hidden)
    info = replace(server.info(TIMEOUT_S), layers=(1, 3), hidden_size=2)
    capture = _Capture(info, recorder)
    order = {
        "items": [{"sample_id": "a", "generation": 1, "input_ids": []}],
        "spec": {"aux_layers": [3], "last_hidden": True, "dtype": "float32"},
        "sink": {"kind": "inline"},
        "target_revision": None,
    }
    text = json.dumps({"capture": order})
    aux = torch.arange(20.0).view(5, 4)
    last = torch.arange(100.0, 110.0).view(5, 2)

    def receipt_of(chunks: list[tuple[int, int]]) -> Any:
        request = Request("specforge-1", list(range(5)), text)
        batch = SimpleNamespace(reqs=[None, request])
        for start, stop in chunks:
            rows = [Rows(1, "specforge-1", start, aux[start:stop], last[start:stop])]
            capture.consume(batch, rows, [None, "token" if stop == 5 else None])
        return RECEIPT.read(request.customized_info["specforge"][0])

    whole = receipt_of([(0, 2), (2, 4), (4, 5)])
    assert whole == receipt_of([(0, 5)])
    assert whole.item.num_tokens == 5
    # a request that was taken back begins again, and behind a cached prefix rows are missing
    assert receipt_of([(0, 3), (0, 2), (2, 5)]) == whole
    missing = receipt_of([(3, 5)])
    assert missing.refusal.what == "request"
    assert "2 of 5 tokens" in missing.refusal.reason
    # rows that cannot be taken in, and a recorder that is gone: an answer whatever happens
    right, aux = aux, torch.zeros(5, 3)
    lost = receipt_of([(0, 2), (2, 5)])
    assert lost.refusal.what == "engine"
    aux = right
    assert receipt_of([(0, 5)]) == whole
    recorder.close()
    assert receipt_of([(0, 5)]).refusal.what == "engine"


class Request:
    """As much of SGLang's request as the plug-in reads."""

    def __init__(self, rid: str, input_ids: list[int], order: str) -> None:
        self.rid, self.origin_input_ids = rid, input_ids
        self.sampling_params = SimpleNamespace(custom_params={"specforge": order})
        self.customized_info: Any = None


def test_options_come_in_environment_variables() -> None:
    given = {"SPECFORGE_FEATURE_DIRS": "/a:/b", "SPECFORGE_ADVERTISE_HOST": "h", "SPECFORGE_MAX_INLINE_BYTES": "7"}
    assert limits_of(given) == RecorderLimits(host="h", feature_dirs=("/a", "/b"), max_inline_bytes=7)
    assert limits_of({"SPECFORGE_FEATURE_DIRS": "", "OTHER": "x"}) == RecorderLimits()
    with pytest.raises(ConfigError, match="SPECFORGE_MAX_SINKS"):
        limits_of({"SPECFORGE_MAX_SINKS": "many"})


def test_other_versions_of_sglang_are_refused() -> None:
    check_version("0.5.23")
    check_version("0.5.23+cpu")
    for version in ("0.5.22", "0.5.230", "0.6.0"):
        with pytest.raises(ConfigError, match=version):
            check_version(version)
