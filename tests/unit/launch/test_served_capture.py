import contextlib
import logging
import socket
import threading

import pytest

from specforge.config.run import RunConfig
from specforge.errors import CaptureTestFailed, ServerBusy, ServerRefused
from specforge.inference.self_test.report import SelfTestReport, failed
from specforge.inference.servers.specforge import SpecforgeServer
from specforge.inference.servers.terms import Terms
from specforge.launch import servers
from specforge.launch.served_capture import TestedServers
from specforge.testing.fake_server import FakeServer
from specforge.testing.samples import SMALL_TARGET

DEADLINE_S = 90.0


class Tests:
    """Every server passes but those in ``bad``; that of ``slow`` is tested until ``going_on`` is set."""

    __test__ = False

    def __init__(self, bad=(), slow=None):
        self.bad, self.slow = bad, slow
        self.tested: list[str] = []
        self.at_work, self.going_on = threading.Event(), threading.Event()

    def test(self, server):
        self.tested.append(server.url)
        if server.url == self.slow:
            self.at_work.set()
            assert self.going_on.wait(DEADLINE_S)
        checks = (failed("finite", "finite", "everywhere"),) if server.url in self.bad else ()
        return SelfTestReport(server.url, server.info(20.0), checks)


@pytest.fixture
def pair():
    with FakeServer(SMALL_TARGET) as one, FakeServer(SMALL_TARGET) as two, contextlib.ExitStack() as ends:
        clients = [SpecforgeServer(fake.url) for fake in (one, two)]
        for client in clients:
            ends.callback(client.close)
        yield clients


def accept(tested, server):
    tested.accept(server, server.info(20.0))


def test_a_server_is_tested_once_and_again_when_it_is_doubted(pair):
    tests = Tests()
    tested = TestedServers(tests, Terms())
    for _ in range(2):
        accept(tested, pair[0])
    assert len(tests.tested) == 1
    tested.doubt(pair[0].url)
    accept(tested, pair[0])
    assert tests.tested == [pair[0].url] * 2


def test_a_server_that_is_silent_in_its_test_holds_up_no_other(pair):
    tests = Tests(slow=pair[0].url)
    tested = TestedServers(tests, Terms())
    thread = threading.Thread(target=accept, args=(tested, pair[0]), daemon=True)
    thread.start()
    assert tests.at_work.wait(DEADLINE_S)
    accept(tested, pair[1])
    with pytest.raises(ServerBusy, match="is being tested"):
        accept(tested, pair[0])
    tests.going_on.set()
    thread.join(DEADLINE_S)
    accept(tested, pair[0])
    assert sorted(tests.tested) == sorted(server.url for server in pair)


def test_all_that_answer_are_tested_and_what_is_wrong_is_said_of_all(pair, caplog):
    gone = FakeServer(SMALL_TARGET).start()
    gone.stop()
    tests = Tests(bad=[server.url for server in pair])
    with pytest.raises(ServerRefused) as caught:
        TestedServers(tests, Terms()).all([*pair, SpecforgeServer(gone.url)])
    assert all(server.url in str(caught.value) for server in pair)
    assert gone.url in caplog.text


def test_a_server_of_another_number_format_than_one_that_passed_is_refused(pair):
    tests = Tests(bad=[pair[0].url])
    tested = TestedServers(tests, Terms())
    with pytest.raises(CaptureTestFailed):
        accept(tested, pair[0])
    accept(tested, pair[1])
    with pytest.raises(ServerRefused, match="float32"):
        TestedServers(None, Terms("bfloat16")).accept(pair[1], pair[1].info(20.0))


def test_sinks_are_closed_at_all_servers_within_one_deadline(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(servers, "GOODBYES_S", 2.0)
    with (
        FakeServer(SMALL_TARGET) as one,
        FakeServer(SMALL_TARGET) as two,
        FakeServer(SMALL_TARGET, token="secret") as locked,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        urls = [f"http://127.0.0.1:{silent.getsockname()[1]}", locked.url, one.url, two.url]
        config = RunConfig.model_validate(
            {
                "run_dir": tmp_path,
                "topology": "disaggregated",
                "target": {"path": tmp_path, "servers": {"urls": urls}},
                "data": {"path": tmp_path},
                "algorithm": {"name": "eagle3"},
                "data_plane": {"store": {"kind": "shared_memory", "capacity_bytes": 1 << 20}},
            }
        )
        with caplog.at_level(logging.WARNING):
            servers.close_sinks(config)
        assert one.closed == two.closed == [servers.sink_of(config)]
        assert not locked.closed
    assert urls[0] in caplog.text
    assert "401" in caplog.text
