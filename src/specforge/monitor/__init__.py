"""Where a run tells what it is doing: ``base`` (the protocol), ``jsonl``, ``console`` and ``fanout``."""
