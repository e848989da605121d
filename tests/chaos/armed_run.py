"""``specforge train`` with children that kill themselves: ``armed_run.py DIRECTORY RUN_YAML``; prints the outcome."""

import json
import signal
import sys
from pathlib import Path

from specforge.config.load import load_run_config
from specforge.launch.compose import build_disagg_online_runtime
from specforge.launch.lock import run_lock

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = load_run_config(Path(sys.argv[2]), [])
    command = [sys.executable, str(Path(__file__).with_name("armed_role.py")), sys.argv[1]]
    with run_lock(config.run_dir) as lock:
        outcome = build_disagg_online_runtime(config, keep_open=(lock,), command=command).run()
    print(json.dumps(outcome.to_dict()))
