"""All phases of the demo at a size for tests. Prints the report.

``python small_demo.py OUT TOPOLOGY [--resume] [ALGORITHM]``
"""

import json
import sys
from pathlib import Path

from specforge.demo.run import DemoOptions, DemoRecipe, run_demo

RECIPE = DemoRecipe(
    num_responses=48,
    prompt_tokens=24,
    response_tokens=24,
    generation_batch_size=8,
    global_batch_size=4,
    micro_batch_tokens=256,
    checkpoint_every=3,
    num_eval_prompts=6,
    num_untrained_eval_prompts=2,
    eval_new_tokens=24,
)

if __name__ == "__main__":
    out, topology = Path(sys.argv[1]), sys.argv[2]
    algorithm = next((argument for argument in sys.argv[3:] if argument != "--resume"), None)
    report = run_demo(DemoOptions(out, topology=topology, algorithm=algorithm, resume="--resume" in sys.argv), RECIPE)
    print(json.dumps(report))
