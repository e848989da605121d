"""The capture process of a run whose target is in live servers: it asks them, and holds no model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from specforge.contracts.capture_server import ServerInfo
from specforge.control_plane.client import ControlPlaneClient
from specforge.errors import ServerRefused, ServerUnavailable, TargetError
from specforge.inference.servers.base import CaptureServer
from specforge.inference.servers.rollout import ServedRollout
from specforge.inference.servers.stint import ServedSettings
from specforge.launch.inputs import TargetInputs
from specforge.launch.plan import servers_write
from specforge.launch.runtime import CaptureRuntime
from specforge.launch.self_test import ServerTests, example_prompts, raise_for
from specforge.launch.servers import connect, listing_of, sink_of
from specforge.launch.stores import open_reader, open_writer
from specforge.prompts.responses import ResponseOptions


def build_served_capture(inputs: TargetInputs, worker_id: str) -> CaptureRuntime:
    """Store and connections. ``inputs.config`` is resolved: it names the store's size and the servers.

    Every server is tested before it is used. A failure of one that answers now ends the run with a ``TargetError``; one
    that comes later is not used.
    """
    config = inputs.config
    servers = config.target.servers
    assert servers is not None
    listing, sink = listing_of(servers), sink_of(config)
    with contextlib.ExitStack() as resources:
        store = open_reader(config) if servers_write(config) else open_writer(config)
        resources.callback(store.close)
        tested = None
        if servers.self_test:
            tests = ServerTests(
                inputs.target,
                inputs.spec,
                sink,
                store if servers_write(config) else None,
                example_prompts(inputs.target),
                servers.timeout_s,
                config.target.trust_remote_code,
            )
            tested = TestedServers(tests)
            with _explained():
                for url in listing.current():
                    with contextlib.closing(connect(servers, url)) as server, contextlib.suppress(ServerUnavailable):
                        tested(server)
        settings = ServedSettings(
            worker_id=worker_id,
            spec=inputs.spec,
            target=inputs.target,
            sink=sink,
            max_in_flight=servers.max_in_flight,
            timeout_s=servers.timeout_s,
            longest_backoff_s=servers.longest_backoff_s,
            unserved_s=servers.unserved_s,
            responses=ResponseOptions.of_run(config.data.generate, config.seed),
            accept=tested,
        )

        def start(url: str, token: str, open_until_end: contextlib.ExitStack) -> _Explained:
            client = ControlPlaneClient(url, token, reconnect_s=config.control_plane.reconnect_s)
            open_until_end.callback(client.close)
            return _Explained(ServedRollout(client, lambda at: connect(servers, at), listing, store, settings))

        runtime = CaptureRuntime(start, resources.pop_all())
    return runtime


class TestedServers:
    """Tests a server the first time that it is met as what it says it is. From any thread, one test at a time."""

    __test__ = False  # no test case, whatever pytest makes of the name

    def __init__(self, tests: ServerTests) -> None:
        self._tests = tests
        self._passed: set[tuple[str, ServerInfo]] = set()
        self._lock = threading.Lock()

    def __call__(self, server: CaptureServer) -> None:
        """Raises ``CaptureTestFailed`` with a sentence for every broken convention."""
        with self._lock:
            known = server.url, server.info(self._tests.timeout_s)
            if known not in self._passed:
                raise_for([self._tests.test(server)])
                self._passed.add(known)


class _Explained:
    """A rollout whose refusal by all servers is the user's to mend, not a traceback."""

    def __init__(self, rollout: ServedRollout) -> None:
        self._rollout = rollout

    def run(self) -> None:
        with _explained():
            self._rollout.run()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ServerRefused as error:
        raise TargetError(str(error)) from error
