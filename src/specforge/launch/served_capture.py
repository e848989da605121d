"""The capture process of a run whose target is in live servers: it asks them, and holds no model."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence

from specforge.contracts.capture_server import ServerInfo
from specforge.control_plane.client import ControlPlaneClient
from specforge.errors import EngineError, ServerBusy, ServerRefused, ServerUnavailable, TargetError
from specforge.inference.servers.base import CaptureServer
from specforge.inference.servers.rollout import ServedRollout
from specforge.inference.servers.stint import INFO_S, ServedSettings
from specforge.inference.servers.terms import Terms
from specforge.launch.capture_token import read_token
from specforge.launch.engines import terms_of
from specforge.launch.inputs import TargetInputs
from specforge.launch.plan import servers_write
from specforge.launch.runtime import CaptureRuntime
from specforge.launch.self_test import ServerTests, example_prompts, raise_for
from specforge.launch.servers import connect, listing_of, sink_of
from specforge.launch.stores import open_reader, open_writer
from specforge.prompts.responses import ResponseOptions

_LOG = logging.getLogger(__name__)


def build_served_capture(inputs: TargetInputs, worker_id: str) -> CaptureRuntime:
    """Store and connections. ``inputs.config`` is resolved: it names the store's size and the servers.

    Every server is tested before it is used, all that answer now at once. A failure of one of these ends the run with a
    ``TargetError``; one that comes later is not used.
    """
    config = inputs.config
    servers = config.target.servers
    assert servers is not None
    listing, sink = listing_of(servers), sink_of(config)
    with contextlib.ExitStack() as resources:
        store = open_reader(config) if servers_write(config) else open_writer(config)
        resources.callback(store.close)
        read_token(servers.token_file)  # later it may be away for a while
        tests = None
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
        tested = TestedServers(tests, terms_of(config))
        if tests is not None:
            with _explained():
                tested.all([connect(servers, url) for url in listing.current()])
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
            accept=tested.accept,
            doubt=tested.doubt,
        )

        def start(url: str, token: str, open_until_end: contextlib.ExitStack) -> _Explained:
            client = ControlPlaneClient(url, token, reconnect_s=config.control_plane.reconnect_s)
            open_until_end.callback(client.close)
            return _Explained(ServedRollout(client, lambda at: connect(servers, at), listing, store, settings))

        runtime = CaptureRuntime(start, resources.pop_all())
    return runtime


class TestedServers:
    """Which servers may be used: those that keep to the terms, and passed the test, if there is one, as what they say
    they are. From any thread; a server that is silent in its test holds up nobody else.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    def __init__(self, tests: ServerTests | None, terms: Terms) -> None:
        self._tests, self._terms = tests, terms
        self._passed: dict[str, ServerInfo] = {}
        self._at_work: set[str] = set()
        self._lock = threading.Lock()

    def accept(self, server: CaptureServer, info: ServerInfo) -> None:
        """Test ``server`` where it was not yet. Raises ``CaptureTestFailed`` with a sentence for every broken
        convention, ``ServerRefused`` for one that does not keep to the terms, ``ServerBusy`` while it is tested.
        """
        self._terms.check(server.url, info)
        if self._tests is not None:
            with self._turn(server.url) as is_known:
                if is_known != info:
                    raise_for([self._tests.test(server)])
                with self._lock:
                    self._passed[server.url] = info
        self._terms.accept(server.url, info)

    def doubt(self, url: str) -> None:
        """Test it again before it is used again."""
        with self._lock:
            self._passed.pop(url, None)

    def all(self, servers: Sequence[CaptureServer]) -> None:
        """Accept, and close, those that answer now, at once. Raises ``ServerRefused`` for all that are refused."""
        errors: list[Exception] = []

        def accept(server: CaptureServer) -> None:
            with contextlib.closing(server):
                try:
                    self.accept(server, server.info(INFO_S))
                except ServerUnavailable as error:
                    _LOG.warning("%s. It is tested when it answers", error)
                except Exception as error:  # noqa: BLE001 - raised below
                    errors.append(error)

        threads = [threading.Thread(target=accept, args=(server,), name="self-test", daemon=True) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            if not isinstance(error, EngineError):
                raise error
        if errors:
            raise ServerRefused("\n".join(map(str, errors)))

    @contextlib.contextmanager
    def _turn(self, url: str) -> Iterator[ServerInfo | None]:
        """One test of a server at a time; what it was when it passed one."""
        with self._lock:
            if url in self._at_work:
                raise ServerBusy(f"the capture server {url} is being tested")
            self._at_work.add(url)
            known = self._passed.get(url)
        try:
            yield known
        finally:
            with self._lock:
                self._at_work.discard(url)


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
