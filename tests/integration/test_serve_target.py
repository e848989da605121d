"""``specforge serve-target`` over a socket: in this process, and as a user starts it."""

import contextlib
import json
import os
import select
import socket
import threading
from collections import Counter
from dataclasses import replace

import httpx
import hypothesis
import pytest
import runs
import schemathesis
import serving
import torch
import transformers
from hypothesis import HealthCheck
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served_target import WAIT_S, HeldEngine, arena, in_process, item, request, same_bits

from specforge.algorithms.base import target_logits
from specforge.cli import main as cli
from specforge.contracts import capture_wire as wire
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CloseSink, Generate, GenerateRequest
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane import gate
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.errors import ConfigError, ServerRefused, ServerUnavailable
from specforge.inference.config import TargetConfig
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.servers.specforge import SpecforgeServer
from specforge.inference.serving.jobs import Refused
from specforge.inference.serving.server import TargetServer
from specforge.inference.serving.settings import ServingSettings
from specforge.launch.serve_target import ServeOptions, open_server

TOKEN = "a secret of the server"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def held(tiny_target_dir):
    return HeldEngine(tiny_target_dir)


@pytest.fixture
def serve(held):
    """Starts a server; stopped at the end."""
    with contextlib.ExitStack() as servers:

        def start(engine=held, **settings):
            server = TargetServer(engine, ServingSettings(**{"grace_s": WAIT_S, **settings}), TOKEN)
            server.start()
            servers.callback(server.stop)
            return server

        yield start


@pytest.fixture
def connect():
    """Clients, closed at the end."""
    with contextlib.ExitStack() as clients:

        def client(server, token=TOKEN):
            return clients.enter_context(contextlib.closing(SpecforgeServer(server.url, token)))

        yield client


def in_thread(function):
    """The thread that runs ``function``, and the list that gets its outcome."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except ServerUnavailable as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def read(sink, reply):
    """The features of all items, as another process of the host reads them."""
    with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as store:
        refs = [
            SampleRef(
                sample_id=one.sample_id,
                generation=one.generation,
                num_tokens=one.num_tokens,
                loss_spans=(),
                store=one.store,
                key=one.key,
                num_bytes=one.num_bytes,
                features=one.features,
                target_revision=reply.target_revision,
                capture_fingerprint="",
                worker_id="w",
            )
            for one in reply.items
        ]
        found = store.get(refs)
        copies = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors, _ in found]
        store.release([handle for _, handle in found])
    return copies


def test_features_have_the_bits_of_one_process_in_the_answer_and_in_shared_memory(serve, connect, held):
    client, sink = connect(serve()), arena(f"serve-target-{os.getpid()}")
    items = [item("a", 40), item("b", 7)]
    expected = [in_process(held, one) for one in items]
    inline = client.capture(request(*items), WAIT_S)
    assert all(map(same_bits, inline.tensors, expected))
    stored = client.capture(request(*items, sink=sink), WAIT_S)
    assert stored.tensors == (None, None)
    assert all(map(same_bits, read(sink, stored.reply), expected))
    client.close_sink(sink)
    with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as store:
        assert store.stored() == []


def test_the_info_is_that_of_the_target(serve, connect, held):
    info = connect(serve(order="arrival", max_queued=5)).info(WAIT_S)
    assert (info.target_revision, info.num_layers, info.hidden_size) == (held.info.revision, 8, 64)
    assert (info.dtype, info.strict, info.max_in_flight, info.max_tokens) == ("float32", False, 5, 2048)
    assert info.sinks[:2] == ("inline", "shared_memory")


def test_every_call_but_the_health_wants_the_token(serve, connect):
    server = serve()
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        for method, path in [("GET", "info"), ("POST", "capture"), ("POST", "generate"), ("POST", "sinks/close")]:
            answer = httpx.request(method, f"{server.url}/v1/{path}", headers=headers)
            assert answer.status_code == 401
            assert wire.REFUSAL.read(answer.content).what == "token"
    with pytest.raises(ServerRefused, match="token"):
        connect(server, "wrong").info(WAIT_S)


@pytest.mark.parametrize("token", [None, ""])
def test_beyond_loopback_a_token_is_needed(tiny_target_dir, token):
    target = TargetConfig(path=tiny_target_dir, device="cpu")
    with pytest.raises(ConfigError, match="token"):
        open_server(ServeOptions(target, host="0.0.0.0", token=token))


def test_a_port_that_is_taken_is_said_to_be(held):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = TargetServer(held, ServingSettings(), None, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="cannot listen"):
            server.start()


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("capture", b"", "required"),
        ("capture", b"{", "JSON"),
        ("capture", b"{}", "missing"),
        ("capture", b"\xff", "JSON"),
        ("generate", b'{"prompts": [[1]], "generate": {"max_new_tokens": 1}, "more": 1}', "unknown field 'more'"),
        ("generate", b'{"prompts": [], "generate": {"max_new_tokens": 1}}', "prompts"),
        ("generate", b'{"prompts": [[1]], "generate": {"max_new_tokens": 1.0}}', "max_new_tokens"),
        ("generate", b'{"prompts": [[1]], "generate": {"max_new_tokens": 1, "temperature": NaN}}', "finite"),
        ("sinks/close", b'{"sink": {"kind": "elsewhere"}}', "sink"),
    ],
)
def test_what_breaks_the_contract_is_refused_with_the_place(serve, path, body, said):
    answer = httpx.post(f"{serve().url}/v1/{path}", content=body, headers=AUTH)
    assert answer.status_code == 422
    refusal = wire.REFUSAL.read(answer.content)
    assert refusal.what == "request"
    assert said in refusal.reason


def test_calls_that_there_are_not_are_refused_in_the_same_words(serve):
    server = serve()
    for method, path, status in [("POST", "/v1/train", 404), ("GET", "/v1/capture", 405), ("POST", "/v2/capture", 404)]:
        answer = httpx.request(method, server.url + path, headers=AUTH)
        assert answer.status_code == status
        assert wire.REFUSAL.read(answer.content).what == "request"


@pytest.mark.parametrize(("num_bytes", "status", "what"), [(1 << 40, 422, "request"), (10, 503, "busy")])
def test_a_body_that_is_too_large_or_too_slow_is_refused(serve, num_bytes, status, what):
    server = serve(body_timeout_s=0.2)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.settimeout(WAIT_S)
        lines = ["POST /v1/capture HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in AUTH.items())]
        head = "\r\n".join([*lines, "Connection: close", f"Content-Length: {num_bytes}", "", ""])
        client.sendall(f"{head}{{".encode())
        said = b""
        while part := client.recv(1 << 16):
            said += part
    assert said.startswith(f"HTTP/1.1 {status} ".encode())
    assert wire.REFUSAL.read(said.split(b"\r\n\r\n", 1)[1]).what == what


def talk(server, *lines):
    """The answer to a request of which only the head, and no body, is sent."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.settimeout(WAIT_S)
        client.sendall("\r\n".join([*lines, "Host: x", "Connection: close", "", ""]).encode())
        said = b""
        while part := client.recv(1 << 16):
            said += part
    return said.partition(b"\r\n")[0].decode()


def test_the_health_needs_no_body_and_no_token_and_nothing_else_does_without(serve):
    server = serve()
    announced = f"Content-Length: {1 << 40}"
    assert "200" in talk(server, "GET /healthz HTTP/1.1", announced)
    assert "401" in talk(server, "POST /healthz HTTP/1.1", announced)
    assert "401" in talk(server, "POST /v1/capture HTTP/1.1", announced)


def test_bodies_that_are_read_at_one_time_are_bounded(serve, connect, monkeypatch):
    server = serve()
    monkeypatch.setattr(gate, "MAX_BODIES", 20_000 / wire.MAX_BODY_BYTES)
    port = int(server.url.rpartition(":")[2])
    head = "\r\n".join(
        ["POST /v1/capture HTTP/1.1", "Host: x", f"Authorization: {AUTH['Authorization']}", "Content-Length: 30000"]
    )
    with (
        socket.create_connection(("127.0.0.1", port)) as first,
        socket.create_connection(("127.0.0.1", port)) as second,
    ):
        for client in (first, second):
            client.sendall(f"{head}\r\n\r\n".encode() + b" " * 15_000)
        for client in (first, second):
            client.settimeout(WAIT_S)
        ready, _, _ = select.select([first, second], [], [], WAIT_S)
        (refused,) = ready
        assert b" 503 " in refused.recv(1 << 16).partition(b"\r\n")[0]
    # both are gone, and what they sent is not counted any more
    runs.wait_until(lambda: not server._gate._num_body_bytes, "the bodies to be forgotten")
    connect(server).capture(request(item("a")), WAIT_S)


def test_a_server_whose_engine_is_lost_says_so(serve, connect, held):
    server = serve()

    def lost(tasks, spec):
        raise torch.AcceleratorError("device lost")

    held.capture_together = lost
    with pytest.raises(ServerUnavailable, match="device lost"):
        connect(server).capture(request(item("a")), WAIT_S)
    assert server.ended.wait(WAIT_S)
    assert isinstance(server.failed, torch.AcceleratorError)
    assert httpx.get(f"{server.url}/healthz").status_code == 503


def test_a_response_whose_client_hung_up_is_not_finished(serve, connect, held):
    held.info = replace(held.info, eos_token_ids=())
    server = serve()
    forwards = []

    def long(prompts, options, between):
        def is_refused():
            try:
                between()
            except Refused:
                return True
            return False

        def next_forward():
            forwards.append(len(forwards))
            if len(forwards) == 3:
                runs.wait_until(is_refused, "the client to be gone")
            between()

        return HFTargetEngine.generate(held, prompts, options, next_forward)

    held.generate = long
    body = wire.GENERATE[0].write(GenerateRequest(((3, 4),), Generate(100)))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/generate", content=body, headers=AUTH, timeout=0.5)
    connect(server).capture(request(item("a")), WAIT_S)
    assert len(forwards) == 3


def test_another_revision_is_refused(serve, connect):
    with pytest.raises(ServerRefused, match="revision"):
        connect(serve()).capture(request(item("a"), revision="another"), WAIT_S)


def test_what_a_client_that_hung_up_asked_for_is_not_captured(serve, connect, held):
    server = serve()
    queue = server._service._queue
    with held.held():
        running, answered = in_thread(lambda: connect(server).capture(request(item("running")), WAIT_S))
        assert held.begun.wait(WAIT_S)
        body = wire.CAPTURE[0].write(request(item("a"), item("b")))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/capture", content=body, headers=AUTH, timeout=0.5)
        runs.wait_until(lambda: not queue._jobs, "the queue to be empty")
    running.join(WAIT_S)
    assert answered[0].reply.items[0].failure is None
    connect(server).capture(request(item("c")), WAIT_S)
    assert held.batches == [["running"], ["c"]]


def test_stopping_refuses_who_waits_answers_who_is_served_and_ends(serve, connect, held):
    server = serve()
    client = connect(server)
    with held.held():
        running, answered = in_thread(lambda: client.capture(request(item("a")), WAIT_S))
        assert held.begun.wait(WAIT_S)
        waiting, refused = in_thread(lambda: client.capture(request(item("b")), WAIT_S))
        runs.wait_until(lambda: server._service._queue._jobs, "the second request")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        waiting.join(WAIT_S)
        assert "stopping" in str(refused[0])
        assert httpx.get(f"{server.url}/healthz").status_code == 503
    running.join(WAIT_S)
    assert answered[0].reply.items[0].failure is None
    stopping.join(WAIT_S)
    assert not stopping.is_alive()
    with pytest.raises(ServerUnavailable):
        client.info(1.0)


def test_responses_are_the_targets_and_drawn_ones_a_function_of_the_seed(serve, connect, held):
    client = connect(serve(order="arrival"))
    prompts = ((5, 6, 7), (9,), (10, 11))
    for options in (Generate(12), Generate(12, temperature=1.0, top_p=0.9, top_k=50, seed=3)):
        reply = client.generate(GenerateRequest(prompts, options), WAIT_S)
        alone = [client.generate(GenerateRequest((prompt,), options), WAIT_S).items[0] for prompt in prompts]
        assert list(reply.items) == alone
        expected = [HFTargetEngine.generate(held, [prompt], options)[0] for prompt in prompts]
        assert [one.token_ids for one in reply.items] == [one.token_ids for one in expected]
    other = client.generate(GenerateRequest(prompts, Generate(12, temperature=1.0, seed=4)), WAIT_S)
    assert [one.token_ids for one in other.items] != [one.token_ids for one in reply.items]


def test_drawn_tokens_have_the_targets_distribution(serve, connect, tmp_path):
    """400 seeds over 8 tokens, chi-squared: 24.3 is exceeded by one right sampler in a thousand (7 degrees)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None, initializer_range=0.5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    engine = HFTargetEngine(tmp_path)
    client = connect(serve(engine))
    (sample,) = engine.capture([PromptTask("p", 0, (1, 2), ())], CaptureSpec((), True))
    expected = torch.softmax(target_logits(engine.tables, sample.tensors["last"][-1]) / 0.9, dim=-1).double()
    drawn = Counter(
        client.generate(GenerateRequest(((1, 2),), Generate(1, temperature=0.9, seed=seed)), WAIT_S).items[0].token_ids
        for seed in range(400)
    )
    counts = torch.tensor([drawn[(token,)] for token in range(8)], dtype=torch.float64)
    assert counts.sum() == 400
    assert ((counts - 400 * expected) ** 2 / (400 * expected)).sum() < 24.3


@pytest.fixture(scope="module")
def open_to_all(tiny_target_dir):
    """A server for requests that are made up."""
    settings = ServingSettings(max_feature_bytes=8 << 20, max_sinks=1 << 20)
    server = TargetServer(HeldEngine(tiny_target_dir), settings, TOKEN)
    server.start()
    yield server
    for sink in list(server._service._sinks._open):
        server._service.close_sink(CloseSink(sink))
    assert server.stop()


@pytest.mark.parametrize("path", ["capture", "generate", "sinks/close"])
@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_no_made_up_request_breaks_the_server(open_to_all, path, mode):
    schema = schemathesis.openapi.from_url(f"{open_to_all.url}/openapi.json", headers=AUTH)
    statuses = set()

    @hypothesis.settings(
        max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @hypothesis.given(schema[f"/v1/{path}"]["POST"].as_strategy(generation_mode=mode))
    def send(case):
        tame(case.body)
        assert case.call(headers={}).status_code == 401
        response = case.call(headers=AUTH)
        case.validate_response(
            response, checks=(status_code_conformance, content_type_conformance, response_schema_conformance)
        )
        statuses.add(response.status_code)

    send()
    # headers are made up too, the token's among them
    assert statuses <= {200, 401, 409, 422, 503}
    assert httpx.get(f"{open_to_all.url}/v1/info", headers=AUTH).status_code == 200


def tame(body):
    """No made-up Mooncake Store is connected to, and no response takes long."""
    if isinstance(body, dict) and isinstance(body.get("sink"), dict) and body["sink"].get("kind") == "mooncake":
        body["sink"]["buffer_bytes"] = 1 << 40
    if isinstance(body, dict) and isinstance(body.get("generate"), dict):
        body["generate"]["max_new_tokens"] = 1


def test_the_command_serves_until_sigterm_and_its_features_stay_for_the_run(
    tmp_path, tiny_target_dir, serve, connect, held
):
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n")
    token_file.chmod(0o600)
    served = serving.ServedTarget(tmp_path, tiny_target_dir, ("--token-file", str(token_file), "--json"))
    sink = arena(f"serve-command-{os.getpid()}")
    try:
        with contextlib.closing(SpecforgeServer(served.start(), TOKEN)) as client:
            reply = client.capture(request(item("a"), sink=sink), WAIT_S).reply
        served.stop()
    finally:
        if served.command is not None and served.command.process.poll() is None:
            served.kill()
    said = json.loads(served.command.stdout.read_text())
    assert (said["dtype"], said["target_revision"]) == ("float32", reply.target_revision)
    assert same_bits(read(sink, reply)[0], in_process(held, item("a")))
    # any server of the host frees what an earlier one left
    connect(serve()).close_sink(sink)
    with contextlib.closing(SharedMemoryFeatureStore.attach(sink.run_id)) as store:
        assert store.stored() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--order", "random"), "strict or arrival"),
        (("--max-feature-bytes", "much"), "8GB"),
        (("--dtype", "float4"), "target.dtype"),
        (("--host", "0.0.0.0"), "token"),
        (("--token-file", "nowhere"), "nowhere"),
    ],
)
def test_options_that_cannot_be_served_are_explained(capsys, tiny_target_dir, arguments, said):
    with pytest.raises(SystemExit) as left:
        cli.main(["serve-target", "--target", str(tiny_target_dir), "--port", "0", *arguments])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_token_that_others_can_read_is_refused(capsys, tmp_path, tiny_target_dir):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    with pytest.raises(SystemExit) as left:
        cli.main(["serve-target", "--target", str(tiny_target_dir), "--token-file", str(file)])
    assert left.value.code == 2
    assert f"chmod 600 {file}" in capsys.readouterr().err
