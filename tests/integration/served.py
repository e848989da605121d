"""A controller behind a server, with the ends of both of its sides."""

import threading
import time
from collections import Counter

from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.channel.network import RefStream
from specforge.control_plane.client import ControlPlaneClient
from specforge.control_plane.controller import ControllerSettings, DataFlowController
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.prompts import ListedTasks, SampleOrder
from specforge.control_plane.server import ControlPlaneServer
from specforge.errors import ControlPlaneError
from specforge.testing.features import NamedFeatures
from specforge.testing.metadata_store import make_ref, make_task

TOKEN = "a secret of the run"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


class CountingController(DataFlowController):
    """``times[name]``: how often that call was carried out."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.times = Counter()

    def lease(self, *arguments, **options):
        self.times["lease"] += 1
        return super().lease(*arguments, **options)

    def commit(self, refs):
        self.times["commit"] += 1
        return super().commit(refs)

    def fail(self, *arguments):
        self.times["fail"] += 1
        super().fail(*arguments)

    def leave(self, *arguments):
        self.times["leave"] += 1
        super().leave(*arguments)

    def ack(self, *arguments):
        self.times["ack"] += 1
        super().ack(*arguments)

    def checkpointed(self, step):
        self.times["checkpointed"] += 1
        super().checkpointed(step)


class Served:
    """``consumers``: the trainer reads over the network; without, beside the controller."""

    def __init__(self, num_samples=8, *, consumers=(), store=None, tasks=None, server=None, **settings):
        self.stream = RefStream(consumers) if consumers else None
        self.writer, self.reader = (self.stream, None) if consumers else memory_channel()
        self.features = NamedFeatures()
        self.controller = CountingController(
            InMemoryMetadataStore() if store is None else store,
            SampleOrder(num_samples, 1, seed=0),
            ListedTasks([make_task(i) for i in range(num_samples)] if tasks is None else tasks),
            self.writer,
            ControllerSettings(**{"window_slots": 4, **settings}),
            self.features,
        )
        self.options = {"stream": self.stream, "max_body_bytes": 100_000, **(server or {})}
        self.server = ControlPlaneServer(self.controller, TOKEN, **self.options)
        self.server.start()
        self.port = int(self.server.url.rsplit(":", 1)[1])
        self.clients = []
        self.client = self.connect(reconnect_s=0.2)

    def connect(self, reconnect_s=60.0, port=None):
        """A client of its own, closed with the rest."""
        client = ControlPlaneClient(f"http://127.0.0.1:{port or self.port}", TOKEN, reconnect_s=reconnect_s)
        self.clients.append(client)
        return client

    def restart(self):
        """Another server for the same controller, on the same port."""
        self.server = ControlPlaneServer(self.controller, TOKEN, port=self.port, **self.options)
        self.server.start()

    def close(self):
        for client in self.clients:
            client.close()
        self.server.stop()


def refs_of(leases):
    return [make_ref(lease.task, lease.generation) for lease in leases]


def capture(client, worker_id, max_tasks=2):
    """Lease and commit until there is nothing left; every commit must be accepted."""
    while not (reply := client.lease(worker_id, max_tasks, 30.0)).finished:
        assert all(client.commit(refs_of(reply.leases)).accepted)


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
