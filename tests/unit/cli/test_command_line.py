"""What the command line promises: exit codes, one sentence, help without a tensor library, JSON."""

import errno
import json
import subprocess
import sys

import pytest

from specforge.cli import main as cli
from specforge.errors import ConfigError, EngineError

VERBS = (
    "demo", "train", "plan", "eval", "export", "status", "quarantine", "doctor", "serve-target", "regenerate",
)  # fmt: skip


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def result(*arguments):
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return result


def test_help_and_configuration_need_no_tensor_library():
    script = f"""
import sys
from specforge.cli.main import main
import specforge.config.load, specforge.config.reference, specforge.monitor.console
for verb in {VERBS!r}:
    try:
        main([verb, "--help"])
    except SystemExit as left:
        assert left.code == 0, (verb, left.code)
heavy = sorted({{"torch", "transformers", "numpy", "sqlalchemy", "fastapi"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert f"Example: specforge {verb}" in out
    assert "--json" in out


def test_overview_lists_every_verb(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)


def test_version_is_printed(run):
    assert run("--version")[:2] == (0, "specforge 0.1.0\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "-c", "none.yaml"),
        ("plan", "-c", "none.yaml"),
        ("status", "nowhere"),
        ("quarantine", "nowhere"),
        ("quarantine", "nowhere", "--retry", "a", "--retry-all"),
        ("eval", "--target", "t", "--draft", "d", "--prompts", "none.jsonl"),
        ("eval", "--target", "t"),
        ("export", "--checkpoint", "c", "--out", "o", "--to", "paper"),
        ("demo", "--topology", "sideways"),
        ("demo", "--algorithm", "eagle9"),
        ("demo", "--seed", "-1"),
        ("fly",),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "rror: " in err
    assert "Traceback" not in err


def test_folder_of_a_run_file_is_not_taken_for_a_run(run, tmp_path):
    (tmp_path / "run.yaml").write_text("run_dir: r\n")
    code, _, err = run("status", str(tmp_path))
    assert code == 2
    assert "give the directory that run_dir names" in err


def test_misspelt_override_names_the_key_that_was_meant(run, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("run_dir: r\ntarget: {path: t}\ndata: {path: d}\n")
    code, _, err = run("train", "-c", str(file), "training.learning_rate=1")
    assert code == 2
    assert err == f"error: {file}: training.learning_rate is unknown; did you mean training.lr?\n"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ConfigError("this cannot be run"), 2, "error: this cannot be run\n"),
        (EngineError("the target failed"), 1, "error: the target failed\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/run"), 2, "error: /run: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted; continue with: specforge train -c 'a b.yaml' --resume\n"),
        (SystemExit(130), 130, "interrupted; continue with: specforge train -c 'a b.yaml' --resume\n"),
    ],
)
def test_each_kind_of_error_has_its_exit_code(run, monkeypatch, error, code, sentence):
    def failing(arguments, prog_name):
        raise error

    monkeypatch.setattr(cli, "app", failing)
    assert run("train", "-c", "a b.yaml") == (code, "", sentence)


def test_interrupt_inside_a_verb_says_how_to_continue(run, monkeypatch, tmp_path):
    def interrupted(path, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr("specforge.cli.train.load_run_config", interrupted)
    assert run("train", "-c", "run.yaml", "--resume") == (
        130,
        "",
        "interrupted; continue with: specforge train -c run.yaml --resume\n",
    )


def test_unexpected_error_keeps_its_traceback(monkeypatch):
    def failing(arguments, prog_name):
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "app", failing)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["doctor"])


def test_doctor_reports_packages_and_extras_as_json(run):
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["machine"]["python_is_supported"] is True
    assert found["torch"]["usable"] is True
    assert found["packages"]["pydantic"]
    for extra, state in found["extras"].items():
        assert state["install"] == (f"pip install 'specforge[{extra}]'" if state["missing"] else None)


def test_doctor_prints_a_table(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "Machine" in out
    assert "transformers" in out
