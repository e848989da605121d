"""The self-test of capture servers: before a run's first step, and for ``specforge doctor --engine``."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from specforge.algorithms.base import TargetTables
from specforge.algorithms.parts.tables import load_target_tables
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.capture_server import InlineSink, ServerInfo, SharedDirSink, SharedMemorySink, Sink
from specforge.contracts.features import ITEM_BYTES
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.errors import CaptureTestFailed, ConfigError, EngineError, TargetError
from specforge.inference.engine import CapturedSample
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.self_test.evidence import LONG_TOKENS, Oracle, SelfTest
from specforge.inference.self_test.features import FeatureReader, InlineReader, StoreReader
from specforge.inference.self_test.report import SelfTestReport
from specforge.inference.self_test.run import self_test
from specforge.inference.servers.base import CaptureServer
from specforge.inference.target import count_parameters, load_tokenizer, read_target_info
from specforge.launch.capture_token import read_token
from specforge.launch.engines import connect_server

_LOG = logging.getLogger(__name__)

ORACLE_SHARE = 0.25
"""Of the free memory: a copy of the target that needs more is not loaded for a test."""
MAX_ORACLE_BYTES = 16 << 30
"""A larger one takes minutes to load."""
TEST_TOKENS = 1024 + LONG_TOKENS
"""More than those of all prompts of a test, each but the long one captured four times."""
TEXTS = (
    "The committee met on Tuesday to discuss the new budget, and after two hours agreed to vote again next month.",
    "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there than at sea.",
    '{"name": "Ada", "born": 1815, "known_for": ["the analytical engine", "notes", "the first program"]}',
    "In 1969 the first message was sent between two computers far from each other; only two letters of it arrived.",
)
"""What is tested with where the target has a tokenizer."""


class ServerTests:
    """Tests servers of one target for one capture spec.

    ``store``: where this process reads what goes to ``sink``; ``None`` for an inline one. Of the target nothing stays
    in memory between two tests but the states of a few prompts. Several may run at a time, in threads: they share it.
    """

    def __init__(
        self,
        target: TargetInfo,
        spec: CaptureSpec,
        sink: Sink,
        store: FeatureStore | None,
        prompts: Sequence[Sequence[int]] = (),
        timeout_s: float = 300.0,
        trust_remote_code: bool = False,
    ) -> None:
        self.timeout_s = timeout_s
        self._target, self._spec, self._sink, self._prompts = target, spec, sink, prompts
        self._reader: FeatureReader = InlineReader() if store is None else StoreReader(store)
        self._oracle = RememberedOracle(target, trust_remote_code)
        self._loading = threading.Lock()
        self._tables: dict[torch.dtype, TargetTables] = {}
        self._num_tests = 0

    def test(self, server: CaptureServer) -> SelfTestReport:
        """The report on ``server``. Raises ``ServerUnavailable`` or ``ServerRefused`` where none can be made."""
        dtype = server.info(self.timeout_s).dtype
        with self._loaded(torch.bfloat16 if dtype == "bfloat16" else torch.float32) as tables:
            return self_test(
                server,
                SelfTest(
                    target=self._target,
                    spec=self._spec,
                    sink=self._sink,
                    tables=tables,
                    reader=self._reader,
                    prompts=self._prompts,
                    oracle=self._oracle.computing_in(dtype),
                    timeout_s=self.timeout_s,
                ),
            )

    @contextlib.contextmanager
    def _loaded(self, dtype: torch.dtype) -> Iterator[TargetTables]:
        """The target's tables, which the last test that has them lets go."""
        with self._loading:
            if dtype not in self._tables:
                self._tables[dtype] = load_target_tables(self._target.path, dtype)
            tables = self._tables[dtype]
            self._num_tests += 1
        try:
            yield tables
        finally:
            with self._loading:
                self._num_tests -= 1
                if not self._num_tests:
                    self._tables.clear()


class RememberedOracle:
    """The target on this host's CPU, for as long as it captures. From any thread, one at a time."""

    def __init__(self, target: TargetInfo, trust_remote_code: bool = False) -> None:
        self.info = target
        self._trust_remote_code = trust_remote_code
        self._lock = threading.Lock()
        self._known: dict[tuple[object, ...], list[CapturedSample]] = {}
        self._broken: dict[str, str] = {}

    def computing_in(self, dtype: str) -> Oracle:
        """This oracle in the format of a server (float16, which CPUs are slow in, in float32)."""
        return _OracleIn(self, dtype if dtype == "bfloat16" else "float32")

    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec, dtype: str) -> list[CapturedSample]:
        """Loads the target where these were not captured before. Raises ``TargetError`` where it does not fit, or does
        not run here.
        """
        key = (dtype, spec, *(task.input_ids for task in tasks))
        with self._lock:
            if dtype in self._broken:
                raise TargetError(self._broken[dtype])
            if key not in self._known:
                check_fits(self.info, dtype)
                try:
                    self._known[key] = list(load_oracle(self.info, dtype, self._trust_remote_code).capture(tasks, spec))
                except Exception as error:
                    # to load it again for every server would take minutes, and fail again
                    self._broken[dtype] = f"{type(error).__name__}: {error!s:.300}"
                    raise
            return self._known[key]


class _OracleIn:
    """Implements ``Oracle``."""

    def __init__(self, oracle: RememberedOracle, dtype: str) -> None:
        self.info = oracle.info
        self._oracle, self._dtype = oracle, dtype

    def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> list[CapturedSample]:
        return self._oracle.capture(tasks, spec, self._dtype)


def raise_for(reports: Iterable[SelfTestReport]) -> None:
    """Raise ``CaptureTestFailed`` for all reports that failed at once; log what of the others is doubtful, or could not
    be verified.
    """
    failures = []
    for report in reports:
        try:
            report.raise_if_failed()
        except CaptureTestFailed as error:
            failures.append(str(error))
            continue
        for check in report.checks:
            if check.verdict == "unverified":
                _LOG.warning("the capture server %s: %s is not verified: %s", report.url, check.name, check.where)
            if check.verdict == "warning":
                _LOG.warning("the capture server %s: %s: %s", report.url, check.name, check.where)
    if failures:
        raise CaptureTestFailed("\n".join(failures))


def check_fits(target: TargetInfo, dtype: str) -> None:
    """Raise ``TargetError`` where a copy of ``target`` is too large for this host, or for a test."""
    num_bytes = ITEM_BYTES[dtype] * count_parameters(target.path)
    most = int(min(MAX_ORACLE_BYTES, ORACLE_SHARE * free_memory_bytes()))
    if num_bytes > most:
        raise TargetError(f"its weights have {num_bytes:,} bytes, of this host's memory a test takes {most:,}")


def load_oracle(target: TargetInfo, dtype: str, trust_remote_code: bool = False) -> HFTargetEngine:
    """The target on this host's CPU. Raises ``TargetError`` where transformers cannot load it."""
    return HFTargetEngine(target, dtype, trust_remote_code=trust_remote_code)


def free_memory_bytes() -> int:
    """Memory that a new allocation can have on this host; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def example_prompts(target: TargetInfo) -> list[tuple[int, ...]]:
    """A few texts as the target's tokens; none where it has no tokenizer."""
    try:
        tokenizer = load_tokenizer(target.path)
    except TargetError:
        return []
    return [tuple(tokenizer(text, verbose=False)["input_ids"]) for text in TEXTS]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What ``specforge doctor --engine`` asks for. ``layers``: ids of decoder layers; empty: what the server has, or
    three of the target. ``feature_dir``: a directory that server and doctor both see, for servers without another sink.
    """

    url: str
    target: Path
    dialect: str = "specforge"
    token_file: Path | None = None
    layers: tuple[int, ...] = ()
    feature_dir: Path | None = None
    timeout_s: float = 300.0


def diagnose(asked: Diagnosis) -> dict[str, Any]:
    """Connect, and test: a report as JSON data. Raises ``UserError`` for bad input, ``EngineError`` where the server
    does not answer or cannot serve.
    """
    target = read_target_info(asked.target)
    server = connect_server(asked.dialect, asked.url.rstrip("/"), read_token(asked.token_file))
    with contextlib.closing(server):
        info = server.info(asked.timeout_s)
        spec = CaptureSpec(
            aux_layers=asked.layers or _layers(info, target),
            last_hidden=info.last_hidden,
            dtype="float32" if info.dtype == "float32" else "bfloat16",
        )
        with _sink(asked, info, spec, target) as (sink, store):
            tests = ServerTests(target, spec, sink, store, example_prompts(target), asked.timeout_s)
            try:
                report = tests.test(server)
            finally:
                if store is not None:
                    with contextlib.suppress(EngineError):  # what it failed with is what was asked for
                        server.close_sink(sink)
    return {**report.as_dict(), "aux_layers": list(spec.aux_layers), "sink": sink.kind}


def _layers(info: ServerInfo, target: TargetInfo) -> tuple[int, ...]:
    """What the server captures, else an early, a middle and a late layer."""
    if info.layers is not None:
        return tuple(layer for layer in info.layers if 0 <= layer < target.num_layers)
    last = target.num_layers - 1
    return tuple(sorted({min(1, last), target.num_layers // 2, max(0, last - 1)}))


@contextlib.contextmanager
def _sink(
    asked: Diagnosis, info: ServerInfo, spec: CaptureSpec, target: TargetInfo
) -> Iterator[tuple[Sink, FeatureStore | None]]:
    """A sink that the server can write to, and the store that reads it: the answer itself where it can."""
    name = f"self-test-{secrets.token_hex(4)}"
    capacity_bytes = max(64 << 20, 4 * spec.layout(target.hidden_size, TEST_TOKENS)[1])
    if "inline" in info.sinks:
        yield InlineSink(), None
    elif "shared_dir" in info.sinks and asked.feature_dir is not None:
        with contextlib.closing(SharedDirFeatureStore(asked.feature_dir, name)) as files:
            try:
                yield SharedDirSink(name, str(asked.feature_dir.absolute())), files
            finally:
                files.remove_all()
    elif "shared_memory" in info.sinks and _is_here(asked.url):
        with contextlib.closing(SharedMemoryFeatureStore.attach(name)) as memory:
            yield SharedMemorySink(name, capacity_bytes, max_samples=256), memory
    else:
        raise ConfigError(
            f"the capture server {asked.url} writes to {', '.join(info.sinks) or 'nothing'}, which doctor cannot read "
            "from here: run it on the server's host for shared memory, or give --feature-dir with a directory that "
            "both see and that the server may write to"
        )


def _is_here(url: str) -> bool:
    """Whether ``url`` is of this host's loopback."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
