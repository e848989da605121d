"""MooncakeFeatureStore between real processes, and the service, some of which are killed."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import torch
from children import child_process

from specforge.config.launch import RestartOptions
from specforge.contracts.codec import dumps, loads
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import PutRequest
from specforge.data_plane.config import MooncakeConfig
from specforge.data_plane.mooncake import MooncakeFeatureStore
from specforge.errors import ConfigError, FeatureNotFound, FeatureStoreError, FeatureStoreFull, MissingExtraError
from specforge.launch import mooncake
from specforge.launch.mooncake import MooncakeService, warnings
from specforge.testing.feature_store import assert_same_bits, filled, make_ref, put_one
from specforge.testing.mooncake import TIMES, settings_of, temporary_service

CAPACITY = 256 * 2**20
LARGE = 16 * 2**20
"""Bytes: more than sockets take on the way."""
SAMPLES = {
    "bf16": {"x": torch.arange(500).to(torch.bfloat16).reshape(20, 25), "y": torch.tensor([True, False])},
    "fp8": {"x": torch.arange(100).to(torch.float8_e4m3fn), "ids": torch.arange(7, dtype=torch.int32)},
}


@pytest.fixture
def service():
    with temporary_service(CAPACITY) as service:
        yield service


@pytest.fixture
def store(service):
    with contextlib.closing(MooncakeFeatureStore(settings_of(service, "run", reconnect_s=30.0))) as store:
        yield store


def write(pipe, settings):
    """A writer process: puts what it is told to, until it is killed."""
    store = MooncakeFeatureStore(settings)
    while True:
        what = pipe.recv()
        if what == "samples":
            stored = store.put([PutRequest(name, 1, tensors) for name, tensors in SAMPLES.items()])
        else:
            stored = store.put([PutRequest(f"large{index}", 1, filled(LARGE, index)) for index in range(4)])
        names = [item.key.partition("#")[0].rpartition("/")[2] for item in stored]
        pipe.send([dumps(make_ref(name, 1, item)) for name, item in zip(names, stored, strict=True)])


def writer_process(service):
    settings = settings_of(service, "run", buffer_bytes=5 * LARGE)
    return child_process(write, settings, preload=["specforge.testing.mooncake", __name__])


def put_samples(pipe):
    pipe.send("samples")
    assert pipe.poll(60), "the writer said nothing for a minute"
    return [loads(SampleRef, text) for text in pipe.recv()]


def kill(child):
    child.kill()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def allocated_bytes(service):
    text = httpx.get(f"http://{service.addresses.admin}/metrics", trust_env=False).text
    [line] = [line for line in text.splitlines() if line.startswith("master_allocated_bytes ")]
    return int(line.split()[1])


def assert_reads(store, refs, expected):
    for ref, tensors in zip(refs, expected, strict=True):
        [(got, handle)] = store.get([ref])
        assert_same_bits(got, tensors)
        store.release([handle])


def put_when_there_is_room(store, name, tensors):
    """As a rollout worker does: a store that is full is tried again."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return put_one(store, name, tensors)
        except FeatureStoreFull:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_reader_sees_the_bits_of_another_process_and_frees_there(service, store):
    with writer_process(service) as (_, pipe):
        refs = put_samples(pipe)
        assert_reads(store, refs, SAMPLES.values())
        assert sorted(store.stored()) == [("bf16", 1), ("fp8", 1)]
        store.abort([("bf16", 1), ("fp8", 1)])
        assert store.live(refs) == [False, False]
        assert allocated_bytes(service) == 0


def test_features_outlive_a_writer_that_is_killed(service, store):
    with writer_process(service) as (writer, pipe):
        refs = put_samples(pipe)
        kill(writer)
    # Longer than Mooncake keeps the objects of an owner that is gone.
    time.sleep(TIMES.client_ttl_s + 0.5)
    assert store.live(refs) == [True, True]
    assert_reads(store, refs, SAMPLES.values())


def test_batch_of_a_writer_that_is_killed_in_the_middle_leaves_nothing(service, store):
    with writer_process(service) as (writer, pipe):
        put_samples(pipe)
        before = allocated_bytes(service)
        owner = service.pids()["client"]
        # Who does not run takes no bytes: the writer hangs in the middle of its batch.
        os.kill(owner, signal.SIGSTOP)
        try:
            pipe.send("large")
            wait_until(lambda: allocated_bytes(service) > before + LARGE)
            kill(writer)
        finally:
            os.kill(owner, signal.SIGCONT)
    assert sorted(store.stored()) == [("bf16", 1), ("fp8", 1)]
    store.abort([(f"large{index}", 1) for index in range(4)])
    fresh = put_one(store, "large0", filled(64, 1), generation=2)
    assert_reads(store, [fresh], [filled(64, 1)])
    # Mooncake itself takes back the memory.
    wait_until(lambda: allocated_bytes(service) < before + LARGE)


@pytest.mark.parametrize("part", ["master", "client"])
def test_death_of_a_part_of_the_service_loses_features_and_nothing_else(service, store, part):
    ref = put_one(store, "a", filled(1000, 1))
    [(held, handle)] = store.get([ref])
    pid, addresses = service.pids()[part], service.addresses
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(FeatureNotFound, match="'a'"):
        store.get([ref])
    assert store.live([ref]) == [False]
    assert_same_bits(held, filled(1000, 1))
    store.release([handle])
    again = put_when_there_is_room(store, "b", filled(1000, 2))
    assert_reads(store, [again], [filled(1000, 2)])
    assert store.stored() == [("b", 1)]
    assert service.pids()[part] != pid
    assert service.addresses == addresses
    late = MooncakeFeatureStore(settings_of(service, "run"))
    assert_reads(late, [again], [filled(1000, 2)])
    late.close()


def test_call_that_meets_a_dead_master_ends_with_its_address(store, service):
    ref = put_one(store, "a", filled(64, 1))
    impatient = MooncakeFeatureStore(dataclasses.replace(store._settings, reconnect_s=0.2))
    service.stop()
    with pytest.raises(FeatureStoreError, match=f"{service.addresses.master} does not answer"):
        impatient.get([ref])
    with pytest.raises(FeatureStoreError, match=f"{service.addresses.admin} does not answer"):
        impatient.stored()
    impatient.close()


PARENT = """
import sys, time
from pathlib import Path
from specforge.data_plane.config import MooncakeConfig
from specforge.launch.mooncake import MooncakeService

service = MooncakeService(MooncakeConfig(), 2**24, Path(sys.argv[1]), print)
service.start()
print(*service.pids().values(), flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("service")  # skips where Mooncake cannot run
def test_service_dies_with_its_parent(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert not any(is_gone(pid) for pid in pids)
    parent.kill()
    parent.wait()
    wait_until(lambda: all(is_gone(pid) for pid in pids))
    parent.stdout.close()
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["mooncake-client.log", "mooncake-master.log"]


def test_service_stops_in_order_and_is_bound_to_loopback(tmp_path):
    with temporary_service() as service:
        pids = service.pids().values()
        known = {int(address.rpartition(":")[2]) for address in dataclasses.astuple(service.addresses)}
        listening = [
            connection.laddr
            for pid in pids
            for connection in psutil.Process(pid).net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert known <= {address.port for address in listening}
        beyond = {address.port for address in listening if address.ip != "127.0.0.1"}
        assert all(12_000 <= port <= 17_000 for port in beyond)
        [warning] = warnings(MooncakeConfig())
        assert "between 12000 and 17000" in warning
    assert all(is_gone(pid) for pid in pids)
    service.stop()


def test_program_that_dies_too_often_is_given_up(tmp_path, service):
    reasons = []
    options = RestartOptions(max_restarts=1, first_backoff_s=0.01, longest_backoff_s=0.01)
    fragile = MooncakeService(MooncakeConfig(), 2**24, tmp_path, reasons.append, options, TIMES)
    fragile.start()
    try:
        for _ in range(2):
            wait_until(lambda: "master" in fragile.pids())
            pid = fragile.pids()["master"]
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda pid=pid: fragile.pids().get("master") != pid)
        wait_until(lambda: reasons)
    finally:
        fragile.stop()
    [reason] = reasons
    assert "mooncake_master was killed by SIGKILL and is not started again after 2 deaths in a row" in reason


def test_ports_of_another_service_are_refused(tmp_path, service):
    config = MooncakeConfig(master=service.addresses.master, admin=service.addresses.admin)
    second = MooncakeService(config, 2**24, tmp_path, print)
    with pytest.raises(ConfigError, match=rf"data_plane\.mooncake\.master.*{service.addresses.master}"):
        second.start()
    second.stop()
    with pytest.raises(ConfigError, match=r"data_plane\.mooncake\.host.*192\.0\.2\.1"):
        MooncakeService(MooncakeConfig(host="192.0.2.1"), 2**24, tmp_path, print)


def test_service_that_does_not_come_up_says_why(tmp_path, monkeypatch):
    program = tmp_path / "mooncake_master"
    program.write_text("#!/bin/sh\necho E1231 out of luck\necho '@ a stack'\nexit 3\n")
    program.chmod(0o700)
    monkeypatch.setattr(mooncake, "_programs", lambda: tmp_path)
    service = MooncakeService(MooncakeConfig(), 2**24, tmp_path, print)
    with pytest.raises(FeatureStoreError, match=r"mooncake_master exited with code 3: E1231 out of luck .*master\.log"):
        service.start()
    assert service.pids() == {}


def test_missing_programs_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(mooncake.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"specforge\[mooncake\]"):
        MooncakeService(MooncakeConfig(), 2**24, tmp_path, print)
