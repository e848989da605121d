"""A child process that acts as its scenario says: a light stand-in for a role, with the real pipes and signals.

The configuration file is a JSON object: child name -> list of acts, one an incarnation (the last one is repeated).
What the child is told is appended to ``<name>.told`` beside it, one JSON line each, its arguments first.
"""

import argparse
import http.server
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("config", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--report-fd", type=int)
    parser.add_argument("--listen-fd", type=int)
    parser.add_argument("--worker-id")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


ARGUMENTS = parse()
TOLD = ARGUMENTS.config.with_name(f"{ARGUMENTS.name}.told")


HEARD = {event: threading.Event() for event in ("start", "lost", "endpoint")}


def report(event: str, **fields: object) -> None:
    os.write(ARGUMENTS.report_fd, json.dumps({"event": event, "fields": fields}).encode() + b"\n")


def note(event: str, fields: dict) -> None:
    with TOLD.open("a") as file:
        file.write(json.dumps({"event": event, "fields": fields}) + "\n")


def notes() -> list[dict]:
    return [json.loads(line) for line in TOLD.read_text().splitlines()]


def listen() -> None:
    for line in sys.stdin.buffer:
        message = json.loads(line)
        note(message["event"], message["fields"])
        HEARD[message["event"]].set()
    leave()


def leave(*_: object) -> None:
    note("left", {})
    report("stopped", finished=False)
    os._exit(0)


def wait_for(told: Path, event: str) -> None:
    while not told.exists() or not any(json.loads(line)["event"] == event for line in told.read_text().splitlines()):
        time.sleep(0.005)


def serve() -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = str(os.getpid()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("", 0), Answer, bind_and_activate=False)
    server.socket = socket.socket(fileno=ARGUMENTS.listen_fd)
    server.serve_forever()


def kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def until(rest: str) -> None:
    name, event = rest.split()
    wait_for(ARGUMENTS.config.with_name(f"{name}.told"), event)


def fail(message: str) -> None:
    report("failed", message=message, traceback="Traceback: in the child", error=message.partition(":")[0])
    os._exit(1)


def lose(message: str) -> None:
    report("failed", message=message, traceback="Traceback: of a loss", error="RuntimeError", lost_peer=True)
    os._exit(1)


def blame(message: str) -> None:
    report("failed", message=message, user_error=True)
    os._exit(2)


def finish(_: str) -> None:
    report("finished", finished=True, answer=42)
    os._exit(0)


ACTS = {
    "wait": lambda _: threading.Event().wait(),
    "kill": kill,
    "exit": lambda code: os._exit(int(code)),
    "hear": lambda event: HEARD[event].wait(),
    "note": lambda event: note(event, {}),
    "serving": lambda _: report("serving"),
    "serve": lambda _: serve(),
    "until": until,
    "fail": fail,
    "lose": lose,
    "blame": blame,
    "finish": finish,
    "leave": leave,
}
"""``hear <event>``: this incarnation was told so. ``until <child> <event>``: any incarnation was told, or noted, so."""


signal.signal(signal.SIGTERM, leave)
scenario = json.loads(ARGUMENTS.config.read_text())[ARGUMENTS.name]
num_before = sum(line["event"] == "arguments" for line in notes()) if TOLD.exists() else 0
note("arguments", {"resume": ARGUMENTS.resume, "worker_id": ARGUMENTS.worker_id, "pid": os.getpid()})
threading.Thread(target=listen, daemon=True).start()
for step in scenario[min(num_before, len(scenario) - 1)]:
    verb, _, rest = step.partition(" ")
    ACTS[verb](rest)
