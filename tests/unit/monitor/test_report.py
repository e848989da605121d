import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from specforge.monitor.charts import Axes, Series, bar_chart, line_chart, nice_ticks, number
from specforge.monitor.report import render_report, write_report

REPORT: dict[str, Any] = {
    "accepted_length_mean": 2.8312,
    "accepted_length_untrained": 1.0021,
    "acceptance_per_position": [0.72, 0.515, 0.331],
    "lossless": True,
    "num_prompts_compared": 32,
    "tokens_per_second_plain": 200.0,
    "tokens_per_second_speculative": 340.0,
    "num_steps": 600,
    "draft_weights_sha256": "a3f5" * 16,
    "topology": "colocated",
    "wall_seconds": {"responses": 40.0, "training": 150.5, "evaluation": 20.0},
    "configuration": {"training": {"lr": 0.001, "betas": [0.9, 0.95]}, "algorithm": {"name": "eagle3"}},
}


def curve(num_steps: int) -> list[dict[str, float]]:
    return [
        {
            "time_s": 1.0,
            "step": step,
            "loss": 8.0 / step,
            "simulated_acc_len": 2.0,
            **{f"accuracy_{i}": 0.1 * i for i in range(7)},
        }
        for step in range(1, num_steps + 1)
    ]


class Page(HTMLParser):
    """Text and tags of a page; fails on tags that are not closed in order."""

    VOID = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += f" {data.strip()}"


def test_headline_numbers_and_every_figure_are_readable():
    words = Page(render_report(REPORT, curve(50), "A run")).words
    for text in ("A run", "2.83", "untrained draft: 1.00", "1.70x", "340 against 200 tokens per second", "32 prompts"):
        assert text in words
    for text in ("72.0%", "51.5%", "33.1%", "600", "a3f5" * 16, "colocated", "training", "150.5", "3 min 30 s"):
        assert text in words
    for text in ("training.lr", "0.001", "training.betas", "0.9, 0.95", "algorithm.name", "eagle3", "position 7"):
        assert text in words


@pytest.mark.parametrize(("lossless", "text"), [(True, "yes"), (False, "NO"), (None, "not judged")])
def test_lossless_is_said_plainly(lossless: bool | None, text: str):
    assert f" {text} " in Page(render_report({"lossless": lossless}, [], "x")).words


def test_page_needs_no_network_and_runs_no_script():
    page = render_report(REPORT, curve(50), "A run")
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert all(name not in ("src", "href", "style") and not name.startswith("on") for _, a in parsed.tags for name in a)
    assert "url(" not in page
    assert "@import" not in page


def test_policy_allows_the_one_style_sheet_and_nothing_else():
    page = render_report(REPORT, curve(50), "A run")
    policy = next(a["content"] for tag, a in Page(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search("<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_everything_shown_is_escaped():
    attack = "</title><script>alert('1')</script>"
    report = {attack: attack, "configuration": {attack: {attack: attack}}, "wall_seconds": {attack: 1.0}}
    page = render_report(report, [{"step": 1, "loss": 1.0, attack: 2.0}], attack)
    assert "<script" not in page
    assert attack in Page(page).words


@pytest.mark.parametrize("num_steps", [0, 1, 2, 10_000])
def test_any_length_of_training_gives_a_page_of_bounded_size(num_steps: int):
    page = render_report(REPORT, curve(num_steps), "A run")
    Page(page)
    assert len(page) < 250_000
    assert "nan" not in page.lower().replace("a run", "")


def test_values_that_are_not_finite_are_left_out_of_charts():
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": None}]
    Page(render_report({}, records, "x"))


def test_empty_report_is_a_page():
    assert "no data" in Page(render_report({}, [], "nothing yet")).words


def test_report_is_written_whole_and_replaced(tmp_path: Path):
    path = tmp_path / "new" / "report.html"
    write_report(path, REPORT, curve(5), "first")
    write_report(path, REPORT, curve(5), "second")
    assert "second" in path.read_text()
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_points_of_a_line_lie_inside_the_picture():
    chart = str(line_chart([Series("a", [(1, -5.0), (2, 5.0), (9, 0.0)])], Axes("step", "value")))
    points = re.search('points="([^"]*)"', chart)
    assert points is not None
    xs, ys = zip(*(map(float, pair.split(",")) for pair in points.group(1).split()), strict=True)
    assert all(0 <= x <= 640 for x in xs)
    assert all(0 <= y <= 280 for y in ys)
    assert ys[0] > ys[2] > ys[1]


def test_constant_line_and_full_bars_are_drawn():
    assert "polyline" in line_chart([Series("a", [(1, 3.0), (2, 3.0)])], Axes("step", "value"))
    assert "100.0%" in bar_chart([("1", 1.0), ("2", 0.0)], Axes("token", "share"))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.1, 9.7), (-3, 4), (0, 12345), (1e-4, 3e-4)])
def test_ticks_are_round_and_cover_the_range(low: float, high: float):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 3 <= len(ticks) <= 8


def test_numbers_are_short():
    assert [number(value) for value in (3, 12345.0, 0.012345, 12.3456, 4567.8)] == [
        "3",
        "12,345",
        "0.0123",
        "12.35",
        "4,568",
    ]
    assert number(float("nan")) == "n/a"
