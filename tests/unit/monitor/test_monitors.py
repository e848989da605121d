import io
import json

import pytest
from rich.console import Console

from specforge.monitor.console import ConsoleMonitor, progress
from specforge.monitor.fanout import FanoutMonitor
from specforge.monitor.jsonl import JsonlMonitor, read_records, read_scalars


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_log_has_one_flushed_line_a_record(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    monitor = JsonlMonitor(path, clock=lambda: 1.5)
    monitor.log(1, {"loss": 2.0})
    assert json.loads(path.read_text()) == {"time_s": 1.5, "step": 1, "loss": 2.0}
    monitor.event("checkpoint", step_done=1)
    assert list(read_records(path))[1] == {"time_s": 1.5, "event": "checkpoint", "step_done": 1}
    monitor.close()
    monitor.close()


def test_log_is_for_its_owner_alone(tmp_path):
    JsonlMonitor(tmp_path / "m.jsonl").close()
    assert (tmp_path / "m.jsonl").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("torn", [b'{"time_s":1.0,"st', b"x" * 10_000])
def test_torn_last_line_is_cut_before_a_resumed_run_appends(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    first = JsonlMonitor(path)
    first.log(1, {"loss": 2.0})
    first.close()
    with path.open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in read_records(path)] == [1]
    resumed = JsonlMonitor(path)
    resumed.log(2, {"loss": 1.0})
    resumed.close()
    assert [record["step"] for record in read_records(path)] == [1, 2]


def test_file_that_is_one_torn_line_starts_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"time')
    JsonlMonitor(path).close()
    assert path.read_bytes() == b""


def test_repeated_step_of_a_resumed_run_counts_once(tmp_path):
    monitor = JsonlMonitor(tmp_path / "m.jsonl")
    for step, loss in [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5)]:
        monitor.log(step, {"loss": loss})
    monitor.event("end")
    monitor.close()
    assert [(r["step"], r["loss"]) for r in read_scalars(tmp_path / "m.jsonl")] == [(1, 3.0), (2, 2.5), (3, 1.0)]


def test_scalar_that_is_not_finite_is_null(tmp_path):
    monitor = JsonlMonitor(tmp_path / "m.jsonl")
    monitor.log(1, {"loss": float("nan"), "lr": float("inf")})
    monitor.close()
    assert read_scalars(tmp_path / "m.jsonl")[0]["loss"] is None


def test_missing_log_has_no_records(tmp_path):
    assert read_scalars(tmp_path / "none.jsonl") == []


def test_without_a_terminal_a_line_appears_every_few_seconds():
    output, clock = io.StringIO(), Clock()
    with progress("responses", 100, "prompts", done=10, console=Console(file=output), clock=clock) as bar:
        for second in range(1, 11):
            clock.now += 1.0
            bar.update_to(10 + 2 * second, "loss 1")
    lines = output.getvalue().splitlines()
    assert lines == [
        "responses: 20/100 prompts  2/s, 40 s left  loss 1",
        "responses: 30/100 prompts  2/s, 35 s left  loss 1",
        "responses: 30/100 prompts  in 10 s  loss 1",
    ]


def test_on_a_terminal_there_is_a_bar_with_the_count_and_the_latest_scalars():
    output = io.StringIO()
    monitor = ConsoleMonitor(4, console=Console(file=output, force_terminal=True, width=120))
    for step in range(1, 5):
        monitor.log(step, {"loss": 1.0 / step})
    monitor.event("checkpoint")
    monitor.close()
    monitor.close()
    text = output.getvalue()
    assert "training" in text
    assert "4/4" in text
    assert "loss 0.25" in text


def test_resumed_training_starts_its_bar_where_it_was():
    output = io.StringIO()
    monitor = ConsoleMonitor(10, first_step=6, console=Console(file=output))
    monitor.close()
    assert output.getvalue().startswith("training: 6/10 steps")


def test_bar_that_was_interrupted_raises_what_interrupted_it():
    with pytest.raises(KeyboardInterrupt), progress("x", 2, console=Console(file=io.StringIO())):
        raise KeyboardInterrupt


def test_fanout_reaches_every_monitor_and_closes_all_even_if_one_fails(tmp_path):
    class Broken(JsonlMonitor):
        def close(self):
            super().close()
            raise OSError("disk")

    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    monitors = [Broken(paths[0]), JsonlMonitor(paths[1])]
    fanout = FanoutMonitor(monitors)
    fanout.log(1, {"loss": 1.0})
    fanout.event("end")
    with pytest.raises(ExceptionGroup, match="could not be closed"):
        fanout.close()
    assert all(len(list(read_records(path))) == 2 for path in paths)
    with pytest.raises(ValueError, match="closed file"):
        monitors[1].log(2, {})
