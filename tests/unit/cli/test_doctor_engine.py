"""``specforge doctor --engine``: a table or JSON, and an exit code that says whether the server may be trusted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from specforge.cli import main as cli
from specforge.contracts.capture_server import SharedDirSink
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.demo.run import PACKAGED_TARGET
from specforge.errors import CaptureTestFailed, TargetError
from specforge.inference.config import TargetConfig
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.self_test.report import CONVENTIONS
from specforge.inference.target import read_target_info
from specforge.launch import self_test as launched
from specforge.launch.serve_target import ServeOptions, open_server
from specforge.testing.faulty_server import FaultyServer
from specforge.testing.local_server import LocalCaptureServer

URL = "http://127.0.0.1:8100"


@pytest.fixture(scope="module")
def engine():
    return HFTargetEngine(PACKAGED_TARGET)


@pytest.fixture
def serve(monkeypatch):
    """Has a server of this process answer at every address, instead of one that speaks HTTP."""
    asked = []

    def answering(server):
        def connect(dialect, url, token):
            asked.append((dialect, url, token))
            return server

        monkeypatch.setattr(launched, "connect_server", connect)
        return asked

    return answering


@pytest.fixture
def doctor(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main(["doctor", "--engine", URL, "--target", str(PACKAGED_TARGET), *arguments])
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return run


def test_served_target_passes_over_http(doctor):
    options = ServeOptions(TargetConfig(path=PACKAGED_TARGET, dtype="float32", device="cpu"))
    server = open_server(options)
    server.start()
    try:
        code, out, _ = doctor("--engine", server.url, "--json")
    finally:
        server.stop()
    found = json.loads(out)
    assert (code, found["broken"], found["info"]["engine"]) == (0, [], "specforge")
    assert {check["verdict"] for check in found["checks"]} == {"passed"}


def test_right_server_passes(doctor, serve, engine, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o600)
    asked = serve(LocalCaptureServer(engine))
    code, out, _ = doctor("--dialect", "vllm", "--token-file", str(token), "--layers", "1,3", "--json")
    found = json.loads(out)
    assert (code, found["passed"], found["aux_layers"], found["sink"]) == (0, True, [1, 3], "inline")
    assert {check["verdict"] for check in found["checks"]} == {"passed"}
    assert asked == [("vllm", URL, "secret")]


def test_table_names_the_server_the_checks_and_what_is_broken(doctor, serve, engine):
    serve(FaultyServer(LocalCaptureServer(engine), "neighbour_layer"))
    code, out, _ = doctor("--layers", "1,3")
    assert code == 1
    assert "layer ids" in out
    assert "failed" in out
    assert CONVENTIONS["wrong_layer"] in out
    assert "layer 1 holds layer 2" in out


def test_server_that_writes_files_only_is_tested_through_a_directory(doctor, serve, engine, tmp_path):
    class Files(LocalCaptureServer):
        def __init__(self, inner):
            super().__init__(inner)
            self.opened = None

        def info(self, timeout_s):
            return replace(super().info(timeout_s), sinks=("shared_dir",))

        def capture(self, request, timeout_s):
            assert isinstance(request.sink, SharedDirSink)
            self._store = self._store or SharedDirFeatureStore(Path(request.sink.path), request.sink.run_id)
            return super().capture(request, timeout_s)

    serve(Files(engine))
    code, out, _ = doctor("--feature-dir", str(tmp_path), "--json")
    assert (code, json.loads(out)["sink"]) == (0, "shared_dir")
    assert list(tmp_path.iterdir()) == []
    serve(Files(engine))
    code, _, err = doctor()
    assert code == 2
    assert "--feature-dir" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "nowhere"),
        ("--dialect", "latin"),
        ("--engine", "10.0.0.7:8100"),
        ("--engine", "http://user:secret@10.0.0.7"),
        ("--layers", "1,,2"),
        ("--layers", "1,1"),
        ("--layers", "-1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_asked(doctor, arguments):
    code, out, err = doctor(*arguments)
    assert (code, out) == (2, "")
    assert "rror: " in err


def test_failures_of_all_servers_are_said_at_once(engine):
    target = read_target_info(PACKAGED_TARGET)
    spec = launched.CaptureSpec((1, 3), last_hidden=True)
    tests = launched.ServerTests(target, spec, launched.InlineSink(), None)
    reports = [
        tests.test(FaultyServer(LocalCaptureServer(engine), fault)) for fault in ("zeros", "same_layer", "token_ids")
    ]
    reports.append(tests.test(LocalCaptureServer(engine)))
    with pytest.raises(CaptureTestFailed) as raised:
        launched.raise_for(reports)
    assert all(CONVENTIONS[name] in str(raised.value) for name in ("zeros", "same_layer", "token_ids"))
    launched.raise_for(reports[-1:])


def test_oracle_is_loaded_once_for_several_servers(engine, monkeypatch):
    loaded = []

    def load(target, dtype, trust_remote_code=False):
        loaded.append(dtype)
        return engine

    monkeypatch.setattr(launched, "load_oracle", load)
    target = read_target_info(PACKAGED_TARGET)
    tests = launched.ServerTests(
        target, launched.CaptureSpec((1, 3), last_hidden=True), launched.InlineSink(), None, ()
    )
    reports = [tests.test(LocalCaptureServer(engine)) for _ in range(3)]
    assert loaded == ["float32"]
    assert {check.verdict for report in reports for check in report.checks} == {"passed"}


def test_target_that_does_not_fit_has_no_oracle(monkeypatch):
    target = read_target_info(PACKAGED_TARGET)
    assert launched.free_memory_bytes() > 0
    launched.check_fits(target, "float32")
    monkeypatch.setattr(launched, "free_memory_bytes", lambda: 1 << 20)
    with pytest.raises(TargetError, match="262,144"):
        launched.RememberedOracle(target).computing_in("float32").capture([], launched.CaptureSpec((1,), False))


def test_oracle_that_fails_is_not_loaded_for_every_server(engine, monkeypatch):
    loaded = []

    class Broken:
        def capture(self, tasks, spec):
            raise RuntimeError("no kernel for these weights")

    def load(target, dtype, trust_remote_code=False):
        loaded.append(dtype)
        return Broken()

    monkeypatch.setattr(launched, "load_oracle", load)
    tests = launched.ServerTests(
        read_target_info(PACKAGED_TARGET), launched.CaptureSpec((1, 3), last_hidden=True), launched.InlineSink(), None
    )
    for _ in range(2):
        report = tests.test(LocalCaptureServer(engine))
        assert report.passed
        unverified = {check.name: check.where for check in report.checks if check.verdict == "unverified"}
        assert unverified.keys() == {"layer ids", "last"}
        assert all("no kernel for these weights" in where for where in unverified.values())
    assert loaded == ["float32"]


def test_oracle_is_not_loaded_for_a_server_that_fails_before(engine, monkeypatch):
    monkeypatch.setattr(launched, "load_oracle", lambda *_: pytest.fail("nobody asked"))
    tests = launched.ServerTests(
        read_target_info(PACKAGED_TARGET), launched.CaptureSpec((1, 3), last_hidden=True), launched.InlineSink(), None
    )
    assert tests.test(FaultyServer(LocalCaptureServer(engine), "same_layer")).broken == ("same_layer",)
