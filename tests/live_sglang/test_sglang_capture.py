"""Capture in a real SGLang server: its features are the target's, readable when it answers, whatever else it is asked.

The reference is ``HFTargetEngine``. Layer ids are 0-based outputs of decoder layers, SGLang's too.
"""

from __future__ import annotations

import http.client
import json
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_server import RunningSglang, is_healthy, sglang_server, tail
from torch import Tensor

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
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.data_plane.tensors import materialised
from specforge.demo.run import PACKAGED_TARGET
from specforge.errors import ServerRefused
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.servers.base import check_info, verify_capture
from specforge.inference.servers.sglang import SglangServer
from specforge.testing.mooncake import settings_of, temporary_service

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

NUM_LAYERS, HIDDEN = 8, 192
AUX = (1, 3, 6)
SPEC = CaptureSpec(AUX, True)
# 300 tokens take five forwards, and the prefix cache is on
CHUNKS = ["--chunked-prefill-size", "64"]
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def feature_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, feature_dir: Path) -> Iterator[RunningSglang]:
    log = tmp_path_factory.mktemp("sglang") / "server.log"
    with sglang_server(PACKAGED_TARGET, AUX, "float32", log, feature_dir, CHUNKS) as server:
        yield server


@pytest.fixture(scope="module")
def server(running: RunningSglang) -> Iterator[SglangServer]:
    connection = SglangServer(running.url, running.token)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def oracle() -> HFTargetEngine:
    return HFTargetEngine(PACKAGED_TARGET)


@pytest.fixture(scope="module")
def prompts(oracle: HFTargetEngine) -> list[tuple[int, ...]]:
    """Text that the target writes itself, and noise behind it, of lengths on both sides of a chunk's."""
    random = torch.Generator().manual_seed(7)
    lengths = (1, 2, 17, 63, 64, 65, 130, 300, 700)
    starts = [tuple(torch.randint(1, 1024, (4,), generator=random).tolist()) for _ in lengths]
    written = oracle.generate(starts, Generate(200))
    noise = [tuple(torch.randint(1, 1024, (700,), generator=random).tolist()) for _ in lengths]
    rows = zip(starts, written, noise, lengths, strict=True)
    return [(start + one.token_ids + filler)[:length] for start, one, filler, length in rows]


def references(engine: HFTargetEngine, prompt: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Outputs [S, H] of all layers, and the last hidden states behind the norm."""
    dtype = "bfloat16" if engine.dtype is torch.bfloat16 else "float32"
    task = PromptTask("reference", 0, tuple(prompt), ())
    captured = next(iter(engine.capture([task], CaptureSpec(tuple(range(NUM_LAYERS)), True, dtype))))
    layers = materialised(captured.tensors["aux"]).float().split(HIDDEN, dim=1)
    return list(layers), materialised(captured.tensors["last"]).float()


def request_of(prompts: Sequence[Sequence[int]], sink: Sink, spec: CaptureSpec = SPEC) -> CaptureRequest:
    """Each prompt as a new sample."""
    items = tuple(CaptureItem(uuid.uuid4().hex, 1, tuple(prompt)) for prompt in prompts)
    return CaptureRequest(items, spec, sink)


def inline(server: SglangServer, prompts: Sequence[Sequence[int]], spec: CaptureSpec = SPEC) -> list[dict[str, Tensor]]:
    answer = server.capture(request_of(prompts, InlineSink(), spec), TIMEOUT_S)
    assert [item.failure for item in answer.reply.items] == [None] * len(prompts)
    return [tensors for tensors in answer.tensors if tensors is not None]


def assert_right(tensors: dict[str, Tensor], prompt: Sequence[int], oracle: HFTargetEngine) -> None:
    layers, last = references(oracle, prompt)
    assert tensors["input_ids"].tolist() == list(prompt)
    for captured, layer in zip(tensors["aux"].split(HIDDEN, dim=1), AUX, strict=True):
        assert (captured - layers[layer]).abs().max() < 1e-3
    assert (tensors["last"] - last).abs().max() < 1e-3


def rms(tensor: Tensor) -> float:
    return float(tensor.pow(2).mean().sqrt())


def report(
    captured: list[dict[str, Tensor]], prompts: Sequence[Sequence[int]], engine: HFTargetEngine
) -> dict[str, dict[str, float]]:
    """By name: the largest and the mean error, RMS of the error and of the nearest mistake over that of the reference.

    Mistakes are the other layers, among them the last one before its norm, and the rows moved by a token.
    """
    rows: dict[str, list[tuple[Tensor, Tensor, list[Tensor]]]] = {}
    for tensors, prompt in zip(captured, prompts, strict=True):
        layers, last = references(engine, prompt)
        parts = [*tensors["aux"].float().split(HIDDEN, dim=1), tensors["last"].float()]
        rights = [*(layers[layer] for layer in AUX), last]
        for name, part, right in zip([*(f"layer {layer}" for layer in AUX), "last"], parts, rights, strict=True):
            mistakes = [other for other in [*layers, last] if other is not right] + [right.roll(1, dims=0)]
            rows.setdefault(name, []).append((part, right, mistakes))
    answer = {}
    for name, found in rows.items():
        part, right = (torch.cat([row[place] for row in found]) for place in (0, 1))
        mistakes = [torch.cat(parts) for parts in zip(*(row[2] for row in found), strict=True)]
        error = (part - right).abs()
        answer[name] = {
            "max": float(error.max()),
            "mean": float(error.mean()),
            "relative": rms(part - right) / rms(right),
            "nearest mistake": min(rms(part - mistake) for mistake in mistakes) / rms(right),
        }
        print(name, {key: f"{value:.2e}" for key, value in answer[name].items()})
    return answer


def got(store: FeatureStore, item: CapturedItem) -> dict[str, Tensor]:
    """A copy of what a reader finds."""
    assert item.failure is None
    stored = (item.store, item.key, item.num_bytes, item.features)
    ref = SampleRef(item.sample_id, item.generation, item.num_tokens, (), *stored, "", "", "")
    ((tensors, handle),) = store.get([ref])
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    store.release([handle])
    return copies


def posted(running: RunningSglang, body: dict[str, Any]) -> dict[str, Any]:
    """What SGLang answers to somebody else."""
    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "application/json"}
    asked = urllib.request.Request(f"{running.url}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked, timeout=TIMEOUT_S) as answer:
        return dict(json.loads(answer.read()))


def test_server_says_what_it_captures(server: SglangServer, oracle: HFTargetEngine):
    info = server.info(TIMEOUT_S)
    assert (info.engine, info.engine_version, info.dtype) == ("sglang", "0.5.23", "float32")
    assert (info.layers, info.last_hidden) == (AUX, True)
    for sink in (InlineSink(), SharedMemorySink("run", 1 << 20, 4), SharedDirSink("run", "/")):
        check_info(server.url, info, oracle.info, SPEC, sink)
    longest = (5,) * info.max_tokens
    (tensors,) = inline(server, [longest])
    assert_right(tensors, longest, oracle)


def test_features_are_those_of_the_reference_and_far_from_mistakes(
    server: SglangServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    found = report(inline(server, prompts), prompts, oracle)
    assert len(found) == len(AUX) + 1
    for name, numbers in found.items():
        assert numbers["max"] < 1e-3, name
        assert numbers["nearest mistake"] > 0.05, name


def test_shared_prefixes_and_neighbours_change_nothing(
    running: RunningSglang, server: SglangServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    """Prompts with one prefix, which others left in the prefix cache, one after the other and at once."""
    shared = prompts[7][:135]
    family = [shared + prompts[8][start : start + length] for start, length in ((0, 5), (40, 200), (7, 1))]
    family.append(family[1])
    for prompt in family:
        ordinary = {"input_ids": list(prompt), "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
        posted(running, ordinary)
        assert posted(running, ordinary)["meta_info"]["cached_tokens"] >= 128
        (tensors,) = inline(server, [prompt])
        assert_right(tensors, prompt, oracle)
    others = [*family, *prompts, *reversed(prompts)]
    for tensors, prompt in zip(inline(server, others), others, strict=True):
        assert_right(tensors, prompt, oracle)


def test_formats_and_subsets_of_the_features(
    server: SglangServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    prompt = prompts[6]
    layers, last = references(oracle, prompt)
    (tensors,) = inline(server, [prompt], CaptureSpec((6, 1), False))
    assert tensors.keys() == {"input_ids", "aux"}
    torch.testing.assert_close(tensors["aux"], torch.cat([layers[6], layers[1]], dim=1), rtol=0, atol=1e-3)
    (tensors,) = inline(server, [prompt], CaptureSpec((), True, "bfloat16"))
    torch.testing.assert_close(tensors["last"].float(), last, rtol=2**-7, atol=1e-3)
    (tensors,) = inline(server, [prompt], CaptureSpec((3,), True, "float8_e4m3fn"))
    assert rms(tensors["aux"].float() * tensors["aux_scale"] - layers[3]) < 0.05 * rms(layers[3])


def test_features_in_shared_memory_are_readable_when_the_server_answers(
    server: SglangServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    sink = SharedMemorySink(f"sglang-{uuid.uuid4().hex[:12]}", 256 << 20, 1024)
    reader = SharedMemoryFeatureStore.attach(sink.run_id)

    def captured_and_read(number: int) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        prompt = prompts[number % len(prompts)]
        request = replace(request_of([prompt], sink), target_revision=oracle.info.revision)
        answer = server.capture(request, TIMEOUT_S)
        tensors = got(reader, answer.reply.items[0])
        verify_capture(server.url, request, answer, oracle.info)
        reader.abort([(item.sample_id, item.generation) for item in request.items])
        return prompt, tensors

    with ThreadPoolExecutor(8) as pool:
        for prompt, tensors in pool.map(captured_and_read, range(48)):
            assert_right(tensors, prompt, oracle)
    request = request_of([prompts[4]], sink)
    first, again = (server.capture(request, TIMEOUT_S).reply.items[0] for _ in range(2))
    assert first == again
    reader.close()
    assert stored_of(sink) == [(first.sample_id, 1)]
    server.close_sink(sink)
    assert stored_of(sink) == []


def stored_of(sink: SharedMemorySink) -> list[tuple[str, int]]:
    """What a reader finds that comes now: those that are there already keep what they may still read."""
    reader = SharedMemoryFeatureStore.attach(sink.run_id)
    found = reader.stored()
    reader.close()
    return found


def test_features_in_a_directory_are_permitted_below_the_named_ones_only(
    server: SglangServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]], feature_dir: Path, tmp_path: Path
):
    sink = SharedDirSink("run", str(feature_dir / "below"))
    Path(sink.path).mkdir()
    reader = SharedDirFeatureStore(Path(sink.path), sink.run_id)
    (item,) = server.capture(request_of([prompts[5]], sink), TIMEOUT_S).reply.items
    assert_right(got(reader, item), prompts[5], oracle)
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ServerRefused, match="not below a directory"):
        server.capture(request_of([prompts[5]], SharedDirSink("run", str(elsewhere))), TIMEOUT_S)
    assert not elsewhere.exists()
    server.close_sink(sink)


def test_features_in_mooncake_are_readable_when_the_server_answers(
    server: SglangServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    with temporary_service() as service:
        settings = settings_of(service, f"sglang-{uuid.uuid4().hex[:8]}")
        addresses = (settings.master, settings.admin, "tcp", "", "P2PHANDSHAKE", 4 << 20, settings.reconnect_s)
        sink = MooncakeSink(settings.run_id, *addresses)
        reader = MooncakeFeatureStore(settings)
        for prompt in [*prompts, *prompts]:
            (item,) = server.capture(request_of([prompt], sink), TIMEOUT_S).reply.items
            assert_right(got(reader, item), prompt, oracle)
        server.close_sink(sink)
        reader.close()


def test_server_survives_wrong_orders_and_clients_that_leave(
    running: RunningSglang, server: SglangServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]
):
    right = request_of([prompts[2]], InlineSink())
    for request, reason in (
        (replace(right, target_revision="0" * 64), "another target"),
        (replace(right, spec=CaptureSpec((2,), True)), r"layers \[2\]"),
        (replace(right, spec=CaptureSpec((), False)), "no hidden state"),
    ):
        with pytest.raises(ServerRefused, match=reason):
            server.capture(request, TIMEOUT_S)
    for params in (
        None,
        {},
        {"specforge": 5},
        {"specforge": "]"},
        {"specforge": '{"capture": 1}'},
        {"specforge": "[]"},
    ):
        sampling = {"temperature": 0, "max_new_tokens": 3, "custom_params": params}
        body = {"rid": f"specforge-{uuid.uuid4().hex}", "input_ids": [5, 6], "sampling_params": sampling}
        answer = posted(running, body)
        assert len(answer["output_ids"]) == 3
        assert json.loads(answer["meta_info"]["specforge"][0])["refusal"]["what"] == "request"
    outside = server.capture(request_of([(5, 1024)], InlineSink()), TIMEOUT_S).reply.items[0]
    assert outside.failure is not None
    for _ in range(4):
        leave_before_the_answer(running, prompts[8])
    assert is_healthy(running), tail(running.log)
    (tensors,) = inline(server, [prompts[8]])
    assert_right(tensors, prompts[8], oracle)
    stranger = SglangServer(running.url, "another-key")
    with pytest.raises(ServerRefused, match="key"):
        stranger.info(TIMEOUT_S)
    stranger.close()


def leave_before_the_answer(running: RunningSglang, prompt: Sequence[int]) -> None:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(running.url).netloc, timeout=TIMEOUT_S)
    order = {"items": [{"sample_id": uuid.uuid4().hex, "generation": 1, "input_ids": []}], "target_revision": None}
    order |= {"spec": {"aux_layers": [1], "last_hidden": True, "dtype": "float32"}, "sink": {"kind": "inline"}}
    sampling = {"max_new_tokens": 500, "custom_params": {"specforge": json.dumps({"capture": order})}}
    rid = f"specforge-{uuid.uuid4().hex}"
    body = {"rid": rid, "extra_key": rid, "input_ids": list(prompt), "sampling_params": sampling}
    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "application/json"}
    connection.request("POST", "/generate", json.dumps(body), headers)
    connection.close()


def test_responses_are_the_references(server: SglangServer, oracle: HFTargetEngine, prompts: list[tuple[int, ...]]):
    """Greedy in float32, in which this target has no near-ties within so few tokens."""
    asked = GenerateRequest(tuple(prompt[:8] for prompt in prompts[2:]), Generate(24), oracle.info.revision)
    for prompt, item in zip(asked.prompts, server.generate(asked, TIMEOUT_S).items, strict=True):
        (expected,) = oracle.generate([prompt], asked.generate)
        assert (item.token_ids, item.stopped) == (expected.token_ids, expected.stopped)
    with pytest.raises(ServerRefused, match="deterministic"):
        server.generate(replace(asked, generate=Generate(4, temperature=0.8)), TIMEOUT_S)


def test_bfloat16_features_are_within_two_percent_of_the_reference(
    tmp_path: Path, feature_dir: Path, prompts: list[tuple[int, ...]]
):
    """In RMS: single values of a bfloat16 residual stream are off by several of its coarse steps."""
    reference = HFTargetEngine(PACKAGED_TARGET, "bfloat16")
    with sglang_server(PACKAGED_TARGET, AUX, "bfloat16", tmp_path / "server.log", feature_dir) as running:
        server = SglangServer(running.url, running.token)
        assert server.info(TIMEOUT_S).dtype == "bfloat16"
        found = report(inline(server, prompts, replace(SPEC, dtype="bfloat16")), prompts, reference)
        server.close()
    for name, numbers in found.items():
        assert numbers["relative"] < 0.02, name
        assert numbers["nearest mistake"] > 0.05, name
