"""Every MetadataStore against the suite, and what only the SQL one promises in a file."""

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys

import pytest
from illegal_statements import ILLEGAL, execute, fill

from specforge.control_plane.metadata import statements
from specforge.control_plane.metadata.base import (
    Attempt,
    Dispatch,
    MetadataStore,
    Position,
    Quarantine,
    SampleState,
    SlotState,
)
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.noop import NoOpMetadataStore
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.control_plane.modes import Deployment, DeploymentMode, open_metadata_store
from specforge.errors import ConfigError, ControlPlaneError, InvalidTransition
from specforge.testing.metadata_store import MetadataStoreSuite, make_ref, make_task, read_counts


class TestInMemory(MetadataStoreSuite):
    def make_store(self) -> MetadataStore:
        return InMemoryMetadataStore()


class TestNoOp(MetadataStoreSuite):
    def make_store(self) -> MetadataStore:
        return NoOpMetadataStore()


class TestSqlite(MetadataStoreSuite):
    @pytest.fixture(autouse=True)
    def _ledger(self, tmp_path):
        self._path = tmp_path / "ledger.sqlite"
        self._opened = []
        yield
        for store in self._opened:
            store.close()

    def make_store(self) -> MetadataStore:
        self._opened.append(SqlMetadataStore(self._path))
        return self._opened[-1]


def train_two(store):
    store.lease([0, 1], "w0")
    store.commit([(i, make_ref(make_task(i), 1)) for i in range(2)])
    store.dispatch([Dispatch(0, 0, 1), Dispatch(1, 1, 1)])
    store.ack([0, 1], 1)


def test_everything_survives_a_restart(store, path):
    train_two(store)
    store.checkpointed(1)
    store.bind("seed=1")
    store.close()
    again = SqlMetadataStore(path)
    assert again.slot_state(1) is SlotState.DURABLE
    assert again.sample(0).ref == make_ref(make_task(0), 1)
    assert list(again.tasks()) == [make_task(i) for i in range(4)]
    with pytest.raises(ConfigError):
        again.bind("seed=2")
    again.rewind(Position(2, 1), lambda slot: slot, [])
    again.lose([Attempt(0, 1), Attempt(1, 1)])
    assert again.lease([0, 1], "w0") == [2, 2]
    again.close()


def test_what_a_call_did_survives_the_death_of_its_process(path):
    program = (
        "import os, sys\n"
        "from specforge.control_plane.metadata.sql import SqlMetadataStore\n"
        "from specforge.testing.metadata_store import make_task\n"
        "store = SqlMetadataStore(sys.argv[1])\n"
        "store.register([make_task(i) for i in range(4)])\n"
        "store.lease([2], 'w0')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=60)
    assert done.returncode == -9
    store = SqlMetadataStore(path)
    (item,) = store.in_flight()
    assert (item.attempt, item.worker_id) == (Attempt(2, 1), "w0")
    store.requeue([item.attempt])
    assert store.lease([2], "w0") == [2]
    store.close()


def test_the_file_is_private(store, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for beside in path.parent.iterdir():
        assert stat.S_IMODE(beside.stat().st_mode) == 0o600, beside


@pytest.mark.parametrize("version", [1, 99])
def test_a_ledger_of_another_schema_version_is_refused(store, path, version):
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE run SET value = ? WHERE key = 'schema_version'", [str(version)])
    with pytest.raises(ConfigError, match=f"schema version {version}, this build reads version 3"):
        SqlMetadataStore(path)


def test_a_ledger_whose_maker_was_killed_before_its_first_transaction_is_made_anew(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    assert path.stat().st_size > 0
    with contextlib.closing(SqlMetadataStore(path)) as store:
        assert store.num_tasks() == 0


@pytest.mark.parametrize("content", [b"x", b"this is not a database at all"])
def test_a_small_file_that_is_no_ledger_is_left_as_it_is(path, content):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be used as one"):
        SqlMetadataStore(path)
    assert path.read_bytes() == content


def test_a_file_that_is_no_ledger_is_refused(path):
    path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(ConfigError, match="cannot be used as one"):
        SqlMetadataStore(path)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE other (x)")
    db.close()
    with pytest.raises(ConfigError, match="cannot be used as one"):
        SqlMetadataStore(path)


def test_a_missing_directory_is_one_clear_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be opened for writing"):
        SqlMetadataStore(tmp_path / "missing" / "ledger.sqlite")


@pytest.mark.parametrize("statement", ILLEGAL)
def test_the_schema_itself_refuses(store, statement):
    fill(store)
    with pytest.raises(InvalidTransition, match="the ledger refused"):
        execute(store, statement)


@pytest.mark.parametrize(
    ("statement", "index"),
    [(statements.CRASHED, "samples_crashed"), (statements.NUM_OPEN_QUARANTINES, "quarantines_open")],
)
def test_the_few_samples_of_interest_are_found_by_an_index(store, statement, index):
    def plan():
        connection = store.database.connection
        text = statement.compile(connection, compile_kwargs={"literal_binds": True}, dialect=connection.dialect)
        return connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}").all()

    statement = statement.params(at_least=2) if statement is statements.CRASHED else statement
    (row,) = store.transact(plan)
    assert index in row.detail


def test_commits_are_flushed_to_the_disk(store):
    def read(name):
        return store.transact(lambda: store.database.connection.exec_driver_sql(f"PRAGMA {name}").scalar())

    assert (read("synchronous"), read("journal_mode"), read("foreign_keys")) == (2, "wal", 1)


def test_status_reads_the_ledger_of_a_live_run(store, path):
    train_two(store)
    summary = read_counts(path)
    assert summary["num_slots_trained"] == summary["num_unique_samples_trained"] == 2
    store.close()
    assert read_counts(path)["num_committed"] == 2
    with pytest.raises(ConfigError, match="no such file"):
        read_counts(path.with_name("other"))


def test_a_read_only_ledger_cannot_be_changed(store, path):
    reader = SqlMetadataStore(path, read_only=True)
    with pytest.raises(ControlPlaneError):
        reader.lease([0], "w0")
    reader.close()


def test_a_failed_register_of_many_parts_leaves_none_of_them(store):
    tasks = [make_task(i, num_tokens=2) for i in range(4, 2504)]
    with pytest.raises(Exception, match="expected prompt index"):
        store.register([*tasks, make_task(9999)])
    assert store.num_tasks() == 4


def test_a_closed_ledger_opens_again_only_by_opening_it(store, path):
    store.close()
    store.close()
    with pytest.raises(ControlPlaneError, match="is closed"):
        store.num_tasks()


def test_the_mode_decides_the_ledger(path):
    assert isinstance(open_metadata_store(Deployment(DeploymentMode.LOCAL_COLOCATED)), NoOpMetadataStore)
    assert not isinstance(open_metadata_store(Deployment(DeploymentMode.DATAFLOW_COLOCATED)), NoOpMetadataStore)
    with pytest.raises(ConfigError, match="give the path of a file or the URL"):
        open_metadata_store(Deployment(DeploymentMode.DISAGGREGATED))
    with contextlib.closing(open_metadata_store(Deployment(DeploymentMode.DISAGGREGATED, path))) as store:
        assert store.durable


def test_a_quarantine_survives_a_restart(store, path):
    store.quarantine(1, 5, "poison")
    store.retry(1, 9)
    store.quarantine(1, 13, "again")
    store.close()
    with contextlib.closing(SqlMetadataStore(path)) as again:
        assert again.quarantines() == [Quarantine(1, 5, 9, "poison"), Quarantine(1, 13, None, "again")]
        assert again.sample(1).state is SampleState.QUARANTINED


def test_noop_keeps_nothing_of_what_is_done():
    store = NoOpMetadataStore()
    store.register([make_task(i) for i in range(4)])
    train_two(store)
    store.release([Attempt(0, 1), Attempt(1, 1)])
    assert not store._samples
    assert not store._slots
    assert store.counts().num_slots_trained == 2


def test_control_plane_imports_no_tensor_library():
    modules = [
        "backpressure",
        "client",
        "controller",
        "modes",
        "prompts",
        "server",
        "window",
        "wire",
        "channel.file",
        "channel.memory",
        "channel.queue",
        "metadata.memory",
        "metadata.noop",
        "metadata.postgres",
        "metadata.sql",
    ]
    program = "import sys\n" + "".join(f"import specforge.control_plane.{name}\n" for name in modules)
    program += "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=dict(os.environ))
