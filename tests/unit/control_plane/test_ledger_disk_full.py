"""A ledger whose file cannot be written: nothing is half done, and the store goes on when there is space again."""

import contextlib
import subprocess
import sys

import pytest

from specforge.control_plane.metadata.base import Dispatch, SampleState
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.errors import ControlPlaneError
from specforge.testing.metadata_store import make_ref, make_task


def pragma(store, text):
    """What it answers, if it answers at all."""

    def work():
        done = store.database.connection.exec_driver_sql(f"PRAGMA {text}")
        return done.scalar() if done.returns_rows else None

    return store.transact(work)


def test_a_database_that_cannot_grow_changes_nothing_and_goes_on_when_it_can(store):
    pragma(store, f"max_page_count={pragma(store, 'page_count')}")
    before = store.counts()

    def work():
        store.lease([0], "w0")
        store.register([make_task(i, num_tokens=500) for i in range(4, 200)])

    for _ in range(2):
        with pytest.raises(ControlPlaneError, match="check free space"):
            store.transact(work)
        assert store.counts() == before
    # What needs no more pages still works.
    assert store.lease([1], "w0") == [1]
    pragma(store, "max_page_count=1000000")
    store.transact(work)
    assert store.num_tasks() == 200


def test_a_failure_of_the_disk_that_the_work_swallows_still_undoes_it(store):
    pragma(store, f"max_page_count={pragma(store, 'page_count')}")

    def work():
        store.lease([0], "w0")
        with contextlib.suppress(ControlPlaneError):
            store.register([make_task(i, num_tokens=500) for i in range(4, 200)])

    with pytest.raises(ControlPlaneError, match="full"):
        store.transact(work)
    assert store.sample(0).state is SampleState.PENDING


def test_a_database_that_turns_read_only_is_a_clear_error_and_changes_nothing(store):
    store.lease([0], "w0")
    ref = make_ref(make_task(0), 1)
    # Past the store's transactions, which cannot even begin while it is read-only.
    driver = store.transact(lambda: store.database.connection.connection.dbapi_connection)

    def work():
        store.commit([(0, ref)])
        driver.execute("PRAGMA query_only=ON")
        store.dispatch([Dispatch(0, 0, 1)])

    for _ in range(2):
        with pytest.raises(ControlPlaneError, match=r"readonly.*permissions"):
            store.transact(work)
    driver.execute("PRAGMA query_only=OFF")
    assert store.sample(0).state is SampleState.LEASED

    def again():
        store.commit([(0, ref)])
        store.dispatch([Dispatch(0, 0, 1)])

    store.transact(again)
    assert store.counts().num_slots_dispatched == 1


COMMIT_FAILS = """
import resource, sys
from pathlib import Path
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.errors import ControlPlaneError
from specforge.testing.metadata_store import make_task

path = Path(sys.argv[1])
store = SqlMetadataStore(path)
store.register([make_task(i) for i in range(4)])
log = path.with_name(path.name + "-wal")
free = resource.getrlimit(resource.RLIMIT_FSIZE)
for spare in (0, 5000, 50000):
    # No file of this process may grow: the log is written at COMMIT, and that is what fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + spare, free[1]))
    before = store.num_tasks()
    try:
        store.register([make_task(i, num_tokens=2000) for i in range(4, 60)])
    except ControlPlaneError as error:
        assert "check free space" in str(error), error
    else:
        raise AssertionError(spare)
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert store.num_tasks() == before
    assert store.lease([0], "w0") == [store.sample(0).generation]
    (item,) = store.in_flight()
    store.requeue([item.attempt])
store.register([make_task(i, num_tokens=2000) for i in range(4, 60)])
store.lease([1], "w0")
resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, free[1]))
try:
    store.register([make_task(i, num_tokens=2000) for i in range(60, 120)])
except ControlPlaneError:
    pass
import os
os.kill(os.getpid(), 9)
"""


def test_a_commit_that_the_disk_refuses_did_not_happen_for_this_process_and_for_its_successor(path):
    done = subprocess.run([sys.executable, "-c", COMMIT_FAILS, str(path)], check=False, timeout=60, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    with contextlib.closing(SqlMetadataStore(path)) as store:
        assert store.num_tasks() == 60
        assert store.sample(0).generation == 3
        (item,) = store.in_flight()
        assert item.attempt.sample == 1
        store.register([make_task(i, num_tokens=2000) for i in range(60, 120)])
