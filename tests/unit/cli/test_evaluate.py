"""``specforge eval``: options that contradict each other, and a report without an accepted length."""

import json
from pathlib import Path

import pytest

from specforge.cli import main as cli
from specforge.cli.evaluate import batch_sizes
from specforge.config.load import run_config_from
from specforge.errors import UserError
from specforge.launch.local import train

SAMPLES = Path(__file__).parents[3] / "examples/evaluation"

NOTHING = {"accepted_length_mean": None, "acceptance_per_position": [], "num_rounds": 0, "lossless": True}


@pytest.fixture
def evaluate(capsys, monkeypatch, tmp_path):
    """Runs the verb with a report that is given: (exit code, standard output, standard error)."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.touch()
    report = dict(NOTHING)
    monkeypatch.setattr("specforge.launch.evaluate.evaluate_draft", lambda target, draft, options: report)

    def result(*arguments, **figures):
        report.update(figures)
        with pytest.raises(SystemExit) as left:
            cli.main(["eval", "--target", "t", "--draft", "d", "--prompts", str(prompts), *arguments])
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return result


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--top-k", "5"], "--top-k would do nothing, because decoding is greedy without a --temperature above 0"),
        (["--temperature", "0", "--top-p", "0.9", "--seed", "0"], "--top-p and --seed would do nothing"),
        (["--tree", "8,5,63", "--num-proposals", "3"], "--tree 8,5,63 says how many tokens are proposed"),
    ],
)
def test_options_that_would_do_nothing_are_refused(evaluate, arguments, sentence):
    code, out, err = evaluate(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {sentence}")


def test_options_of_sampling_are_taken_with_a_temperature(evaluate):
    code, _, err = evaluate("--temperature", "0.7", "--top-k", "5", "--seed", "3", num_rounds=1)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["--max-new-tokens", "6"], "raise --max-new-tokens from 6 to at least 7, or lower --num-proposals"),
        (["--max-new-tokens", "4", "--tree", "2,2,5"], "from 4 to at least 5, or lower the depth of --tree"),
        ([], "every answer ended with its first token"),
    ],
)
def test_an_evaluation_without_a_round_has_no_accepted_length_and_says_so(evaluate, arguments, advice):
    code, out, err = evaluate(*arguments)
    assert code == 0
    assert "accepted length (tokens a round)  -" in out
    assert err.startswith("warning: ")
    assert advice in err
    assert json.loads(evaluate(*arguments, "--json")[1])["accepted_length_mean"] is None


@pytest.mark.parametrize("text", ["", "0", "1,,4", "a", "1.5", "-1"])
def test_batch_sizes_that_are_none_are_refused(text):
    assert batch_sizes("1, 4,16") == [1, 4, 16]
    with pytest.raises(UserError, match="--batch-size takes whole numbers from 1 up"):
        batch_sizes(text)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", "2,2"], "batch_sizes should differ, got 2, 2"),
        (["--as-text", "--chat-template", __file__], "as_text is for questions without a chat template"),
        (["--html", "."], "--html . is a directory"),
        (["--html", f"{__file__}/page.html"], "page.html cannot be written (File exists); give another file"),
    ],
)
def test_options_that_cannot_be_are_refused(evaluate, arguments, sentence):
    code, out, err = evaluate(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err


def test_report_is_printed_where_the_page_cannot_be_written(evaluate, monkeypatch, tmp_path):
    def full(path, report, title):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("specforge.monitor.evaluation.write_evaluation", full)
    code, out, err = evaluate("--html", str(tmp_path / "page.html"), "--json", num_rounds=1)
    assert (code, json.loads(out)["num_rounds"]) == (2, 1)
    assert "could not be written (No space left on device); the report is on standard output" in err


def test_draft_is_measured_on_question_files(tmp_path, tiny_target_dir, capsys):
    """The verb as it is used: several files, two batch sizes, the page; then the same as JSON."""
    lines = [json.dumps({"text": f"{i} plus 3 is {i + 3}. " * 6}) for i in range(8)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "run_dir": "run",
        "target": {"path": str(tiny_target_dir), "device": "cpu"},
        "data": {"path": "texts.jsonl"},
        "algorithm": {"name": "eagle3", "ttt_steps": 2},
        "training": {"global_batch_size": 4, "num_epochs": 1, "device": "cpu"},
    }
    train(run_config_from(config, tmp_path))
    arguments = ["eval", "--target", str(tiny_target_dir), "--draft", str(tmp_path / "run"), "--device", "cpu"]
    arguments += ["--prompts", str(SAMPLES / "mt_bench.jsonl"), "--prompts", str(SAMPLES / "gsm8k.jsonl")]
    arguments += ["--num-prompts", "3", "--max-new-tokens", "12", "--num-proposals", "3", "--batch-size", "1,3"]
    page = tmp_path / "eval.html"
    assert left(*arguments, "--html", str(page)) == 0
    shown = capsys.readouterr().out
    assert "Batch size 1 " in shown
    assert "Batch size 3 " in shown
    assert "gsm8k" in shown
    assert "total" in shown
    assert "Batch size 3" in page.read_text()
    assert "(-)" in shown  # the speed-up of a category at batch size 3
    assert left(*arguments[:-1], "7", "--json") == 2
    assert "a batch size of 7 was asked for, but there are 6 prompts" in capsys.readouterr().err
    assert left(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lossless"] is True
    assert found["batch_invariant"] is True
    assert list(found["by_batch_size"]) == ["1", "3"]
    assert set(found["by_category"]) == {"writing", "roleplay", "reasoning", "gsm8k"}
    assert found["num_prompts"] == len(found["prompts"]) == 6
    assert [found["settings"][name] for name in ("draft_step", "threads")] == [2, 1]
    assert len(found["settings"]["target_revision"]) == 64
    report = tmp_path / "report.json"
    report.write_text(json.dumps(found))
    exporting = ["export", "--checkpoint", str(tmp_path / "run"), "--accepted-length-from", str(report)]
    assert left(*exporting, "--out", str(tmp_path / "out")) == 0
    assert f"{len(found['prompts'])} prompts of mt_bench.jsonl, gsm8k.jsonl" in (tmp_path / "out/README.md").read_text()
    assert {"accepted_length_ci95", "speed_up_ci95", "acceptance_per_position", "num_near_ties"} <= set(found)


def left(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    return int(exit_.value.code or 0)
