"""A real vLLM server with the SpecForge connector, on a port of loopback, for as long as a ``with`` lasts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venv-engines" / "bin" / "python"
START_S = 600
STOP_S = 60
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{REPOSITORY / 'src'}:{Path(__file__).parent}",
}


@dataclass(frozen=True)
class RunningVllm:
    url: str
    token: str
    log: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def vllm_server(
    target: Path,
    layer_ids: Sequence[int] | None,
    dtype: str,
    log: Path,
    options: dict[str, Any] | None = None,
    arguments: Sequence[str] = (),
    connector: tuple[str, str] = ("specforge.inference.plugins.vllm_connector", "SpecForgeConnector"),
) -> Iterator[RunningVllm]:
    """vLLM serving ``target`` and extracting its own ids ``layer_ids`` (0-based layer + 1), answering requests.

    ``None``: a plain server, without extraction and connector.

    ``options`` are the connector's (``kv_connector_extra_config``), ``arguments`` vLLM's; ``connector`` its module and
    class. The whole process group ends with the context.
    """
    assert PYTHON.exists(), f"{PYTHON} does not exist; make test-engines creates the engines' environment"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = "test-key"
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(target), "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", token, "--enforce-eager"]
    if layer_ids is not None:
        command += _extraction(layer_ids, options or {}, connector)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env=os.environ | ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            server = RunningVllm(f"http://127.0.0.1:{port}", token, log, process)
            _wait(server)
            yield server
        finally:
            _end(process)


def _extraction(layer_ids: Sequence[int], options: dict[str, Any], connector: tuple[str, str]) -> list[str]:
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layer_ids)}},
    }
    transfer = {
        "kv_connector": connector[1],
        "kv_connector_module_path": connector[0],
        "kv_role": "kv_producer",
        "kv_connector_extra_config": options,
    }
    return ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]


def _wait(server: RunningVllm) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.process.poll() is None, f"vLLM ended while it started:\n{tail(server.log)}"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"vLLM did not answer within {START_S} s:\n{tail(server.log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, then end whoever is left of its group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_S)


def tail(log: Path, num_bytes: int = 6000) -> str:
    return log.read_bytes()[-num_bytes:].decode(errors="replace")
