"""The ledger in a real PostgreSQL server that is restarted, killed and cut off while it is used."""

import contextlib
import itertools
import socket
import subprocess
import sys
import threading

import psycopg
import pytest
from illegal_statements import ILLEGAL, execute, fill

from specforge.control_plane.metadata.base import Attempt, MetadataStore, SampleState
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.control_plane.modes import Deployment, DeploymentMode, open_metadata_store
from specforge.errors import ConfigError, ControlPlaneError, InvalidTransition
from specforge.testing.metadata_store import MetadataStoreSuite, make_task, read_counts
from specforge.testing.postgres import temporary_server

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def server():
    with temporary_server() as server:
        yield server


@pytest.fixture
def name():
    return f"run_{next(_NUMBERS)}"


@pytest.fixture
def store(server, name):
    store = SqlMetadataStore(server.url, name=name, retry_s=30)
    store.register([make_task(i) for i in range(4)])
    yield store
    store.close()


class TestPostgres(MetadataStoreSuite):
    @pytest.fixture(autouse=True)
    def _ledger(self, server):
        self._url = server.url
        self._opened = []
        yield
        for store in self._opened:
            store.close()

    def make_store(self) -> MetadataStore:
        self._opened.append(SqlMetadataStore(self._url, name=f"run_{next(_NUMBERS)}"))
        return self._opened[-1]


@pytest.mark.parametrize("statement", ILLEGAL)
def test_the_schema_itself_refuses(server, name, statement):
    with contextlib.closing(SqlMetadataStore(server.url, name=name)) as store:
        fill(store)
        with pytest.raises(InvalidTransition, match="the ledger refused"):
            execute(store, statement)


def backend_of(store):
    return store.transact(lambda: store.database.connection.exec_driver_sql("SELECT pg_backend_pid()").scalar())


def end_backend(server, pid):
    """Cut the session off, and wait until it is gone."""
    with psycopg.connect(server.url, autocommit=True) as admin:
        assert admin.execute("SELECT pg_terminate_backend(%s, 30000)", [pid]).fetchone() == (True,)


@pytest.mark.parametrize("kill", [True, False])
def test_a_restart_between_transactions_is_not_noticed(server, store, kill):
    assert store.lease([0], "w0") == [1]
    server.restart(kill=kill)
    assert store.sample(0).state is SampleState.LEASED
    assert store.lease([1], "w0") == [1]
    server.restart(kill=kill)
    store.requeue([Attempt(0, 1), Attempt(1, 1)])
    assert store.counts().num_leased == 0


@pytest.mark.parametrize("kill", [True, False])
def test_a_unit_of_work_is_run_again_as_a_whole_when_the_server_restarts_inside_it(server, store, kill):
    seen = []

    def work():
        generations = store.lease([0], "w0")
        if not seen:
            server.restart(kill=kill)
        seen.append(generations)
        return generations + store.lease([1, 2], "w0")

    assert store.transact(work) == [1, 1, 1]
    assert seen == [[1], [1]]
    assert store.counts().num_leased == 3


def test_a_unit_of_work_that_hides_the_loss_of_its_connection_is_run_again_all_the_same(server, store):
    pid = backend_of(store)
    refusals = []

    def work():
        store.lease([0], "w0")
        if not refusals:
            end_backend(server, pid)
        try:
            store.lease([1], "w0")
        except ControlPlaneError as error:
            refusals.append(error)

    store.transact(work)
    assert len(refusals) == 1
    assert store.counts().num_leased == 2


def test_reading_survives_a_lost_connection(server, store):
    end_backend(server, backend_of(store))
    assert list(store.tasks()) == [make_task(i) for i in range(4)]


class CuttingProxy:
    """Passes bytes between a client and the server; armed, it cuts both off around the client's next COMMIT."""

    def __init__(self, server):
        parts = psycopg.conninfo.conninfo_to_dict(server.url)
        self._server = (parts["host"], int(parts["port"]))
        self._threads: list[threading.Thread] = []
        self.listen(0)
        port = self._listener.getsockname()[1]
        self.url = server.url.replace(f":{parts['port']}/", f":{port}/")
        self.cut: str | None = None

    def listen(self, port):
        self._listener = socket.create_server(("127.0.0.1", port))
        self._threads.append(threading.Thread(target=self._accept))
        self._threads[-1].start()

    def refuse(self):
        """No new connections; the port."""
        port = self._listener.getsockname()[1]
        # Closing alone does not wake a thread that is in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        return port

    def close(self):
        self.refuse()
        for thread in self._threads:
            thread.join()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                upstream = socket.create_connection(self._server)
                for source, sink, is_client in ((client, upstream, True), (upstream, client, False)):
                    thread = threading.Thread(target=self._pass_on, args=(source, sink, is_client))
                    self._threads.append(thread)
                    thread.start()

    def _pass_on(self, source, sink, is_client):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not is_client and self.cut == "committed":
                    # The answer to COMMIT: it is done, and the client does not get to know.
                    break
                if is_client and self.cut == "after" and b"COMMIT" in data:
                    self.cut = "committed"
                elif is_client and self.cut == "before" and b"COMMIT" in data:
                    break
                sink.sendall(data)
        if self.cut in {"committed", "before"} and data:
            self.cut = None
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.mark.parametrize(("cut", "num_runs"), [("after", 1), ("before", 2)])
def test_a_commit_whose_answer_is_lost_counts_once(server, name, cut, num_runs):
    proxy = CuttingProxy(server)
    runs = []
    with contextlib.closing(proxy), contextlib.closing(SqlMetadataStore(proxy.url, name=name, retry_s=30)) as store:
        store.register([make_task(i) for i in range(4)])

        def work():
            runs.append(cut)
            return store.lease([0, 1], "w0")

        proxy.cut = cut
        assert store.transact(work) == [1, 1]
        assert proxy.cut is None
        assert len(runs) == num_runs
        assert [store.sample(i).generation for i in range(3)] == [1, 1, 0]
        assert store.lease([2], "w0") == [1]


def test_after_a_commit_of_unknown_outcome_nothing_more_is_done(server, name):
    proxy = CuttingProxy(server)
    with contextlib.closing(proxy), contextlib.closing(SqlMetadataStore(proxy.url, name=name, retry_s=0.3)) as store:
        store.register([make_task(0)])
        port = proxy.refuse()
        proxy.cut = "after"
        with pytest.raises(ControlPlaneError, match="could not be reached"):
            store.lease([0], "w0")
        proxy.listen(port)
        with pytest.raises(ControlPlaneError, match="then resume the run"):
            store.num_tasks()
    with contextlib.closing(SqlMetadataStore(server.url, name=name)) as again:
        assert again.sample(0).generation == 1, "it had happened"


def test_a_second_writer_is_refused_until_the_first_is_gone(server, store, name):
    with pytest.raises(ConfigError, match="in use by another process"):
        SqlMetadataStore(server.url, name=name, retry_s=0.2)
    store.close()
    with contextlib.closing(SqlMetadataStore(server.url, name=name, retry_s=0.2)) as successor:
        assert successor.num_tasks() == 4


def test_the_ledger_of_a_dead_writer_is_free_at_once(server, name):
    program = (
        "import os, sys\n"
        "from specforge.control_plane.metadata.sql import SqlMetadataStore\n"
        "from specforge.testing.metadata_store import make_task\n"
        "store = SqlMetadataStore(sys.argv[1], name=sys.argv[2])\n"
        "store.register([make_task(i) for i in range(4)])\n"
        "store.lease([2], 'w0')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, server.url, name], check=False, timeout=60)
    assert done.returncode == -9
    with contextlib.closing(SqlMetadataStore(server.url, name=name)) as store:
        (item,) = store.in_flight()
        assert item.attempt == Attempt(2, 1)


def test_a_writer_that_lost_its_ledger_to_another_changes_nothing_more(server, store, name):
    end_backend(server, backend_of(store))
    with contextlib.closing(SqlMetadataStore(server.url, name=name)) as other:
        assert other.lease([0], "w1") == [1]
    for _ in range(2):
        with pytest.raises(ControlPlaneError, match="another process has written"):
            store.lease([1], "w0")
    assert read_counts(server.url, name=name)["num_leased"] == 1


def test_a_server_that_stays_away_is_a_clear_error_and_the_store_goes_on_when_it_is_back(server, name):
    with contextlib.closing(SqlMetadataStore(server.url, name=name, retry_s=0.3)) as store:
        store.register([make_task(0)])
        server.stop()
        try:
            for _ in range(2):
                with pytest.raises(ControlPlaneError, match=r"could not be reached for 0.3 s .*start its server"):
                    store.lease([0], "w0")
        finally:
            server.start()
        assert store.lease([0], "w0") == [1]


def test_runs_share_a_database_and_see_nothing_of_each_other(server, store):
    with contextlib.closing(SqlMetadataStore(server.url, name=f"run_{next(_NUMBERS)}")) as other:
        assert other.num_tasks() == 0
        assert store.num_tasks() == 4


def test_status_reads_the_ledger_of_a_live_run(server, store, name):
    store.lease([0], "w0")
    assert read_counts(server.url, name=name)["num_leased"] == 1
    with contextlib.closing(SqlMetadataStore(server.url, name=name, read_only=True)) as reader:
        with pytest.raises(ControlPlaneError, match="read-only"):
            reader.lease([1], "w0")
        store.lease([2], "w0")
        assert reader.counts().num_leased == 2
        end_backend(server, backend_of(reader))
        assert reader.counts().num_leased == 2


def test_what_is_no_ledger_is_refused(server, store, name):
    with pytest.raises(ConfigError, match="cannot be used as one"):
        read_counts(server.url, name="nobody_made_this")
    with psycopg.connect(server.url) as admin:
        admin.execute("CREATE SCHEMA foreign_tables")
        admin.execute("CREATE TABLE foreign_tables.other (x int)")
    with pytest.raises(ConfigError, match="cannot be used as one"):
        SqlMetadataStore(server.url, name="foreign_tables")
    store.close()
    with psycopg.connect(server.url) as admin:
        admin.execute(f"UPDATE {name}.run SET value = '1' WHERE key = 'schema_version'")
    with pytest.raises(ConfigError, match="schema version 1, this build reads version 3"):
        SqlMetadataStore(server.url, name=name)


def test_an_address_that_cannot_be_used_is_one_clear_sentence(server, monkeypatch):
    with pytest.raises(ConfigError, match=r"holds a password.*PGPASSWORD") as refusal:
        SqlMetadataStore(server.url.replace("specforge@", "specforge:hidden@"))
    assert "hidden" not in str(refusal.value)
    with pytest.raises(ConfigError, match="lower-case letters"):
        SqlMetadataStore(server.url, name='x"; DROP SCHEMA public')
    with pytest.raises(ConfigError, match="postgresql://user@host:port/database"):
        SqlMetadataStore("postgresql://[half")
    monkeypatch.setenv("PGPASSWORD", "wrong")
    with pytest.raises(ConfigError, match=r"cannot be opened.*PGPASSWORD"):
        SqlMetadataStore(server.url, retry_s=0)


def test_without_its_driver_the_extra_is_named(server):
    program = (
        "import sys\n"
        "sys.modules['psycopg'] = None\n"
        "from specforge.control_plane.metadata.sql import SqlMetadataStore\n"
        "from specforge.errors import MissingExtraError\n"
        "try:\n"
        "    SqlMetadataStore('postgresql://specforge@127.0.0.1:1/postgres')\n"
        "except MissingExtraError as error:\n"
        "    assert 'specforge[postgres]' in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_commits_are_flushed_to_the_disk(server, store):
    def show(setting):
        return store.transact(lambda: store.database.connection.exec_driver_sql(f"SHOW {setting}").scalar())

    assert (show("synchronous_commit"), show("fsync")) == ("on", "on")


def test_the_mode_takes_a_url(server, name):
    opened = open_metadata_store(Deployment(DeploymentMode.DISAGGREGATED, server.url, name))
    with contextlib.closing(opened) as store:
        assert store.durable
        assert read_counts(server.url, name=name)["num_samples"] == 0
