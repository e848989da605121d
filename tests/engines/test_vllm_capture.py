"""Capture in a real vLLM server: its features are the target's, readable when it answers, whatever else it is asked.

Layer ids are 0-based outputs of decoder layers; vLLM's own are one more. The reference is ``HFTargetEngine``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_server import ENVIRONMENT, PYTHON, RunningVllm, vllm_server

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import (
    CapturedItem,
    CaptureItem,
    CaptureRequest,
    Generate,
    GenerateRequest,
    InlineSink,
    MooncakeSink,
    SharedDirSink,
    SharedMemorySink,
    Sink,
)
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.mooncake import MooncakeFeatureStore
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore, collect_orphans
from specforge.data_plane.tensors import materialised
from specforge.demo.run import PACKAGED_TARGET
from specforge.errors import EngineError, PromptRefused, ServerRefused, ServerUnavailable
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.plugins.orders import Order, write_order
from specforge.inference.servers.base import verify_capture
from specforge.inference.servers.vllm import VllmServer
from specforge.testing.mooncake import settings_of, temporary_service

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

NUM_LAYERS, HIDDEN = 8, 192
AUX = (1, 3, 6)
SPEC = CaptureSpec(AUX, True)
VLLM_IDS = [layer + 1 for layer in AUX] + [NUM_LAYERS]
MAX_LENGTH = 512
# 300 tokens take five steps of a prefill, between those of others
SMALL_STEPS = ["--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "8", "--max-num-batched-tokens", "64"]
TIMEOUT_S = 120.0
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def feature_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, feature_dir: Path) -> Iterator[RunningVllm]:
    """A server in fp32 whose steps are so small that prompts come in chunks."""
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    options = {"feature_dirs": [str(feature_dir)], "max_sinks": 16}
    with vllm_server(PACKAGED_TARGET, VLLM_IDS, "float32", log, options, SMALL_STEPS) as server:
        yield server


@pytest.fixture(scope="module")
def server(running: RunningVllm) -> Iterator[VllmServer]:
    connection = VllmServer(running.url, running.token)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def oracle() -> HFTargetEngine:
    return HFTargetEngine(PACKAGED_TARGET)


@pytest.fixture(scope="module")
def prompts(oracle: HFTargetEngine) -> list[tuple[int, ...]]:
    """Text that the target writes itself, of lengths on both sides of a block's and of a step's."""
    random = torch.Generator().manual_seed(7)
    starts = [tuple(torch.randint(1, 1024, (4,), generator=random).tolist()) for _ in range(9)]
    written = [start + one.token_ids for start, one in zip(starts, oracle.generate(starts, Generate(320)), strict=True)]
    noise = [tuple(torch.randint(1, 1024, (500,), generator=random).tolist()) for _ in range(9)]
    lengths = (1, 15, 16, 17, 63, 65, 130, 300, 500)
    return [(text + filler)[:length] for text, filler, length in zip(written, noise, lengths, strict=True)]


def references(engine: HFTargetEngine, prompt: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Outputs [S, H] of all layers, and the last hidden states behind the norm."""
    task = PromptTask("reference", 0, tuple(prompt), ())
    dtype = "bfloat16" if engine.dtype is torch.bfloat16 else "float32"
    captured = next(iter(engine.capture([task], CaptureSpec(tuple(range(NUM_LAYERS)), True, dtype))))
    layers = materialised(captured.tensors["aux"]).float().split(HIDDEN, dim=1)
    return list(layers), materialised(captured.tensors["last"]).float()


def request_of(
    prompts: Sequence[Sequence[int]], sink: Sink, spec: CaptureSpec = SPEC, revision: str | None = None
) -> CaptureRequest:
    """Each prompt as a new sample."""
    items = tuple(CaptureItem(uuid.uuid4().hex, 1, tuple(prompt)) for prompt in prompts)
    return CaptureRequest(items, spec, sink, revision)


def assert_right(tensors: dict[str, Tensor], prompt: Sequence[int], oracle: HFTargetEngine) -> None:
    layers, last = references(oracle, prompt)
    assert tensors["input_ids"].tolist() == list(prompt)
    for captured, layer in zip(tensors["aux"].split(HIDDEN, dim=1), AUX, strict=True):
        assert (captured - layers[layer]).abs().max() < 1e-3
    assert (tensors["last"] - last).abs().max() < 1e-3


def ref_of(item: CapturedItem) -> SampleRef:
    assert item.failure is None
    stored = (item.store, item.key, item.num_bytes, item.features)
    return SampleRef(item.sample_id, item.generation, item.num_tokens, (), *stored, "", "", "")


def got(store: FeatureStore, item: CapturedItem) -> dict[str, Tensor]:
    """A copy of what a reader finds."""
    ((tensors, handle),) = store.get([ref_of(item)])
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    store.release([handle])
    return copies


def shared_memory() -> SharedMemorySink:
    return SharedMemorySink(f"vllm-{uuid.uuid4().hex[:12]}", 128 << 20, 1024)


def metric(running: RunningVllm, name: str) -> float:
    """The sum of a metric of the engine's over its labels."""
    with urllib.request.urlopen(f"{running.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
    assert values, f"{name} is no metric of this version"
    return sum(values)


def posted(running: RunningVllm, body: dict[str, Any]) -> dict[str, Any]:
    """What vLLM answers to a completion that somebody else asks for."""
    model = {"model": str(PACKAGED_TARGET), "temperature": 0, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "application/json"}
    asked = urllib.request.Request(f"{running.url}/v1/completions", json.dumps({**model, **body}).encode(), headers)
    with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
        return dict(json.loads(answer.read()))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def rms(tensor: Tensor) -> float:
    return float(tensor.pow(2).mean().sqrt())


def report(
    captured: list[dict[str, Tensor]], prompts: Sequence[Sequence[int]], engine: HFTargetEngine
) -> dict[str, Any]:
    """By name: errors against the reference, and the least distance of the mistakes that are possible."""
    found: dict[str, list[tuple[Tensor, Tensor, list[Tensor]]]] = {}
    for tensors, prompt in zip(captured, prompts, strict=True):
        layers, last = references(engine, prompt)
        parts = [*tensors["aux"].float().split(HIDDEN, dim=1), tensors["last"].float()]
        names = [*(f"layer {layer}" for layer in AUX), "last"]
        for name, part, reference in zip(names, parts, [*(layers[layer] for layer in AUX), last], strict=True):
            mistakes = [other for other in [*layers, last] if other is not reference]
            found.setdefault(name, []).append((part, reference, mistakes))
    answer = {}
    for name, rows in found.items():
        part, reference = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
        error = (part - reference).abs()
        mistakes = [torch.cat(other) for other in zip(*(row[2] for row in rows), strict=True)]
        answer[name] = {
            "max": float(error.max()),
            "mean": float(error.mean()),
            "relative": rms(part - reference) / rms(reference),
            "nearest mistake": min(rms(part - mistake) for mistake in mistakes) / rms(reference),
        }
        print(name, {key: f"{value:.2e}" for key, value in answer[name].items()})
    return answer


def inline(server: VllmServer, prompts: Sequence[Sequence[int]], spec: CaptureSpec = SPEC) -> list[dict[str, Tensor]]:
    request = request_of(prompts, InlineSink(), spec)
    answer = server.capture(request, TIMEOUT_S)
    assert all(item.failure is None for item in answer.reply.items)
    return [tensors for tensors in answer.tensors if tensors is not None]


def test_server_says_what_it_captures(server: VllmServer, oracle: HFTargetEngine):
    info = server.info(TIMEOUT_S)
    assert (info.engine, info.dtype, info.layers, info.last_hidden) == ("vllm", "float32", (*AUX, NUM_LAYERS - 1), True)
    assert info.target_revision == oracle.info.revision
    assert (info.num_layers, info.hidden_size, info.vocab_size) == (NUM_LAYERS, HIDDEN, oracle.info.vocab_size)
    assert {"inline", "shared_memory", "shared_dir"} <= set(info.sinks)
    assert MAX_LENGTH - 16 <= info.max_tokens < MAX_LENGTH


def test_features_are_those_of_the_reference_and_far_from_its_neighbours(
    server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    found = report(inline(server, prompts), prompts, oracle)
    assert len(found) == len(AUX) + 1
    for name, numbers in found.items():
        assert numbers["max"] < 1e-3, name
        assert numbers["nearest mistake"] > 0.05, name


def test_cached_prefixes_and_chunks_give_what_a_prompt_alone_gives(
    running: RunningVllm, server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    """Prompts that share a prefix, which is no whole number of blocks, one after the other and at once."""
    shared = prompts[7][:135]
    family = [shared + prompts[8][start : start + length] for start, length in ((0, 5), (40, 200), (100, 90), (7, 1))]
    family.append(family[1])
    hits = metric(running, "vllm:prefix_cache_hits_total")
    for prompt in family:
        (tensors,) = inline(server, [prompt])
        assert_right(tensors, prompt, oracle)
    assert metric(running, "vllm:prefix_cache_hits_total") - hits >= 4 * 128
    others = [*family, *prompts, *reversed(prompts)]
    for tensors, prompt in zip(inline(server, others), others, strict=True):
        assert_right(tensors, prompt, oracle)


def test_formats_and_subsets_of_the_features(
    server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    prompt = prompts[6]
    layers, last = references(oracle, prompt)
    (tensors,) = inline(server, [prompt], CaptureSpec((6, 1), False))
    assert tensors.keys() == {"input_ids", "aux"}
    torch.testing.assert_close(tensors["aux"], torch.cat([layers[6], layers[1]], dim=1), rtol=0, atol=1e-3)
    (tensors,) = inline(server, [prompt], CaptureSpec((), True, "bfloat16"))
    torch.testing.assert_close(tensors["last"].float(), last, rtol=2**-7, atol=1e-3)
    (tensors,) = inline(server, [prompt], CaptureSpec((3,), True, "float8_e4m3fn"))
    decoded = tensors["aux"].float() * tensors["aux_scale"]
    assert rms(decoded - layers[3]) < 0.05 * rms(layers[3])
    # the output of the last layer is extracted for the sake of the norm, and may be had before it
    (tensors,) = inline(server, [prompt], CaptureSpec((NUM_LAYERS - 1,), True))
    torch.testing.assert_close(tensors["aux"], layers[-1], rtol=0, atol=1e-3)
    torch.testing.assert_close(tensors["last"], last, rtol=0, atol=1e-3)


def test_features_in_shared_memory_are_readable_when_the_server_answers(
    server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    sink = shared_memory()
    reader = SharedMemoryFeatureStore.attach(sink.run_id)

    def captured_and_read(number: int) -> tuple[tuple[int, ...], CaptureRequest, dict[str, Tensor]]:
        prompt = prompts[number % len(prompts)]
        request = request_of([prompt], sink, revision=oracle.info.revision)
        answer = server.capture(request, TIMEOUT_S)
        tensors = got(reader, answer.reply.items[0])
        verify_capture(server.url, request, answer, oracle.info)
        reader.abort([(item.sample_id, item.generation) for item in request.items])
        return prompt, request, tensors

    with ThreadPoolExecutor(8) as pool:
        for prompt, _, tensors in pool.map(captured_and_read, range(96)):
            assert_right(tensors, prompt, oracle)
    server.close_sink(sink)
    reader.gc()
    assert reader.stored() == []
    reader.close()


def test_features_in_a_directory_are_permitted_below_the_named_ones_only(
    server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]], feature_dir: Path, tmp_path: Path
):
    sink = SharedDirSink("run", str(feature_dir / "below"))
    Path(sink.path).mkdir()
    reader = SharedDirFeatureStore(Path(sink.path), sink.run_id)
    (item,) = server.capture(request_of([prompts[5]], sink), TIMEOUT_S).reply.items
    assert_right(got(reader, item), prompts[5], oracle)
    for path in (tmp_path / "elsewhere", feature_dir / ".." / "elsewhere"):
        with pytest.raises(ServerRefused, match="feature_dirs"):
            server.capture(request_of([prompts[5]], SharedDirSink("run", str(path))), TIMEOUT_S)
        assert not path.exists()


def test_features_in_mooncake_are_readable_when_the_server_answers(
    server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    with temporary_service() as service:
        settings = settings_of(service, f"vllm-{uuid.uuid4().hex[:8]}")
        sink = MooncakeSink(
            settings.run_id, settings.master, settings.admin, "tcp", "", "P2PHANDSHAKE", 4 << 20, settings.reconnect_s
        )
        reader = MooncakeFeatureStore(settings)
        for prompt in [*prompts, *prompts]:
            (item,) = server.capture(request_of([prompt], sink), TIMEOUT_S).reply.items
            assert_right(got(reader, item), prompt, oracle)
        server.close_sink(sink)
        reader.close()


def test_repeated_generation_is_answered_with_the_features_that_live(
    server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    sink = shared_memory()
    reader = SharedMemoryFeatureStore.attach(sink.run_id)
    request = request_of([prompts[4]], sink)
    first, again = (server.capture(request, TIMEOUT_S).reply.items[0] for _ in range(2))
    assert first == again
    assert reader.stored() == [(first.sample_id, 1)]
    reader.abort([(first.sample_id, 1)])
    (freed,) = server.capture(request, TIMEOUT_S).reply.items
    assert freed.failure is not None
    assert freed.failure.whose == "store"
    item = request.items[0]
    later = CaptureRequest((CaptureItem(item.sample_id, 2, item.input_ids),), SPEC, sink)
    assert_right(got(reader, server.capture(later, TIMEOUT_S).reply.items[0]), prompts[4], oracle)
    server.close_sink(sink)
    reader.close()


def test_full_store_is_the_stores_fault_and_passes(
    server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    sink = SharedMemorySink(f"vllm-{uuid.uuid4().hex[:12]}", 2 << 20, 64)
    reader = SharedMemoryFeatureStore.attach(sink.run_id)
    prompt = prompts[5][:8]
    taken: list[CapturedItem] = []
    failed: list[CapturedItem] = []

    def fill_up() -> bool:
        (item,) = server.capture(request_of([prompt], sink), TIMEOUT_S).reply.items
        (taken if item.failure is None else failed).append(item)
        return bool(failed)

    until(fill_up, "the store never got full")
    assert failed[0].failure is not None
    assert failed[0].failure.whose == "store"
    reader.abort([(item.sample_id, item.generation) for item in taken])

    def fits() -> bool:
        return server.capture(request_of([prompt], sink), TIMEOUT_S).reply.items[0].failure is None

    until(fits, "the store did not empty")
    (large,) = server.capture(request_of([prompts[8]], sink), TIMEOUT_S).reply.items
    assert large.failure is not None
    server.close_sink(sink)
    reader.close()


def test_what_cannot_be_served_is_refused_and_the_engine_survives(
    running: RunningVllm, server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    prompt, memory = prompts[4], shared_memory()
    refused = [
        (request_of([prompt], memory, CaptureSpec((2,), True)), "layers \\[2\\] are not captured"),
        (request_of([prompt], memory, CaptureSpec((99,), False)), "layers \\[99\\] are not captured"),
        (request_of([prompt], memory, revision="another"), "another target"),
        (request_of([prompt], memory, CaptureSpec((), False)), "no hidden state"),
        (request_of([prompt], SharedMemorySink("run", 1 << 60, 8)), "max_feature_bytes"),
        (request_of([prompt], SharedMemorySink("../run", 1 << 20, 8)), "run id"),
    ]
    for request, reason in refused:
        with pytest.raises(ServerRefused, match=reason):
            server.capture(request, TIMEOUT_S)
    unreachable = MooncakeSink("run", "127.0.0.1:9", "127.0.0.1:9", "tcp", "", "P2PHANDSHAKE", 1 << 20, 1.0)
    with pytest.raises(EngineError):
        server.capture(request_of([prompt], unreachable), TIMEOUT_S)

    unfit = [(), (1024,), tuple(prompts[8]) * 2]
    items = server.capture(request_of(unfit, InlineSink()), TIMEOUT_S).reply.items
    assert [item.failure.whose for item in items if item.failure is not None] == ["prompt"] * 3

    order = {"capture": {"items": [{"sample_id": "a", "generation": 1, "input_ids": []}]}}
    for garbage in (5, "x", [], {"capture": 5}, {"capture": {}}, {"close": {}}, {"other": 1}, order, None):
        answer = posted(running, {"prompt": [5, 6], "max_tokens": 4, "kv_transfer_params": {"specforge": garbage}})
        assert answer["kv_transfer_params"]["specforge"]["refusal"]["what"] == "request"
        assert answer["kv_transfer_params"]["specforge"]["info"]["engine"] == "vllm"
    short = write_order(Order(request_of([()], InlineSink())))
    answer = posted(running, {"prompt": [5, 6], "max_tokens": 1, "kv_transfer_params": {"specforge": short}})
    assert "ended before" in answer["kv_transfer_params"]["specforge"]["refusal"]["reason"]
    for foreign in ({}, {"another": 1}, {"do_remote_decode": True}):
        answer = posted(running, {"prompt": [5, 6], "max_tokens": 4, "kv_transfer_params": foreign})
        assert (answer["kv_transfer_params"] or {}).get("specforge") is None

    stranger = VllmServer(running.url, "another key")
    with pytest.raises(ServerRefused, match="api-key"):
        stranger.info(TIMEOUT_S)
    stranger.close()
    (tensors,) = inline(server, [prompt])
    assert_right(tensors, prompt, oracle)


def test_sequences_of_the_greatest_length_do_not_spoil_the_features_of_others(
    running: RunningVllm, server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    """Near max_model_len vLLM may not speculate any more, and extraction is speculation to it."""
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        news = [tuple(torch.randint(1, 1024, (80,), generator=random).tolist()) for _ in range(6)]
        long = {"prompt": [list(news[0] + prompts[8])[: MAX_LENGTH - 6]] * 2, "max_tokens": 6}
        with ThreadPoolExecutor(8) as pool:
            background = [pool.submit(posted, running, long) for _ in range(2)]
            answers = [pool.submit(inline, server, [prompt]) for prompt in news]
            for prompt, answer in zip(news, answers, strict=True):
                assert_right(answer.result()[0], prompt, oracle)
            for done in background:
                assert done.result()["usage"]["completion_tokens"] == 2 * 6


def test_disconnected_clients_leave_no_blocks_behind(
    running: RunningVllm, server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    """Clients that ask for captures and go, while those are computed and while others wait."""
    port = int(running.url.rsplit(":", 1)[1])
    order = {"specforge": write_order(Order(request_of([()], InlineSink())))}
    asked = {"prompt": list(prompts[8][:400]), "max_tokens": 100, "ignore_eos": True, "kv_transfer_params": order}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with contextlib.ExitStack() as connections:
        for _ in range(24):
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(head.encode() + body)
        until(lambda: metric(running, "vllm:num_requests_waiting") > 0, "no request ever waited")
    until(lambda: metric(running, "vllm:num_requests_waiting") == 0, "a request of a client that is gone waits on")
    until(lambda: metric(running, "vllm:num_requests_running") == 0, "a request of a client that is gone runs on")
    until(lambda: metric(running, "vllm:kv_cache_usage_perc") == 0.0, "blocks of a client that is gone are held")
    (tensors,) = inline(server, [prompts[7]])
    assert_right(tensors, prompts[7], oracle)


def test_responses_are_the_targets_own(server: VllmServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]):
    asked = tuple(prompts[index] for index in (1, 3, 5))
    reply = server.generate(GenerateRequest(asked, Generate(40), oracle.info.revision), TIMEOUT_S)
    alone = [oracle.generate([prompt], Generate(40))[0] for prompt in asked]
    assert [(item.token_ids, item.stopped) for item in reply.items] == [(one.token_ids, one.stopped) for one in alone]
    with pytest.raises(PromptRefused, match="tokens"):
        server.generate(GenerateRequest((prompts[8],), Generate(100)), TIMEOUT_S)
    with pytest.raises(ServerRefused, match="greedily"):
        server.generate(GenerateRequest(asked, Generate(4, temperature=1.0)), TIMEOUT_S)


def test_bfloat16_is_near_the_reference_and_features_outlive_the_server(tmp_path: Path, prompts: list[tuple[int, ...]]):
    """The tolerance is 2 % of the RMS of a layer: two orders of summation in bf16."""
    oracle, sink = HFTargetEngine(PACKAGED_TARGET, "bfloat16"), shared_memory()
    spec = CaptureSpec(AUX, True, "bfloat16")
    with vllm_server(PACKAGED_TARGET, VLLM_IDS, "bfloat16", tmp_path / "log", None, SMALL_STEPS[:2]) as running:
        server = VllmServer(running.url, running.token)
        assert server.info(TIMEOUT_S).dtype == "bfloat16"
        items = server.capture(request_of(prompts, sink, spec), TIMEOUT_S).reply.items
        server.close()
    reader = SharedMemoryFeatureStore.attach(sink.run_id)
    found = report([got(reader, item) for item in items], prompts, oracle)
    reader.close()
    collect_orphans(sink.run_id)
    for name, numbers in found.items():
        assert numbers["relative"] < 0.02, name
        assert numbers["nearest mistake"] > 0.05, name


def test_hidden_states_that_were_not_written_are_refused_until_they_are(
    tmp_path: Path, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    """Prompts that share prefixes: blocks without their hidden states must leave the prefix cache."""
    connector = "forgetful_connector", "ForgetfulConnector"
    refused = 0
    with vllm_server(PACKAGED_TARGET, VLLM_IDS, "float32", tmp_path / "log", None, SMALL_STEPS, connector) as running:
        server = VllmServer(running.url, running.token)
        for prompt in [prompts[8][: 60 + 15 * number] for number in range(12)]:
            found: list[dict[str, Tensor]] = []

            def captured(prompt: tuple[int, ...] = prompt, found: list[dict[str, Tensor]] = found) -> bool:
                nonlocal refused
                try:
                    found += inline(server, [prompt])
                except ServerUnavailable:
                    refused += 1
                return bool(found)

            until(captured, "a prompt was never captured")
            assert_right(found[0], prompt, oracle)
        server.close()
    print(f"{refused} captures were refused")
    assert refused > 0


def test_what_the_connector_keeps_account_of():
    script = Path(__file__).parent / "connector_parts.py"
    done = subprocess.run(
        [PYTHON, script], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
