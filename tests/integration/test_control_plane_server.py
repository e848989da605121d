"""The control plane over a socket: the capture side as a client, in this process and in others."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from specforge.contracts import codec
from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.client import ControlPlaneClient
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.prompts import SampleOrder
from specforge.control_plane.server import ControlPlaneServer
from specforge.errors import ConfigError, ContractError, ControlPlaneError
from specforge.testing.metadata_store import make_ref, make_task

TOKEN = "a secret of the run"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


class Served:
    """A controller behind a server, its trainer's end, and a client."""

    def __init__(self, num_samples=8, **settings):
        self.writer, self.reader = memory_channel()
        self.controller = DataFlowController(
            InMemoryMetadataStore(),
            SampleOrder(num_samples, 1, seed=0),
            [make_task(i) for i in range(num_samples)],
            self.writer,
            ControllerSettings(**{"window_slots": 4, **settings}),
            lambda pairs: None,
        )
        self.server = ControlPlaneServer(self.controller, TOKEN, max_body_bytes=100_000)
        self.server.start()
        self.client = ControlPlaneClient(self.server.url, TOKEN, retry_s=0.2)

    def close(self):
        self.client.close()
        self.server.stop()


@pytest.fixture
def served():
    served = Served()
    yield served
    served.close()


def refs_of(leases):
    return [make_ref(lease.task, lease.generation) for lease in leases]


def in_thread(function):
    """The thread that runs ``function`` and the list that gets its outcome."""
    outcome = []

    def run():
        try:
            outcome.append(function())
        except ControlPlaneError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def wait_until(condition, deadline_s=30.0):
    give_up_at = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_the_client_gives_what_the_controller_gives(served):
    reply = served.client.lease("w0", 3, 5.0)
    assert [lease.task for lease in reply.leases] == [make_task(served.controller._order.index_at(s)) for s in range(3)]
    served.client.heartbeat("w0")
    assert served.client.commit(refs_of(reply.leases[:2])).accepted == (True, True)
    assert [ref.ref for ref in served.reader.poll(5, 0.0)] == refs_of(reply.leases[:2])
    failed = reply.leases[2]
    served.client.fail("w0", failed.task.sample_id, failed.generation, "odd prompt")
    assert served.client.commit(refs_of([failed])).accepted == (False,)
    assert served.client.lease("w0", 1, 5.0).leases[0].generation == 2
    assert served.client.summary()["num_committed"] == 2
    served.client.abandon("w0", "no memory")
    assert served.client.lease("w0", 1, 60.0).finished
    assert "no memory" in served.controller.summary()["failure"]


def test_a_long_poll_ends_when_there_is_something_to_capture(served):
    leases = served.client.lease("w0", 10, 5.0).leases
    served.client.commit(refs_of(leases))
    thread, outcome = in_thread(lambda: served.client.lease("w0", 1, 50.0))
    served.controller.ack([ref.slot for ref in served.reader.poll(1)], 1)
    thread.join(20)
    assert len(outcome[0].leases) == 1


def test_stopping_the_server_ends_long_polls_and_says_that_it_is_gone(served):
    served.client.lease("w0", 10, 5.0)
    threads = [in_thread(lambda: served.client.lease("w1", 1, 50.0)) for _ in range(50)]
    # More polls than a default pool has threads do not hold up other calls.
    served.client.heartbeat("w0")
    stopping = threading.Thread(target=served.server.stop)
    stopping.start()
    stopping.join(20)
    assert not stopping.is_alive()
    for thread, outcome in threads:
        thread.join(20)
        assert "is gone" in str(outcome[0])


def test_a_client_that_hangs_up_is_given_no_lease(served):
    leases = served.client.lease("w0", 10, 5.0).leases
    body = {"worker_id": "w1", "call_id": "c", "max_tasks": 1, "timeout_s": 50.0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.server.url}/v1/lease", json=body, headers=AUTH, timeout=0.3)
    waiting = served.controller._changed._waiters
    wait_until(lambda: not waiting)
    served.client.commit(refs_of(leases))
    served.controller.ack([ref.slot for ref in served.reader.poll(4)], 1)
    assert len(served.client.lease("w0", 10, 0.0).leases) == 4


def test_a_repeated_lease_call_gets_the_same_leases(served):
    body = {"worker_id": "w0", "call_id": "once", "max_tasks": 2, "timeout_s": 0.0}
    replies = [httpx.post(f"{served.server.url}/v1/lease", json=body, headers=AUTH).json() for _ in range(2)]
    assert replies[0] == replies[1]
    assert len(replies[0]["leases"]) == 2


def test_a_client_outlives_a_restart_of_the_server(served):
    port = int(served.server.url.rsplit(":", 1)[1])
    patient = ControlPlaneClient(served.server.url, TOKEN, retry_s=30.0)
    patient.heartbeat("w0")
    served.server.stop()
    thread, outcome = in_thread(lambda: patient.lease("w0", 1, 1.0))
    again = ControlPlaneServer(served.controller, TOKEN, port=port)
    again.start()
    thread.join(30)
    again.stop()
    patient.close()
    assert len(outcome[0].leases) == 1


@pytest.mark.parametrize("token", ["x", "wrong", TOKEN + "x"])
def test_nothing_but_health_is_answered_without_the_token(served, token):
    with httpx.Client(base_url=served.server.url, headers={"Authorization": f"Bearer {token}"}) as http:
        for method, path in [("GET", "/v1/summary"), ("POST", "/v1/lease"), ("GET", "/openapi.json"), ("GET", "/x")]:
            assert http.request(method, path).status_code == 401
        assert http.get("/healthz").json() == {"status": "ok"}
    stranger = ControlPlaneClient(served.server.url, token)
    with pytest.raises(ControlPlaneError, match="token"):
        stranger.heartbeat("w0")
    stranger.close()
    with pytest.raises(ConfigError, match="token"):
        ControlPlaneServer(served.controller, "")


def test_invalid_requests_are_refused_and_change_nothing(served):
    lease = served.client.lease("w0", 1, 0.0).leases[0]
    ref = codec.to_json(make_ref(lease.task, lease.generation))
    before = served.controller.summary()
    with httpx.Client(base_url=served.server.url, headers=AUTH) as http:
        for path, body in [
            ("lease", {"worker_id": "w0", "call_id": "c", "max_tasks": 1, "timeout_s": 0.0, "extra": 1}),
            ("lease", {"worker_id": "w0", "call_id": "c", "max_tasks": 0, "timeout_s": 0.0}),
            ("lease", {"worker_id": "w0", "call_id": "c", "max_tasks": 1, "timeout_s": 1e9}),
            ("commit", {"refs": [{**ref, "tensor": [0.0]}]}),
            ("commit", {"refs": [{**ref, "v": 2}]}),
            ("commit", {"refs": [{**ref, "num_tokens": 3}]}),
            ("fail", {"worker_id": "w0"}),
        ]:
            response = http.post(f"/v1/{path}", json=body)
            assert response.status_code == 422, (path, body)
            assert response.json()["type"] == "ContractError"
        assert http.post("/v1/commit", content=b"{torn").status_code == 422
        assert http.post("/v1/commit", content=b"x" * 100_001).status_code == 413
        assert http.post("/v1/commit", content=iter([b"x" * 60_000] * 2)).status_code == 413
    assert served.controller.summary() == before


def test_errors_of_the_controller_arrive_as_what_they_are(served):
    lease = served.client.lease("w0", 1, 0.0).leases[0]
    other = make_ref(make_task(lease.task.index, num_tokens=3), lease.generation)
    with pytest.raises(ContractError, match="the prompt has 8 tokens"):
        served.client.commit([other])


WORKER = """
import json, sys, time
from specforge.control_plane.client import ControlPlaneClient
from specforge.testing.metadata_store import make_ref

client = ControlPlaneClient(sys.argv[1], sys.argv[2])
name, die = sys.argv[3], sys.argv[4] == "die"
while True:
    reply = client.lease(name, 2, 30.0)
    if reply.finished:
        break
    if die and reply.leases:
        print("leased", flush=True)
        time.sleep(1000)
    client.commit([make_ref(lease.task, lease.generation) for lease in reply.leases])
print(json.dumps({"cpu_s": time.process_time()}), flush=True)
"""


def start_worker(served, name, what=""):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, served.server.url, TOKEN, name, what], stdout=subprocess.PIPE, text=True
    )


def test_workers_in_other_processes_finish_a_run_though_one_is_killed():
    served = Served(num_samples=40, window_slots=8, lease_s=1.0)
    doomed = start_worker(served, "w0", "die")
    assert doomed.stdout.readline().strip() == "leased"
    os.kill(doomed.pid, signal.SIGKILL)
    workers = [start_worker(served, f"w{i}") for i in (1, 2)]
    trained = []
    while not served.reader.ended:
        refs = served.reader.poll(4, 30.0)
        assert refs or served.reader.ended
        trained += [ref.slot.position for ref in refs]
        served.controller.ack([ref.slot for ref in refs], len(trained))
    assert trained == list(range(40))
    for worker in [doomed, *workers]:
        worker.communicate(timeout=30)
    assert [worker.returncode for worker in workers] == [0, 0]
    served.close()


def test_a_waiting_worker_and_its_server_stay_asleep(served):
    leases = served.client.lease("w0", 10, 5.0).leases
    assert len(leases) == 4
    thread, outcome = in_thread(lambda: served.client.lease("w1", 1, 1.0))
    sent = []
    original = served.controller._expire
    served.controller._expire = lambda: (sent.append(1), original())
    thread.join(20)
    assert outcome[0].leases == ()
    assert len(sent) <= 3, "a blocked lease looks again only when something changed or a lease may have expired"
    assert json.dumps(served.client.summary())
