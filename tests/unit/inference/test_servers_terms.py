import logging
from dataclasses import replace

import pytest

from specforge.errors import ServerRefused
from specforge.inference.servers.terms import Terms
from specforge.testing.fake_server import FakeServer
from specforge.testing.samples import SMALL_TARGET

INFO = FakeServer(SMALL_TARGET).info
HALF = replace(INFO, dtype="bfloat16")


def test_the_first_server_that_is_accepted_gives_the_number_format():
    terms = Terms()
    terms.check("http://a:1", HALF)
    terms.accept("http://b:1", INFO)
    terms.accept("http://c:1", INFO)
    for refuse in (terms.check, terms.accept):
        with pytest.raises(ServerRefused, match=r"http://a:1 .* computes in bfloat16, the first server .* float32"):
            refuse("http://a:1", HALF)


def test_the_number_format_of_the_run_counts():
    terms = Terms("bfloat16")
    with pytest.raises(ServerRefused, match=r"http://a:1 .*float32, target\.dtype of the run is bfloat16"):
        terms.check("http://a:1", INFO)
    terms.accept("http://b:1", HALF)


@pytest.mark.parametrize(("strict", "num_warnings"), [(True, 1), (False, 0)])
def test_a_strict_run_warns_once_of_servers_whose_features_depend_on_neighbours(strict, num_warnings, caplog):
    terms = Terms(strict=strict)
    with caplog.at_level(logging.WARNING):
        for url, info in (("http://a:1", INFO), ("http://b:1", replace(INFO, strict=False))):
            terms.accept(url, info)
            terms.accept(url, info)
    assert len(caplog.records) == num_warnings
    assert "http://a:1" not in caplog.text


def test_a_server_for_shorter_samples_is_refused_before_they_fail_one_by_one():
    terms = Terms(num_tokens=2048)
    with pytest.raises(ServerRefused, match=r"http://a:1 .* takes samples of 2040 tokens.*data\.max_length=2040"):
        terms.check("http://a:1", replace(INFO, max_tokens=2040))
    terms.check("http://b:1", replace(INFO, max_tokens=2048))
