"""Writes down what a running SGLang with SpecForge's plug-in answers, for the unit tests of its dialect.

    python tests/live_sglang/record_answers.py URL TOKEN DIRECTORY

The server has the packaged target, in bfloat16. Of ``/server_info`` only what is read is kept.
"""

import json
import sys
from pathlib import Path
from typing import Any

import httpx

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import CaptureItem, CaptureRequest, InlineSink, SharedDirSink, Sink
from specforge.inference.plugins.orders import Order
from specforge.inference.servers.sglang import _ordered

PROMPT = (5, 6, 7)


def capture_of(sink: Sink, layers: tuple[int, ...] = (1,), revision: str | None = None) -> dict[str, Any]:
    item = CaptureItem("recorded", 1, ())
    return _ordered(PROMPT, Order(CaptureRequest((item,), CaptureSpec(layers, True, "bfloat16"), sink, revision)))


def main() -> None:
    url, token, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    greedy = {"temperature": 0.0, "max_new_tokens": 4}
    without = _ordered((0,), Order())
    without["rid"] = without["rid"].removeprefix("specforge-")
    requests: dict[str, tuple[dict[str, Any], str]] = {
        "info": (_ordered((0,), Order()), token),
        "captured": (capture_of(InlineSink()), token),
        "other_layers": (capture_of(InlineSink(), (2,)), token),
        "other_revision": (capture_of(InlineSink(), (1,), "0" * 64), token),
        "forbidden_dir": (capture_of(SharedDirSink("run", "/nowhere")), token),
        "without_plugin": (without, token),
        "unauthorized": (_ordered((0,), Order()), "another"),
        "too_long": ({"input_ids": [1] * 2043, "sampling_params": greedy}, token),
        "generated": ({"input_ids": [[5, 6, 7, 8], [9, 10, 11]], "sampling_params": greedy}, token),
        "stopped": ({"input_ids": [[5, 6, 7, 8]], "sampling_params": greedy | {"stop_token_ids": [63]}}, token),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, (body, key) in requests.items():
        answer = httpx.post(f"{url}/generate", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120)
        write(directory / f"{name}.json", answer.status_code, answer.json())
    said = httpx.get(f"{url}/server_info", headers={"Authorization": f"Bearer {token}"}, timeout=120).json()
    kept = {name: said[name] for name in ("version", "enable_deterministic_inference")}
    write(directory / "server_info.json", 200, kept)


def write(path: Path, status: int, body: Any) -> None:
    path.write_text(json.dumps({"status": status, "body": body}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
