"""Every MetadataStore against the suite, and what only the SQL one promises."""

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys

import pytest

from specforge.control_plane.metadata.base import Attempt, Dispatch, MetadataStore, SampleState, SlotState
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.noop import NoOpMetadataStore
from specforge.control_plane.metadata.sql import SqlMetadataStore, ledger_summary
from specforge.errors import ConfigError, ControlPlaneError
from specforge.testing.metadata_store import MetadataStoreSuite, make_ref, make_task


class TestInMemory(MetadataStoreSuite):
    def make_store(self) -> MetadataStore:
        return InMemoryMetadataStore()


class TestNoOp(MetadataStoreSuite):
    keeps_history = False

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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def store(path):
    store = SqlMetadataStore(path)
    store.register([make_task(i) for i in range(4)])
    yield store
    store.close()


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
    again.rewind(2, 1, lambda slot: slot)
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
    assert store.sample(2).state is SampleState.LEASED
    store.rewind(0, 0, lambda slot: slot)
    assert store.lease([2], "w0") == [2]
    store.close()


def test_the_file_is_private(store, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for beside in path.parent.iterdir():
        assert stat.S_IMODE(beside.stat().st_mode) == 0o600, beside


def test_a_ledger_of_another_schema_version_is_refused(store, path):
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE run SET value = '99' WHERE key = 'schema_version'")
    db.close()
    with pytest.raises(ConfigError, match="schema version 99, this build reads version 1"):
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


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO slots (slot, idx, generation) VALUES (0, 0, 1)",
        "INSERT INTO acks (slot, step) VALUES (0, 2)",
        "INSERT INTO acks (slot, step) VALUES (7, 2)",
        "UPDATE acks SET step = NULL",
        "UPDATE acks SET step = 0",
        "UPDATE samples SET generation = 0 WHERE idx = 0",
        "UPDATE samples SET num_failures = -1 WHERE idx = 0",
        "UPDATE samples SET state = 'odd' WHERE idx = 3",
        "UPDATE samples SET state = 'committed' WHERE idx = 3",
        "UPDATE samples SET state = 'quarantined' WHERE idx = 3",
        "INSERT INTO samples (idx, state, generation, num_failures) VALUES (0, 'pending', 5, 0)",
        "INSERT INTO tasks (idx, sample_id, body) VALUES (9, 's0', '')",
        "DELETE FROM slots",
    ],
)
def test_the_schema_itself_refuses(store, path, statement):
    train_two(store)
    db = sqlite3.connect(path)
    db.execute("PRAGMA foreign_keys=ON")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute(statement)
    db.close()


def test_a_database_that_cannot_grow_is_a_clear_error_and_changes_nothing(store, path):
    pages = store._connection.exec_driver_sql("PRAGMA page_count").scalar()
    store._connection.rollback()
    store._connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    store._connection.commit()
    with pytest.raises(ControlPlaneError, match="check free space"):
        store.register([make_task(i, num_tokens=500) for i in range(4, 200)])
    assert store.num_tasks() == 4
    store._connection.exec_driver_sql("PRAGMA max_page_count=1000000")
    store._connection.commit()
    store.register([make_task(i, num_tokens=500) for i in range(4, 200)])
    assert store.num_tasks() == 200


def test_commits_are_flushed_to_the_disk(store):
    with store._connection.begin():
        assert store._connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert store._connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_status_reads_the_ledger_of_a_live_run(store, path):
    train_two(store)
    summary = ledger_summary(path)
    assert summary["num_slots_trained"] == summary["num_unique_samples_trained"] == 2
    store.close()
    assert ledger_summary(path)["num_committed"] == 2
    with pytest.raises(ConfigError, match="no such file"):
        ledger_summary(path.with_name("other"))


def test_a_read_only_ledger_cannot_be_changed(store, path):
    reader = SqlMetadataStore(path, read_only=True)
    with pytest.raises(ControlPlaneError):
        reader.lease([0], "w0")
    reader.close()


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
        "metadata.sql",
    ]
    program = "import sys\n" + "".join(f"import specforge.control_plane.{name}\n" for name in modules)
    program += "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=dict(os.environ))
