"""A real SGLang server with SpecForge's plug-in, on a port of loopback, for as long as a ``with`` lasts.

``SPECFORGE_SGLANG_PYTHON`` is its interpreter, in an environment that has specforge installed. On a CPU it starts with
``tests/engines/sglang_shims``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_S = 900
STOP_S = 60
SHIMS = Path(__file__).resolve().parents[1] / "engines" / "sglang_shims"
ON_A_CPU = ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
ON_A_CPU += ["--disable-overlap-schedule", "--max-total-tokens", "8192"]
TOKEN = "test-key"


@dataclass(frozen=True)
class RunningSglang:
    url: str
    token: str
    log: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def sglang_server(
    target: Path, layers: Sequence[int], dtype: str, log: Path, feature_dir: Path, arguments: Sequence[str] = ()
) -> Iterator[RunningSglang]:
    """SGLang serving ``target`` and capturing 0-based ``layers``, answering requests; with further ``arguments``.

    The whole process group ends with the context.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [os.environ["SPECFORGE_SGLANG_PYTHON"], "-m", "sglang.launch_server", "--model-path", str(target)]
    command += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--api-key", TOKEN, *ON_A_CPU]
    command += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
    command += ["--return-aux-hidden-state-layer-ids", *map(str, layers), *arguments]
    environment = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SPECFORGE_FEATURE_DIRS": str(feature_dir),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SHIMS), os.environ.get("PYTHONPATH")])),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            server = RunningSglang(f"http://127.0.0.1:{port}", TOKEN, log, process)
            _wait(server)
            yield server
        finally:
            _end(process)


def is_healthy(server: RunningSglang) -> bool:
    """Whether a token comes out of its scheduler."""
    asked = urllib.request.Request(f"{server.url}/health_generate", headers={"Authorization": f"Bearer {server.token}"})
    with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=30) as answer:
        return bool(answer.status == 200)
    return False


def _wait(server: RunningSglang) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert server.process.poll() is None, f"SGLang ended while it started:\n{tail(server.log)}"
        if is_healthy(server):
            return
        time.sleep(1.0)
    raise AssertionError(f"SGLang did not answer within {START_S} s:\n{tail(server.log)}")


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
