"""What ``specforge quarantine`` and ``specforge status`` see of a run, and what they may change."""

import json

import pytest
import runs

from specforge.cli.main import main
from specforge.config.load import dump_run_config, load_run_config
from specforge.control_plane.metadata.base import Attempt, Position
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.errors import ConfigError
from specforge.launch.inputs import RESOLVED_FILE
from specforge.launch.ledger import list_quarantined, retry_quarantined
from specforge.launch.lock import LOCK_FILE, run_lock
from specforge.launch.status import run_status
from specforge.testing.metadata_store import make_task


@pytest.fixture
def run_dir(tmp_path):
    """A stopped run in which two of four prompts are set aside."""
    config = load_run_config(runs.write_run(tmp_path, tmp_path / "target", topology="disaggregated"))
    config.run_dir.mkdir()
    dump_run_config(config, config.run_dir / RESOLVED_FILE)
    (config.run_dir / LOCK_FILE).touch()
    store = SqlMetadataStore(config.run_dir / "ledger.sqlite")
    store.register([make_task(i) for i in range(4)])
    for index, slot in ((1, 3), (2, 5)):
        (generation,) = store.lease([index], "w0")
        store.fail(Attempt(index, generation), "RuntimeError: out of memory")
        store.quarantine(index, slot, f"failed 1 time, last in worker w0: RuntimeError: no room for {index}")
    store.close()
    return config.run_dir


@pytest.fixture
def shown(capsys):
    """Runs ``specforge quarantine``; what it printed."""

    def result(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["quarantine", *map(str, arguments)])
        assert not left.value.code
        return capsys.readouterr().out

    return result


def test_prompts_that_were_set_aside_are_listed_with_why(run_dir, shown):
    first, second = list_quarantined(run_dir)
    assert (first["sample_id"], first["from_slot"], first["num_failures"]) == ("s1", 3, 1)
    assert second["reason"].endswith("no room for 2")
    assert run_status(run_dir)["ledger"]["num_quarantined"] == 2
    table = shown(run_dir)
    assert "s1 (skipped from slot 3 on)" in table
    assert "no room for 2" in table
    assert [item["sample_id"] for item in json.loads(shown(run_dir, "--json"))["quarantined"]] == ["s1", "s2"]


def test_a_retried_prompt_is_set_aside_no_longer(run_dir, shown):
    assert "1 prompt will be trained again" in shown(run_dir, "--retry", "s2")
    assert [item["sample_id"] for item in list_quarantined(run_dir)] == ["s1"]
    assert retry_quarantined(run_dir, None) == ["s1"]
    assert "no prompt is set aside" in shown(run_dir)
    store = SqlMetadataStore(run_dir / "ledger.sqlite")
    store.rewind(Position(0, 0), lambda slot: slot, [])
    assert store.sample(1).num_failures == 0
    assert len(store.lease([1, 2], "w0")) == 2
    store.close()


def test_what_is_not_set_aside_or_still_runs_is_refused(run_dir):
    with pytest.raises(ConfigError, match="'s3' is not set aside"):
        retry_quarantined(run_dir, ["s1", "s3"])
    assert len(list_quarantined(run_dir)) == 2
    with run_lock(run_dir), pytest.raises(ConfigError, match="in use by another process"):
        retry_quarantined(run_dir, None)


def test_a_run_without_a_ledger_retries_nothing(tmp_path):
    config = load_run_config(runs.write_run(tmp_path, tmp_path / "target"))
    config.run_dir.mkdir()
    dump_run_config(config, config.run_dir / RESOLVED_FILE)
    (config.run_dir / LOCK_FILE).touch()
    assert list_quarantined(config.run_dir) == []
    with pytest.raises(ConfigError, match="keeps no ledger"):
        retry_quarantined(config.run_dir, None)
