"""The supervisor over real processes: light children, the real pipes, signals and sockets."""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from specforge.config.launch import RestartOptions
from specforge.errors import ConfigError, RunFailed, UserError
from specforge.launch.child import ChildSpec
from specforge.launch.endpoint import Endpoint
from specforge.launch.host import ChildDied, ChildStarted, HostExecutor, log_deaths
from specforge.launch.runtime import stop_on_signals

COMMAND = (sys.executable, str(Path(__file__).with_name("acting_child.py")))
DEADLINE_S = 60.0
QUICK = RestartOptions(max_restarts=2, first_backoff_s=0.01, longest_backoff_s=0.01)
NEVER = RestartOptions(first_backoff_s=3600.0, longest_backoff_s=3600.0)

TRAINS_ON = ["hear start", "serving", "hear lost", "until capture-0 works", "finish"]
"""A trainer that ends when a capture process was lost and another one works."""
WORKS = ["hear endpoint", "note works", "wait"]


class Stage:
    """An executor over children that act a scenario, and what was observed."""

    def __init__(self, directory: Path, options: RestartOptions, scenario: dict[str, list[list[str]]]) -> None:
        self.directory = directory
        self.scenario = directory / "scenario.json"
        self.scenario.write_text(json.dumps(scenario))
        self.endpoint = Endpoint.open("127.0.0.1", 0)
        self.happened: list[ChildStarted | ChildDied] = []
        self.executor = HostExecutor(self.endpoint, options, COMMAND, self.observe)
        self.specs = [
            ChildSpec(
                name,
                "train" if name.startswith("train") else "capture",
                self.scenario,
                None if name == "train" else directory / f"{name}.log",
            )
            for name in scenario
        ]

    def observe(self, happened: ChildStarted | ChildDied) -> None:
        self.happened.append(happened)

    def run(self) -> dict[str, dict[str, Any]]:
        return self.executor.run(self.specs)

    def told(self, name: str, event: str) -> list[dict[str, Any]]:
        file = self.directory / f"{name}.told"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line["fields"] for line in lines if line["event"] == event]

    def starts(self) -> list[str]:
        return [happened.id for happened in self.happened if isinstance(happened, ChildStarted)]

    def deaths(self) -> list[ChildDied]:
        return [happened for happened in self.happened if isinstance(happened, ChildDied)]


@pytest.fixture
def stage(tmp_path) -> Iterator[Callable[..., Stage]]:
    stages: list[Stage] = []

    def build(options: RestartOptions = QUICK, **scenario: list[list[str]]) -> Stage:
        named = {name.replace("_", "-"): acts for name, acts in scenario.items()}
        stages.append(Stage(tmp_path, options, named))
        return stages[-1]

    yield build
    for made in stages:
        made.endpoint.close()
        pids = [happened.pid for happened in made.happened if isinstance(happened, ChildStarted)]
        assert not [pid for pid in pids if psutil.pid_exists(pid)], "a child outlived its supervisor"


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.005)
    raise AssertionError(f"never happened: {what}")


def test_a_killed_capture_process_is_started_again_and_the_trainer_is_told_who_was_lost(stage):
    run = stage(train=[TRAINS_ON], capture_0=[["kill"], WORKS])
    results = run.run()
    assert results["train"]["answer"] == 42
    assert run.starts() == ["train.1", "capture-0.1", "capture-0.2"]
    assert [given["worker_id"] for given in run.told("capture-0", "arguments")] == ["capture-0.1", "capture-0.2"]
    assert run.told("train", "lost") == [{"worker": "capture-0.1", "reason": "killed by SIGKILL"}]
    assert run.told("capture-0", "endpoint")[-1] == {"url": run.endpoint.url, "token": run.endpoint.token}


@pytest.mark.parametrize(
    ("act", "what"),
    [
        ("kill", "was killed by SIGKILL"),
        ("exit 3", "exited with code 3 without saying why"),
        ("exit 0", "exited with code 0 without saying why"),
        ("fail EngineError: it broke", "failed: EngineError: it broke"),
    ],
)
def test_every_restart_is_one_line_for_the_user(stage, caplog, act, what):
    run = stage(train=[TRAINS_ON], capture_0=[[act], WORKS])
    run.observe = log_deaths
    run.executor = HostExecutor(run.endpoint, QUICK, COMMAND, log_deaths)
    with caplog.at_level(logging.WARNING):
        run.run()
    assert [record.message for record in caplog.records] == [
        f"capture-0 {what}; starting it again in 0.01 s (restart 1)"
    ]


def test_a_capture_process_that_a_stranger_stopped_is_started_again_and_no_prompt_is_blamed(stage):
    run = stage(train=[TRAINS_ON], capture_0=[["leave"], WORKS])
    run.run()
    assert run.told("train", "lost") == [{"worker": "capture-0.1", "reason": None}]


def test_a_process_that_dies_too_often_in_a_row_fails_the_run_and_the_trainer_stops_in_order(stage):
    run = stage(train=[["serving", "wait"]], capture_0=[["kill"]])
    with pytest.raises(RunFailed, match=r"the capture-0 process failed: killed by SIGKILL \(3 deaths in a row; log: "):
        run.run()
    assert run.starts() == ["train.1", "capture-0.1", "capture-0.2", "capture-0.3"]
    assert run.told("train", "left")


def test_the_last_report_of_a_capture_process_that_keeps_failing_is_the_failure_of_the_run(stage):
    run = stage(train=[["serving", "wait"]], capture_0=[["kill"], ["kill"], ["fail EngineError: lost the device"]])
    with pytest.raises(RunFailed, match=r"EngineError: lost the device \(3 deaths in a row.*\)\nTraceback"):
        run.run()


def test_what_the_user_can_fix_ends_the_run_at_once(stage):
    run = stage(train=[["serving", "wait"]], capture_0=[["blame there is no such model"]])
    with pytest.raises(UserError, match=r"^there is no such model$"):
        run.run()
    assert not run.deaths()


def test_a_restarted_process_that_blames_the_user_is_tried_again(stage):
    run = stage(
        train=[["serving", "until capture-0 works", "finish"]],
        capture_0=[["kill"], ["blame shared memory is full"], WORKS],
    )
    assert run.run()["train"]["answer"] == 42
    assert [death.what for death in run.deaths()] == ["was killed by SIGKILL", "failed: shared memory is full"]


def test_a_trainer_that_says_why_it_failed_ends_the_run_with_its_traceback(stage):
    run = stage(train=[["serving", "fail ValueError: odd loss"]], capture_0=[["wait"]])
    with pytest.raises(RunFailed, match=r"the train process failed: ValueError: odd loss\nTraceback: in the child"):
        run.run()
    assert not run.deaths()


@pytest.mark.parametrize("act", ["kill", "fail FeatureNotFound: sample 's3'"])
def test_a_trainer_whose_features_are_lost_or_that_was_killed_goes_on_from_its_checkpoint(stage, act):
    run = stage(
        train=[
            ["hear start", "serving", "until capture-0 endpoint", "until capture-1 endpoint", act],
            ["hear start", "serving", "finish"],
        ],
        capture_0=[["wait"]],
        capture_1=[["wait"]],
    )
    assert run.run()["train"]["answer"] == 42
    assert [given["resume"] for given in run.told("train", "arguments")] == [False, True]
    first, second = run.told("train", "start")
    groups = [first.pop("group"), second.pop("group")]
    crashed = {"train-0": "killed by SIGKILL"} if act == "kill" else {}
    assert first == {"token": run.endpoint.token, "workers": [], "crashed": {}}
    assert second == {"token": run.endpoint.token, "workers": ["capture-0.1", "capture-1.1"], "crashed": crashed}
    assert [(group["rank"], group["size"]) for group in groups] == [(0, 1), (0, 1)]


@pytest.mark.parametrize("victim", ["train", "train-1"])
@pytest.mark.parametrize("act", ["kill", "exit 3", "fail FeatureNotFound: sample 's3'"])
def test_ranks_start_again_together_and_meet_elsewhere_when_one_is_gone(stage, victim, act):
    acts = {name: [["hear start", "wait"], ["hear start", "note again", "wait"]] for name in ("train", "train-1")}
    acts["train"][1] = ["hear start", "until train-1 again", "finish"]
    other = "train-1" if victim == "train" else "train"
    acts[victim][0] = ["hear start", f"until {other} start", act]
    run = stage(**{name.replace("-", "_"): value for name, value in acts.items()})
    assert run.run()["train"]["answer"] == 42
    assert run.starts() == ["train.1", "train-1.1", "train.2", "train-1.2"]
    assert [(death.name, death.num_peers) for death in run.deaths()] == [(victim, 1)]
    assert "starting all 2 train ranks again" in str(run.deaths()[0])
    for rank, name in enumerate(("train", "train-1")):
        assert [given["resume"] for given in run.told(name, "arguments")] == [False, True]
        first, second = (start["group"] for start in run.told(name, "start"))
        assert (first["rank"], first["size"]) == (second["rank"], second["size"]) == (rank, 2)
        assert first["init_method"] != second["init_method"]
    meetings = [[start["group"]["init_method"] for start in run.told(name, "start")] for name in ("train", "train-1")]
    assert meetings[0] == meetings[1]


def test_a_rank_that_lost_another_waits_for_the_cause(stage):
    run = stage(
        train=[["hear start", "note lost", "lose connection closed"]],
        train_1=[["hear start", "until train lost", "fail ValueError: odd loss"]],
    )
    with pytest.raises(
        RunFailed, match=r"the train-1 process failed: ValueError: odd loss .*\nTraceback: in the child"
    ):
        run.run()
    assert not run.deaths()


def test_ranks_that_all_lost_each_other_start_again(stage, monkeypatch):
    monkeypatch.setattr("specforge.launch.host.VERDICT_S", 0.2)
    run = stage(
        train=[["hear start", "lose connection closed"], ["finish"]],
        train_1=[["hear start", "lose connection reset"], ["wait"]],
    )
    assert run.run()["train"]["answer"] == 42
    assert [death.num_peers for death in run.deaths()] == [1]


def test_one_limit_counts_the_deaths_of_all_ranks(stage):
    run = stage(
        train=[["note first", "wait"], ["until train-1 second", "kill"], ["note third", "wait"]],
        train_1=[["until train first", "kill"], ["note second", "wait"], ["until train third", "kill"]],
    )
    with pytest.raises(RunFailed, match=r"the train-1 process failed: killed by SIGKILL \(3 deaths in a row; log: "):
        run.run()
    assert [death.name for death in run.deaths()] == ["train-1", "train"]


@pytest.mark.parametrize(
    ("act", "crashed"),
    [
        ("kill", {"train-1": "killed by SIGKILL"}),
        ("exit 3", {"train-1": "exited with code 3 without saying why"}),
        ("fail FeatureNotFound: sample 's3'", {}),
    ],
)
def test_the_next_leader_is_told_which_rank_died_without_a_word(stage, act, crashed):
    run = stage(
        train=[["hear start", "serving", "note lost", "lose connection closed"], ["hear start", "finish"]],
        train_1=[["hear start", "until train lost", act], ["wait"]],
    )
    assert run.run()["train"]["answer"] == 42
    assert [start["crashed"] for start in run.told("train", "start")] == [{}, crashed]


def test_leases_of_a_dead_rank_are_charged_once_and_by_a_leader_that_lived_to_do_so(stage):
    run = stage(
        RestartOptions(max_restarts=3, first_backoff_s=0.01, longest_backoff_s=0.01),
        train=[
            ["hear start", "serving", "note first", "wait"],
            ["hear start", "kill"],
            ["hear start", "serving", "note third", "fail FeatureNotFound: sample 's3'"],
            ["hear start", "finish"],
        ],
        train_1=[["until train first", "kill"], ["wait"]],
    )
    assert run.run()["train"]["answer"] == 42
    charged = {"train-1": "killed by SIGKILL"}
    assert [start["crashed"] for start in run.told("train", "start")] == [{}, charged, charged, {}]


def test_leases_of_an_earlier_run_are_nobodys_crime(stage):
    run = stage(
        train=[["hear start", "wait"], ["hear start", "finish"]], train_1=[["until train start", "kill"], ["wait"]]
    )
    run.run()
    assert [start["crashed"] for start in run.told("train", "start")] == [{}, {}]


@pytest.mark.parametrize(("advances", "num_deaths"), [(True, [1, 1, 1]), (False, [1, 2])])
def test_ranks_that_live_long_but_never_reach_a_newer_checkpoint_are_given_up(stage, advances, num_deaths):
    options = RestartOptions(max_restarts=2, first_backoff_s=0.01, longest_backoff_s=0.01, healthy_after_s=1e-9)
    run = stage(options, train=[["kill"], ["kill"], ["kill"], ["finish"]], train_1=[["wait"]])
    run.executor = HostExecutor(
        run.endpoint, options, COMMAND, run.observe, lambda: len(run.happened) if advances else 0
    )
    if advances:
        run.run()
    else:
        with pytest.raises(RunFailed, match=r"killed by SIGKILL \(3 deaths in a row"):
            run.run()
    assert [death.num_deaths for death in run.deaths()] == num_deaths


def test_ranks_meet_where_the_name_of_the_directory_is_odd(stage, tmp_path, monkeypatch):
    odd = tmp_path / "a b#c%20d"
    odd.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(odd))
    run = stage(train=[["hear start", "finish"]], train_1=[["hear start", "wait"]])
    run.run()
    (start,) = run.told("train", "start")
    assert start["group"]["init_method"].startswith(f"file://{odd}/specforge-")


def test_what_a_rank_heard_of_its_leader_is_reported_by_the_leader(stage):
    run = stage(
        train=[["hear start", "until train-1 failing", "fail ProducerFailed: no samples"]],
        train_1=[["hear start", "note failing", "fail ProducerFailed: no samples"]],
    )
    with pytest.raises(RunFailed, match="the train process failed: ProducerFailed: no samples"):
        run.run()


def test_ranks_stop_in_order_when_a_capture_process_dies_too_often(stage):
    run = stage(train=[["serving", "wait"]], train_1=[["wait"]], capture_0=[["until train-1 arguments", "kill"]])
    with pytest.raises(RunFailed, match="the capture-0 process failed"):
        run.run()
    assert run.told("train", "left")
    assert run.told("train-1", "left")


def test_a_rank_that_finished_before_its_leader_is_not_missed(stage):
    run = stage(train=[["hear start", "until train-1 done", "finish"]], train_1=[["hear start", "note done", "finish"]])
    assert run.run()["train"]["answer"] == 42
    assert not run.deaths()


def test_workers_are_told_again_when_a_restarted_trainer_serves(stage):
    run = stage(
        train=[["serving", "until capture-0 endpoint", "kill"], ["serving", "wait"]],
        capture_0=[["wait"]],
    )
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run.run)
        wait_until(lambda: len(run.told("capture-0", "endpoint")) == 2, "the second endpoint")
        run.executor.request_stop()
        assert isinstance(future.exception(DEADLINE_S), KeyboardInterrupt)


def test_workers_of_an_earlier_run_are_not_taken_for_those_of_a_trainer_that_never_served(stage):
    run = stage(
        train=[["hear start", "until capture-0 arguments", "kill"], ["hear start", "finish"]], capture_0=[["wait"]]
    )
    run.run()
    assert [start["workers"] for start in run.told("train", "start")] == [[], []]


def test_a_service_that_is_given_up_fails_the_run_with_its_reason(stage):
    run = stage(NEVER, train=[["serving", "wait"]], capture_0=[["wait"]])
    run.executor.fail("the store is gone for good")
    run.executor.fail("a consequence")
    with pytest.raises(RunFailed, match="the store is gone for good"):
        run.run()


def test_a_signal_during_the_wait_before_a_restart_ends_the_run_in_order(stage):
    run = stage(NEVER, train=[["serving", "wait"]], capture_0=[["kill"]])
    observe = run.observe

    def signal_at_death(happened: ChildStarted | ChildDied) -> None:
        observe(happened)
        if isinstance(happened, ChildDied):
            os.kill(os.getpid(), signal.SIGTERM)

    run.executor = HostExecutor(run.endpoint, NEVER, COMMAND, signal_at_death)
    with pytest.raises(KeyboardInterrupt), stop_on_signals(run.executor.request_stop):
        run.run()
    assert run.starts() == ["train.1", "capture-0.1"]


def test_a_signal_while_the_trainer_waits_for_its_restart_ends_the_capture_processes(stage):
    run = stage(NEVER, train=[["serving", "until capture-0 endpoint", "kill"]], capture_0=[["wait"]])
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run.run)
        wait_until(run.deaths, "the trainer's death")
        run.executor.request_stop()
        assert isinstance(future.exception(DEADLINE_S), KeyboardInterrupt)


def test_a_child_that_does_not_react_is_killed(stage, monkeypatch):
    monkeypatch.setattr("specforge.launch.host.STOP_S", 0.2)
    monkeypatch.setattr("specforge.launch.host.CAPTURE_STOP_S", 0.1)
    run = stage(train=[["serving", "wait"]], capture_0=[["wait"]])
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run.run)
        wait_until(lambda: run.told("capture-0", "endpoint"), "both run")
        for happened in list(run.happened):
            assert isinstance(happened, ChildStarted)
            os.kill(happened.pid, signal.SIGSTOP)
        run.executor.request_stop()
        assert isinstance(future.exception(DEADLINE_S), KeyboardInterrupt)


def test_a_request_finds_the_successor_of_a_killed_trainer_at_the_same_address(stage):
    run = stage(train=[["serving", "serve"]], capture_0=[["wait"]])
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=run.endpoint.url, trust_env=False) as client:
        future = pool.submit(run.run)
        first = int(client.get("/", timeout=DEADLINE_S).text)
        os.kill(first, signal.SIGKILL)
        wait_until(run.deaths, "the trainer's death")
        # One attempt: the connection waits at the supervisor's socket until somebody serves.
        second = int(httpx.get(run.endpoint.url, timeout=DEADLINE_S, trust_env=False).text)
        assert second != first
        run.executor.request_stop()
        assert isinstance(future.exception(DEADLINE_S), KeyboardInterrupt)


def test_an_address_that_cannot_be_listened_on_is_refused():
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1 port 0 .*choose another address"):
        Endpoint.open("192.0.2.1", 0)


def test_a_death_that_nobody_waits_for_does_not_start_a_child_of_a_run_that_has_ended(stage):
    # The trainer is done while the capture process waits for its restart.
    run = stage(NEVER, train=[["serving", "hear lost", "finish"]], capture_0=[["kill"]])
    assert run.run()["train"]["answer"] == 42
    assert run.starts() == ["train.1", "capture-0.1"]


PARENT_LINK = """
import contextlib, sys
from specforge.launch.parent import ParentLink

link = ParentLink(int(sys.argv[1]))
assert link.wait_for("start") == {"n": 1}
assert not link.run_is_over()
print("ready", flush=True)
with contextlib.suppress(StopIteration):
    link.wait_for("endpoint")
    link.when_lost(lambda worker, reason: print(worker, reason, flush=True))
link.wait_for("start")
"""


def test_losses_are_kept_for_a_controller_that_does_not_exist_yet_and_the_end_of_the_pipe_is_a_sigterm(tmp_path):
    import subprocess

    script = tmp_path / "child.py"
    script.write_text(PARENT_LINK)
    read_end, write_end = os.pipe()
    child = subprocess.Popen(
        [sys.executable, str(script), str(write_end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[write_end],
    )
    assert child.stdin is not None
    assert child.stdout is not None

    def tell(event: str, **fields: Any) -> None:
        child.stdin.write(json.dumps({"event": event, "fields": fields}).encode() + b"\n")
        child.stdin.flush()

    with contextlib.closing(os.fdopen(read_end)), child.stdout:
        os.close(write_end)
        tell("start", n=1)
        assert child.stdout.readline() == b"ready\n"
        tell("lost", worker="w.1", reason="killed by SIGKILL")
        tell("endpoint")
        assert child.stdout.readline() == b"w.1 killed by SIGKILL\n"
        tell("lost", worker="w.2", reason=None)
        assert child.stdout.readline() == b"w.2 None\n"
        child.stdin.close()
        assert child.wait(DEADLINE_S) == -signal.SIGTERM
