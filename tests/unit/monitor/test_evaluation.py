"""The page of an evaluation: everything is on it, escaped, under the policy of all pages."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from specforge.monitor.charts import Axes, Estimate, interval_chart
from specforge.monitor.evaluation import render_evaluation, write_evaluation


def figures(mean: float | None = 2.345, num_positions: int = 2) -> dict[str, Any]:
    known = mean is not None
    return {
        "num_prompts": 12,
        "num_rounds": 345 if known else 0,
        "accepted_length_mean": mean,
        "accepted_length_ci95": (2.1, 2.6) if known else None,
        "acceptance_per_position": [0.61, 0.42][:num_positions] if known else [],
        "acceptance_per_position_ci95": [(0.5, 0.7), None][:num_positions] if known else [],
        "tokens_per_second_plain": 100.0 if known else 0.0,
        "tokens_per_second_speculative": 151.0 if known else 0.0,
        "speed_up": 1.51 if known else 0.0,
        "speed_up_ci95": (1.4, 1.62) if known else None,
        "lossless": True,
    }


def report(categories: dict[str, dict[str, Any]], sizes: tuple[str, ...] = ("1", "16")) -> dict[str, Any]:
    by_size = {size: figures() | {"by_category": categories} for size in sizes}
    facts = dict.fromkeys(["num_prompts_compared", "num_mismatches", "num_near_ties"], 24)
    facts |= {"num_tokens_compared": 9876, "distinct_4grams": 0.9, "batch_invariant": True}
    others = {"batch_size": 1, "target": "t", "draft": "d", "settings": {"prompts": ["a.jsonl"], "tree": None}}
    return figures() | facts | others | {"by_category": categories, "by_batch_size": by_size}


class Words(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        assert not {"src", "href", "style"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += f" {data.strip()}"


def test_every_figure_is_on_the_page():
    page = render_evaluation(report({"math": figures(3.21), "coding": figures(1.98)}), "Draft of today")
    words = Words(page).words
    for text in ("Draft of today", "2.35", "2.10 to 2.60", "1.51x", "1.40 to 1.62", "151 against 100", "9,876 tokens"):
        assert text in words
    for text in ("math", "3.21", "coding", "1.98", "61.0%", "0.61", "0.50 to 0.70", "Batch size 16", "a.jsonl"):
        assert text in words


def test_policy_allows_the_one_style_sheet_and_nothing_else():
    page = render_evaluation(report({"a": figures()}), "x")
    style = re.search("<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'" in page


def test_everything_shown_is_escaped():
    attack = "</title><script>alert('1')</script>"
    found = report({attack: figures(), "b": figures()}) | {"settings": {attack: attack}, "draft": attack}
    page = render_evaluation(found, attack)
    assert "<script" not in page
    assert attack in Words(page).words


@pytest.mark.parametrize("count", [1, 2, 8, 30])
def test_any_number_of_categories_is_a_page(count: int):
    words = Words(render_evaluation(report({f"kind {i}": figures() for i in range(count)}), "x")).words
    assert ("Accepted length by category" in words) == (count > 1)
    assert ("Acceptance by position and category" in words) == (1 < count <= 8)


def test_category_without_a_round_has_dashes():
    words = Words(render_evaluation(report({"none": figures(None), "some": figures()}), "x")).words
    assert "nan" not in words
    assert "0.00x" not in words


def test_page_is_written_whole(tmp_path: Path):
    path = tmp_path / "new" / "eval.html"
    write_evaluation(path, report({"a": figures()}), "first")
    assert "first" in path.read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["eval.html"]


def test_intervals_lie_around_their_dot_and_inside_the_picture():
    chart = str(interval_chart([Estimate("a", 2.0, (1.5, 3.0)), Estimate("b", 1.0)], Axes("", "length", 1.0)))
    (dot, other) = map(float, re.findall(r'cx="([\d.]+)"', chart))
    low, high = map(float, re.findall(r'd="M([\d.]+) [\d.]+v10m0 -5H([\d.]+)', chart)[0])
    assert 150 <= other < low < dot < high <= 640
    assert (high - dot) / (dot - low) == pytest.approx(2.0, abs=0.01)
    assert "no data" in interval_chart([Estimate("a", float("nan"))], Axes("", "length"))
