"""Fifty random kills, and what must be true afterwards: ``make chaos [ARGS="--kills N --seed N"]``."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import runs

import chaos
from specforge.testing.tiny_target import tiny_target

NUM_EPOCHS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        options = {"training__num_epochs": NUM_EPOCHS, "training__checkpoint_every": 5}
        undisturbed_yaml = runs.write_run(directory / "undisturbed", tiny_target(), **options)
        alone = runs.specforge(directory, "train", "-c", str(undisturbed_yaml), "--json")
        alone.process.wait(chaos.DEADLINE_S)
        undisturbed = alone.succeed()
        run_yaml = chaos.write_run(directory / "chaos", tiny_target(), num_epochs=NUM_EPOCHS)
        disturbed = chaos.Chaos(run_yaml, arguments.seed)
        started = time.monotonic()
        result = disturbed.run(arguments.kills, NUM_EPOCHS * chaos.NUM_SAMPLES // chaos.BATCH)
        seconds = time.monotonic() - started
        assert result["draft_weights_sha256"] == undisturbed["draft_weights_sha256"], result
        chaos.check_account(run_yaml, NUM_EPOCHS)
        chaos.check_nothing_left(run_yaml)
    report = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "seed": arguments.seed,
        "kills": dict(disturbed.kills),
        "num_kills": disturbed.kills.total(),
        "steps_seen_at_kills": disturbed.steps_at_kills,
        "optimizer_steps": result["step"],
        "slots_trained": result["ledger"]["num_slots_trained"],
        "seconds": round(seconds),
        "draft_weights_sha256": result["draft_weights_sha256"],
        "same_weights_as_undisturbed": True,
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
