"""The index of a session."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from divergence.reports.assertion import render_assertion
from divergence.reports.index import entry_of, headline, in_order, write_index
from divergence.result import Comparison
from tests.reports import cases

CASES: dict[str, Comparison] = {
    make.__name__: make()
    for make in (
        cases.passes,
        cases.fails,
        cases.error,
        cases.nonfinite,
        cases.keys_and_values_only,
        cases.evil,
        cases.several_stacks,
    )
}


def entry(test: str, verdict: str = "pass", number: int = 1) -> dict[str, Any]:
    return {"test": test, "verdict": verdict, "number": number}


def test_what_needs_a_reader_comes_first_and_numbers_count_as_numbers() -> None:
    entries = [entry("t[10]"), entry("t[2]"), entry("z", "error"), entry("y", "fail", 2), entry("y", "fail")]
    assert [(e["test"], e["number"]) for e in in_order(entries)] == [
        ("y", 1),
        ("y", 2),
        ("z", 1),
        ("t[2]", 1),
        ("t[10]", 1),
    ]


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ([], ("error", "Nothing was compared")),
        (["pass"], ("pass", "All comparisons pass")),
        (["pass", "error"], ("error", "1 of 2 comparisons could not be answered")),
        (["pass", "error", "fail"], ("error", "1 of 3 comparisons could not be answered, 1 fails")),
        (["fail", "fail"], ("fail", "2 of 2 comparisons fail")),
    ],
)
def test_one_that_is_no_pass_leaves_no_pass(verdicts: list[str], said: tuple[str, str]) -> None:
    assert headline([entry("t", verdict) for verdict in verdicts]) == said


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_comparison_has_an_entry_that_asks_for_nothing(name: str, tmp_path: Path) -> None:
    result: Comparison = CASES[name]
    made = entry_of(result, 'test_<b>"x"</b>.py::t', 1, "folder")
    page = write_index([made], tmp_path).read_text("utf-8")
    assert json.loads((tmp_path / "index.json").read_text("utf-8"))["comparisons"] == [made]
    assert "<b>&#34;" not in page and 'test_<b>"' not in page and "<script" not in page
    assert "default-src 'none'" in html.unescape(page) and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.verdict == "fail"])
def test_the_first_three_lines_are_where_figure_and_cause(name: str) -> None:
    result = CASES[name]
    where, figure, cause, *_ = render_assertion(result).split("\n")
    if result.first_divergence is not None:
        assert where.startswith(f"{result.first_divergence.site} fails: ")
        assert str(result.first_divergence.layer) in where or result.first_divergence.layer is None
    assert figure and cause.startswith("cause: ")
