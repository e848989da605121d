"""Every oracle that a trainer of drafts must pass has a test that says so: docs/algorithms/oracles.md lists them."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]
PAGE = TESTS.parent / "docs" / "algorithms" / "oracles.md"
NUM_ORACLES = 51


def marked_oracles() -> dict[int, list[str]]:
    """Tests by the numbers in their docstrings (``Oracle 3.``, ``Oracles 20, 21.``)."""
    found: dict[int, list[str]] = {}
    pattern = re.compile(r'def (test_\w+)\([^)]*\)[^:]*:\n\s+"""Oracles? ([\d, and]+)\.', re.DOTALL)
    for file in sorted(TESTS.rglob("test_*.py")):
        for name, numbers in pattern.findall(file.read_text(encoding="utf-8")):
            for number in re.findall(r"\d+", numbers):
                found.setdefault(int(number), []).append(name)
    return found


def test_every_oracle_has_a_test():
    missing = sorted(set(range(1, NUM_ORACLES + 1)) - set(marked_oracles()))
    assert not missing, f"no test is marked with the oracles {missing}"


def test_the_page_of_oracles_names_a_test_for_each():
    page = PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \|.*\| `(test_\w+)`", page, re.MULTILINE))
    marked = marked_oracles()
    assert sorted(map(int, rows)) == list(range(1, NUM_ORACLES + 1))
    wrong = {number: name for number, name in rows.items() if name not in marked.get(int(number), [])}
    assert not wrong, f"the page names tests that do not carry the oracle's number: {wrong}"
