"""When capture pauses, and that it never does so for good."""

import pytest
from controlled_run import Run

from specforge.control_plane.backpressure import BackPressure, Credits
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.errors import ConfigError


def test_capture_pauses_at_the_high_and_goes_on_at_the_low_watermark():
    pressure = BackPressure(Credits(window_slots=10, step_slots=2, max_resident_bytes=100, low_watermark=0.5))
    assert pressure.grants(False, 4, 80, 10)
    assert not pressure.grants(False, 4, 95, 10)
    assert not pressure.grants(False, 4, 80, 10), "paused, and not below the low watermark"
    assert pressure.grants(True, 4, 80, 10), "the next step is always granted"
    assert pressure.grants(False, 4, 40, 10)
    assert not pressure.grants(False, 10, 0, 10)
    assert not pressure.grants(False, 5, 0, 10)
    assert pressure.grants(False, 4, 0, 10)


def test_a_full_window_pauses_capture_until_it_has_emptied():
    run = Run(InMemoryMetadataStore(), num_samples=12, window_slots=8, low_watermark=0.5)
    run.commit(run.lease())
    assert run.lease() == []
    refs = run.poll()
    run.train(refs[:2], 1)
    assert run.lease() == []
    run.train(refs[2:4], 2)
    assert run.lease() == [], "half of the window is not below the low watermark"
    run.train(refs[4:6], 3)
    assert len(run.lease()) == 4


@pytest.mark.parametrize("low", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("max_bytes", [1, 200, 10**6])
def test_no_watermark_can_stop_a_run(low, max_bytes):
    run = Run(InMemoryMetadataStore(), epochs=2, bytes_per_token=10, max_resident_bytes=max_bytes, low_watermark=low)
    assert run.run_to_end() == list(range(12))


def test_watermarks_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="low_watermark"):
        Credits(4, 2, None, 0.0)
    with pytest.raises(ConfigError, match="raise it to 8 or more"):
        Credits(4, 8, None)
