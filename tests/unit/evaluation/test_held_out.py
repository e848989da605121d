import math
import subprocess
import sys

import pytest
from pydantic import ValidationError

from specforge.evaluation.held_out import HeldOutConfig, is_better


def test_decoding_happens_at_steps_that_are_evaluated():
    assert HeldOutConfig(every=50, speculative_every=200, best="accepted_length").speculative_every == 200
    with pytest.raises(ValidationError, match=r"120, which is no multiple of every = 50; set it to 150, or to 0"):
        HeldOutConfig(every=50, speculative_every=120)


def test_the_best_checkpoint_is_chosen_by_a_number_that_is_measured():
    with pytest.raises(ValidationError, match="which only speculative decoding measures; set speculative_every"):
        HeldOutConfig(best="accepted_length")
    with pytest.raises(ValidationError, match="best"):
        HeldOutConfig(best="loss")


@pytest.mark.parametrize(
    ("metric", "higher_is_better"),
    [("avg_loss", False), ("avg_acc", True), ("simulated_acc_len", True), ("accepted_length", True)],
)
def test_better_is_lower_for_losses_and_higher_for_the_rest(metric, higher_is_better):
    assert is_better(metric, 2.0, 1.0) == higher_is_better
    assert is_better(metric, 1.0, 2.0) != higher_is_better
    assert not is_better(metric, 1.0, 1.0)
    assert is_better(metric, 1.0, None)
    assert not is_better(metric, math.nan, None)
    assert not is_better(metric, math.nan, 1.0)
    assert is_better(metric, 1.0, math.nan)


def test_the_options_load_no_tensor_library():
    code = "import sys, specforge.evaluation.held_out; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
