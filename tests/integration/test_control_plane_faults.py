"""The control plane on a bad network: servers that go and come back, lost answers, torn and slow requests."""

import json
import socket
import threading

import pytest
from cutting_proxy import CuttingProxy
from served import AUTH, TOKEN, Served, capture, in_thread, refs_of, wait_until

from specforge.control_plane.channel.network import NetworkRefReader
from specforge.control_plane.client import ControlPlaneClient
from specforge.control_plane.gate import MAX_HEAD_BYTES
from specforge.control_plane.wire import KEY_HEADER
from specforge.errors import ControlPlaneError


def train(served, client, num_slots, after_step=lambda step: None):
    """The trainer's side over the network, two slots a step; the positions in the order of training."""
    reader = NetworkRefReader(client, "rank 0")
    trained, step = [], 0
    while refs := reader.poll(2, 30.0):
        step += 1
        client.ack([ref.slot for ref in refs], step)
        reader.mark_consumed(len(refs))
        client.checkpointed(step)
        trained += [ref.slot.position for ref in refs]
        after_step(step)
    assert reader.ended
    assert trained == list(range(num_slots))
    return step


def check_counts(served, num_slots, num_steps):
    """Everything was done once, and what was done is what was counted."""
    summary = served.controller.summary()
    assert (summary["num_slots_trained"], summary["num_commits"]) == (num_slots, num_slots)
    assert (summary["num_leases_given"], summary["num_late_commits"], summary["num_crashes"]) == (num_slots, 0, 0)
    assert (summary["last_step"], summary["durable_step"]) == (num_steps, num_steps)


def test_a_run_goes_on_over_restarts_of_the_server_and_counts_everything_once():
    served = Served(num_samples=60, consumers=["rank 0"], window_slots=8)
    workers = [in_thread(lambda name=f"w{i}": capture(served.connect(), name)) for i in range(3)]

    def restart_now_and_then(step):
        if step % 7 == 0:
            served.server.stop()
            served.restart()

    num_steps = train(served, served.connect(), 60, restart_now_and_then)
    for thread, outcome in workers:
        thread.join(30)
        assert outcome == [None]
    check_counts(served, 60, num_steps)
    served.close()


@pytest.mark.parametrize("half", [False, True])
def test_a_run_whose_answers_get_lost_does_nothing_twice(half):
    served = Served(num_samples=24, consumers=["rank 0"], window_slots=8)
    proxy = CuttingProxy(served.port, lambda number: number % 3 == 2, half=half)
    worker, outcome = in_thread(lambda: capture(served.connect(port=proxy.port), "w0"))
    num_steps = train(served, served.connect(port=proxy.port), 24)
    worker.join(30)
    assert outcome == [None]
    assert proxy.num_cut >= num_steps
    check_counts(served, 24, num_steps)
    assert (served.controller.times["ack"], served.controller.times["checkpointed"]) == (num_steps, num_steps)
    served.close()
    proxy.close()


def test_every_call_whose_answer_was_lost_is_carried_out_once():
    served = Served()
    proxy = CuttingProxy(served.port, lambda number: number % 2 == 0)
    client = served.connect(port=proxy.port)
    leases = client.lease("w0", 4, 0.0).leases
    assert len(leases) == 4
    assert client.commit(refs_of(leases[:2])).accepted == (True, True)
    client.fail("w0", leases[2].task.sample_id, leases[2].generation, "odd prompt")
    client.leave("w0", "no memory")
    assert served.controller.times == dict.fromkeys(("lease", "commit", "fail", "leave"), 1)
    assert proxy.num_cut == 4
    summary = served.controller.summary()
    assert (summary["num_failures"], summary["num_crashes"]) == (1, 1)
    served.close()
    proxy.close()


def test_a_client_whose_server_stays_away_says_so():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
    client = ControlPlaneClient(f"http://127.0.0.1:{port}", TOKEN, reconnect_s=0.3)
    with pytest.raises(ControlPlaneError, match=r"is gone: no answer for 0\.3 s \(ConnectError"):
        client.heartbeat("w0")
    client.close()


def test_closing_the_client_ends_a_call_that_waits_for_the_server():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    client = ControlPlaneClient(f"http://127.0.0.1:{port}", TOKEN, reconnect_s=1000.0)
    thread, outcome = in_thread(lambda: client.heartbeat("w0"))
    client.close()
    thread.join(20)
    assert "was closed" in str(outcome[0])


def head(path, *headers):
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Authorization: {AUTH['Authorization']}", f"{KEY_HEADER}: raw"]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def connect(served):
    return socket.create_connection(("127.0.0.1", served.port), timeout=20)


def answer_of(connection):
    """Everything until the server closes the connection."""
    parts = []
    while data := connection.recv(65536):
        parts.append(data)
    return b"".join(parts)


BODY = json.dumps({"worker_id": "raw", "max_tasks": 1, "timeout_s": 0.0}).encode()


def test_slow_and_torn_requests_end_and_hold_nobody_up():
    served = Served(server={"body_timeout_s": 0.5})
    before = served.controller.summary()
    started = head("/v1/lease", f"Content-Length: {len(BODY)}") + BODY[:10]
    slow = [connect(served) for _ in range(100)]
    for connection in slow:
        connection.sendall(started)
    with connect(served) as headless:
        headless.sendall(b"POST /v1/lease HTTP/1.1\r\nHost:")
        # Others are served while a hundred bodies and a head are missing.
        for _ in range(10):
            served.client.heartbeat("w0")
        for connection in slow[:50]:
            assert answer_of(connection).startswith(b"HTTP/1.1 408")
    for connection in slow:
        connection.close()
    with connect(served) as torn:
        torn.sendall(started)
        torn.shutdown(socket.SHUT_WR)
        assert answer_of(torn) == b""
    # Only the client's own connection is left.
    wait_until(lambda: len(served.server._http._server.server_state.connections) == 1)
    assert served.controller.summary() == before
    served.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"rubbish\r\n\r\n", b"400"),
        (b"POST /v1/lease HTTP/9.9\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * MAX_HEAD_BYTES, b"400"),
        (head("/v1/lease", "Content-Length: nine"), b"400"),
        (head("/v1/lease", "Content-Length: -1"), b"400"),
        (head("/v1/lease", "Transfer-Encoding: chunked") + b"zz\r\n", b"400"),
        (head("/v1/lease", "Content-Length: 99999999999", "Connection: close"), b"413"),
        (head("/v1/lease", "Connection: close", "Transfer-Encoding: chunked") + b"fffff\r\n" + b"x" * 200_000, b"413"),
        (head("/v1/lease", "Connection: close", "Content-Length: 3") + b"\xff{}", b"422"),
        (head("/v1/lease", "Connection: close"), b"422"),
        (head("/v1/%00%ff", "Connection: close"), b"404"),
    ],
)
def test_broken_requests_are_refused(sent, status):
    served = Served()
    before = served.controller.summary()
    with connect(served) as connection:
        connection.sendall(sent)
        assert connection.recv(65536).split()[1] == status
    served.client.heartbeat("w0")
    assert served.controller.summary() == before
    served.close()


def test_requests_sent_one_behind_the_other_are_answered_in_order():
    served = Served()
    with connect(served) as connection:
        request = head("/v1/lease", f"Content-Length: {len(BODY)}") + BODY
        last = request.replace(b": raw", b": other").replace(b"Host", b"Connection: close\r\nHost")
        connection.sendall(request * 2 + last)
        answers = answer_of(connection).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * 3
    assert answers[0].partition(b"\r\n\r\n")[2] == answers[1].partition(b"\r\n\r\n")[2]
    assert served.controller.summary()["num_leased"] == 2
    served.close()


def test_stopping_does_not_wait_for_a_body_that_never_comes():
    served = Served(server={"body_timeout_s": 1000.0})
    with connect(served) as connection:
        connection.sendall(head("/v1/lease", "Content-Length: 100"))
        wait_until(lambda: served.server._http._server.server_state.tasks)
        stopping = threading.Thread(target=served.server.stop)
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()
    served.close()
