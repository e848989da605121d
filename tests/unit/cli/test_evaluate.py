"""``specforge eval``: options that contradict each other, and a report without an accepted length."""

import json

import pytest

from specforge.cli import main as cli

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
