"""The control plane over a socket: both sides as clients, in this process and in others."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from served import AUTH, TOKEN, Served, in_thread, refs_of, wait_until

from specforge.contracts import codec
from specforge.control_plane.client import ControlPlaneClient
from specforge.control_plane.server import ControlPlaneServer
from specforge.control_plane.wire import KEY_HEADER
from specforge.errors import ConfigError, ContractError, ControlPlaneError, InvalidTransition
from specforge.testing.metadata_store import make_ref, make_task


@pytest.fixture
def served():
    served = Served()
    yield served
    served.close()


@pytest.fixture
def http(served):
    with httpx.Client(base_url=served.server.url, headers={**AUTH, KEY_HEADER: "k"}, trust_env=False) as http:
        yield http


LEASE = {"worker_id": "w1", "max_tasks": 1, "timeout_s": 0.0}


def test_the_client_gives_what_the_controller_gives(served):
    reply = served.client.lease("w0", 3, 5.0)
    assert [lease.task for lease in reply.leases] == [make_task(served.controller._order.index_at(s)) for s in range(3)]
    served.client.heartbeat("w0")
    assert served.client.commit(refs_of(reply.leases[:2])).accepted == (True, True)
    refs = served.reader.poll(5, 0.0)
    assert [ref.ref for ref in refs] == refs_of(reply.leases[:2])
    failed = reply.leases[2]
    served.client.fail("w0", failed.task.sample_id, failed.generation, "odd prompt")
    assert served.client.commit(refs_of([failed])).accepted == (False,)
    (again,) = served.client.lease("w0", 1, 5.0).leases
    assert again.generation == 2
    served.client.leave("w0", None)
    assert served.client.lease("w2", 1, 5.0).leases[0].generation == 3
    served.client.ack([ref.slot for ref in refs], 1)
    served.client.checkpointed(1)
    summary = served.client.summary()
    assert summary == served.controller.summary()
    assert (summary["num_slots_trained"], summary["durable_step"], summary["num_failures"]) == (2, 1, 1)
    with pytest.raises(InvalidTransition):
        served.client.ack([ref.slot for ref in refs], 2)


def test_a_long_poll_ends_when_there_is_something_to_capture(served):
    leases = served.client.lease("w0", 10, 5.0).leases
    served.client.commit(refs_of(leases))
    thread, outcome = in_thread(lambda: served.client.lease("w0", 1, 50.0))
    served.client.ack([ref.slot for ref in served.reader.poll(1)], 1)
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


def test_a_client_that_hangs_up_is_given_no_lease(served, http):
    leases = served.client.lease("w0", 10, 5.0).leases
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/lease", json={**LEASE, "timeout_s": 50.0}, timeout=0.3)
    waiting = served.controller._changed._waiters
    wait_until(lambda: not waiting)
    served.client.commit(refs_of(leases))
    served.client.ack([ref.slot for ref in served.reader.poll(4)], 1)
    assert len(served.client.lease("w0", 10, 0.0).leases) == 4


def test_a_call_that_comes_again_with_its_key_gets_the_answer_that_it_got(served, http):
    replies = [http.post("/v1/lease", json={**LEASE, "max_tasks": 2}).json() for _ in range(2)]
    assert replies[0] == replies[1]
    assert len(replies[0]["leases"]) == 2
    assert served.controller.times["lease"] == 1
    ack = {"slots": [{"epoch": 0, "position": 7}], "step": 1}
    refused = [http.post("/v1/ack", json=ack, headers={KEY_HEADER: "another"}) for _ in range(2)]
    assert [response.status_code for response in refused] == [409, 409]
    assert refused[0].content == refused[1].content
    assert served.controller.times["ack"] == 1


def test_a_call_that_comes_again_while_the_first_waits_gets_the_same_answer(served, http):
    leases = served.client.lease("w0", 10, 5.0).leases
    served.client.commit(refs_of(leases))
    body = {**LEASE, "max_tasks": 10, "timeout_s": 50.0}
    both = [in_thread(lambda: http.post("/v1/lease", json=body, timeout=60.0).json()) for _ in range(2)]
    wait_until(lambda: served.controller.times["lease"] == 2)
    served.client.ack([ref.slot for ref in served.reader.poll(2)], 1)
    for thread, _ in both:
        thread.join(20)
    assert both[0][1] == both[1][1]
    assert len(both[0][1][0]["leases"]) == 2
    assert served.controller.times["lease"] == 2


def test_who_waits_for_a_call_that_was_given_up_carries_it_out(served, http):
    leases = served.client.lease("w0", 10, 5.0).leases
    served.client.commit(refs_of(leases))
    body = {**LEASE, "timeout_s": 50.0}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/lease", json=body, timeout=0.3)
    thread, outcome = in_thread(lambda: http.post("/v1/lease", json=body, timeout=60.0).json())
    served.client.ack([ref.slot for ref in served.reader.poll(1)], 1)
    thread.join(20)
    assert len(outcome[0]["leases"]) == 1


def test_every_call_that_changes_something_needs_a_key_of_its_own(served, http):
    del http.headers[KEY_HEADER]
    for path, body in [
        ("lease", LEASE),
        ("commit", {"refs": []}),
        ("fail", {"worker_id": "w0", "sample_id": "s0", "generation": 1, "reason": ""}),
        ("leave", {"worker_id": "w0", "reason": None}),
        ("ack", {"slots": [], "step": 1}),
        ("checkpointed", {"step": 0}),
        ("refs/consumed", {"consumer": "c", "stream_id": "s", "num_refs": 0}),
    ]:
        response = http.post(f"/v1/{path}", json=body)
        assert response.status_code == 422
        assert KEY_HEADER in response.json()["message"]
    assert http.post("/v1/heartbeat", json={"worker_id": "w0"}).status_code == 200
    assert http.post("/v1/commit", json={"refs": []}, headers={KEY_HEADER: "k"}).status_code == 200
    for path, body in [("ack", {"slots": [], "step": 1}), ("lease", LEASE)]:
        response = http.post(f"/v1/{path}", json=body, headers={KEY_HEADER: "k"})
        assert response.status_code == 422
        assert "was used for another call" in response.json()["message"]


def test_the_description_is_complete(http):
    document = http.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert document["security"] == [{"token": []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []
    components = document["components"]["schemas"]
    text = json.dumps(document)
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= set(components)
    bodies = [path["post"]["requestBody"]["content"] for path in document["paths"].values() if "post" in path]
    names = [body["application/json"]["schema"]["$ref"].rpartition("/")[2] for body in bodies]
    assert len(names) == 10
    assert not any(components[name]["additionalProperties"] for name in [*names, "SampleRef", "FeatureSpec", "Slot"])
    for path in document["paths"].values():
        answers = path["post"]["responses"] if "post" in path else {}
        assert not answers or {"200", "401", "408", "409", "413", "422", "503"} <= set(answers)


def test_an_inherited_socket_keeps_the_address_over_servers():
    served = Served()
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        servers = [ControlPlaneServer(served.controller, TOKEN, listener=inherited.dup()) for _ in range(2)]
        servers[0].start()
        client = ControlPlaneClient(servers[0].url, TOKEN)
        client.heartbeat("w0")
        servers[0].stop()
        # Connections wait in the socket's queue until the successor takes them.
        thread, outcome = in_thread(lambda: client.lease("w0", 1, 1.0))
        servers[1].start()
        thread.join(30)
        assert servers[0].url == servers[1].url
        assert len(outcome[0].leases) == 1
        client.close()
        servers[1].stop()
    served.close()


@pytest.mark.parametrize("token", ["x", "wrong", TOKEN + "x"])
def test_nothing_but_health_is_answered_without_the_token(served, token):
    reading = [("GET", "/v1/summary"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/x")]
    with httpx.Client(base_url=served.server.url, headers={"Authorization": f"Bearer {token}"}) as http:
        for method, path in [*reading, ("POST", "/v1/lease")]:
            response = http.request(method, path)
            assert (response.status_code, response.json()["type"]) == (401, "ControlPlaneError")
        assert http.get("/healthz").json() == {"status": "ok"}
    stranger = ControlPlaneClient(served.server.url, token)
    with pytest.raises(ControlPlaneError, match="token"):
        stranger.heartbeat("w0")
    stranger.close()


def test_a_server_without_a_token_is_for_loopback_alone(served):
    for token, host in [("", "127.0.0.1"), (None, "0.0.0.0"), (None, "::"), (None, "example.org")]:
        with pytest.raises(ConfigError, match="token"):
            ControlPlaneServer(served.controller, token, host=host)
    with socket.create_server(("0.0.0.0", 0)) as everywhere, pytest.raises(ConfigError, match="token"):
        ControlPlaneServer(served.controller, None, listener=everywhere)
    open_to_all = ControlPlaneServer(served.controller, None)
    open_to_all.start()
    client = ControlPlaneClient(open_to_all.url, None)
    client.heartbeat("w0")
    client.close()
    open_to_all.stop()


def test_invalid_requests_are_refused_and_change_nothing(served, http):
    lease = served.client.lease("w0", 1, 0.0).leases[0]
    ref = json.loads(codec.dumps(make_ref(lease.task, lease.generation)))
    del ref["type"], ref["v"]
    before = served.controller.summary()
    for path, body in [
        ("lease", {**LEASE, "extra": 1}),
        ("lease", {**LEASE, "max_tasks": 0}),
        ("lease", {**LEASE, "max_tasks": 1.0}),
        ("lease", {**LEASE, "max_tasks": True}),
        ("lease", {**LEASE, "timeout_s": 1e9}),
        ("lease", {**LEASE, "worker_id": "w" * 1001}),
        ("lease", {**LEASE, "worker_id": "w\0"}),
        ("commit", {"refs": [{**ref, "tensor": [0.0]}]}),
        ("commit", {"refs": [{**ref, "generation": 0}]}),
        ("commit", {"refs": [{**ref, "num_bytes": 2**64}]}),
        ("commit", {"refs": [{**ref, "num_tokens": 3}]}),
        ("commit", {"refs": ref}),
        ("ack", {"slots": [{"epoch": -1, "position": 0}], "step": 1}),
        ("ack", {"slots": [], "step": 2**63}),
        ("fail", {"worker_id": "w0"}),
    ]:
        response = http.post(f"/v1/{path}", json=body)
        assert response.status_code == 422, (path, body)
        assert response.json()["type"] == "ContractError"
    response = http.post("/v1/commit", json={"refs": [{**ref, "features": [{**ref["features"][0], "offset": "0"}]}]})
    assert "CommitBody.refs[0].features[0].offset: expected a valid integer" in response.json()["message"]
    for content in (b"{torn", b"", b"[" * 50_000, b"\xff", b'{"worker_id":NaN}'):
        assert http.post("/v1/heartbeat", content=content).status_code == 422
    assert http.post("/v1/commit", content=b"x" * 100_001).status_code == 413
    assert http.post("/v1/commit", content=iter([b"x" * 60_000] * 2)).status_code == 413
    assert http.get("/v1/unknown").status_code == 404
    wrong_method = http.get("/v1/commit")
    assert (wrong_method.status_code, wrong_method.headers["Allow"]) == (405, "POST")
    assert served.controller.summary() == before


def test_errors_of_the_controller_arrive_as_what_they_are(served):
    lease = served.client.lease("w0", 1, 0.0).leases[0]
    other = make_ref(make_task(lease.task.index, num_tokens=3), lease.generation)
    with pytest.raises(ContractError, match="the prompt has 8 tokens"):
        served.client.commit([other])
    with pytest.raises(ContractError, match=r"LeaseBody\.max_tasks"):
        served.client.lease("w0", 0, 0.0)


def test_a_reason_of_any_length_and_content_arrives(served):
    lease = served.client.lease("w0", 1, 0.0).leases[0]
    served.client.fail("w0", lease.task.sample_id, lease.generation, "\0\ud800 no such file " * 10_000)
    assert served.controller.summary()["num_failures"] == 1


def test_the_metrics_are_those_of_the_summary(served, http):
    served.client.lease("w0", 3, 0.0)
    text = http.get("/metrics").text
    assert "specforge_num_leased 3.0" in text
    assert 'specforge_run_state{state="running"} 1.0' in text
    assert 'specforge_control_plane_calls_total{call="lease",status="200"} 1.0' in text


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


def test_waiting_workers_and_their_server_stay_asleep(served):
    leases = served.client.lease("w0", 10, 5.0).leases
    assert len(leases) == 4
    before = served.controller.times["lease"]
    threads = [in_thread(lambda: served.client.lease("w1", 1, 3.0)) for _ in range(8)]
    wait_until(lambda: served.controller.times["lease"] == before + 8)
    start_s = time.process_time()
    for thread, outcome in threads:
        thread.join(20)
        assert outcome[0].leases == ()
    assert time.process_time() - start_s < 1.0, "clients, server and controller of 8 blocked leases"
