from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence.reports.markdown import MAX_LINES, render_markdown
from divergence.result import Policy, Unmatched
from tests.reports import cases

LINK = "https://ci.example/runs/7/artifacts/1"
ALL = {**cases.CASES, "recorded": cases.recorded(), "eighty": cases.fails(80), "detail": cases.detailed(80)}


@pytest.mark.parametrize("name", ALL)
def test_it_stays_under_sixty_lines(name: str) -> None:
    assert len(render_markdown(ALL[name], LINK).splitlines()) < MAX_LINES


def test_much_of_everything_stays_under_sixty_lines() -> None:
    many = dataclasses.replace(
        cases.fails(80),
        causes=tuple(dataclasses.replace(cases.CAUSE, evidence=("it is so",) * 30) for _ in range(30)),
        unmatched=tuple(Unmatched(f"layers.{n}.key", "missing in candidate", "gone") for n in range(99)),
        policy=Policy("absolute", 4.0, sites={f"layers.{n}.*": {"mse": 1e-5} for n in range(99)}),
    )
    assert len(render_markdown(many, LINK).splitlines()) < MAX_LINES


def test_verdict_where_why_fix_and_link_come_before_the_table() -> None:
    """A pull request told by this alone is understandable."""
    text = render_markdown(cases.fails(), LINK)
    head, table = text.split("<details>")
    assert head.splitlines()[0] == "### ❌ divergence: fail"
    assert "**The candidate goes wrong at the key of layer 0.**" in head
    assert "- **Where:** `layers.0.key`. The key of layer 0: what a token offers for others" in head
    assert "- **Why:** The rotary angles are computed in half precision. Putting this fault alone" in head
    assert "reproduces 99.96 % of the error." in head
    assert "  - the error of the key grows with the position of the token: 6.0e-4 at 1, 5.4e-2 at 900" in head
    assert (
        "- **Fix:** Build a strongly typed network and keep position, inv\\_freq, cos and sin in fp32."
        in head
    )
    assert "Reference `pytorch`, candidate `engine.plan`" in head
    assert "91 sites: 61 pass, 30 fail, 1 excluded by name." in head
    assert text.splitlines()[-1] == f"[Open the report]({LINK}); to reproduce: `{cases.COMMAND}`"
    assert "| 0 | **55x** ❌ | 1.2x | 1.2x |" in table
    assert "</details>" in table


def test_a_pass_says_how_far_it_was_from_the_limit() -> None:
    text = render_markdown(cases.passes())
    assert text.startswith(
        "### ✅ divergence: pass\n\n**The candidate computes what the reference computes.**"
    )
    assert "The largest error is 2.0x what rounding explains \\(limit 4x\\), at layers.29.key." in text
    assert "Why:" not in text
    assert "The report is `report.html` of this run" in text


def test_an_error_is_no_pass() -> None:
    text = render_markdown(cases.error())
    assert text.startswith("### ⚠️ divergence: error\n\n**The question could not be answered.** No site could")
    assert "No site was compared." in text
    assert "- `layers.0.key` missing in candidate: no output of that name" in text


def test_nan_is_named() -> None:
    text = render_markdown(cases.nonfinite())
    assert "1024 of its values are NaN or infinite." in text
    assert "**NaN/Inf** ❌" in text


def test_many_failing_layers_are_shown_from_the_first_on() -> None:
    rows = re.findall(r"^\| (\d+) \|", render_markdown(cases.fails(80)), re.MULTILINE)
    assert rows == [str(n) for n in range(22)]
    assert "58 more layers in the page." in render_markdown(cases.fails(80))


def test_of_many_passing_layers_the_ends_are_shown() -> None:
    rows = re.findall(r"^\| (\d+) \|", render_markdown(cases.passes(80)), re.MULTILINE)
    assert len(rows) == 22
    assert rows == sorted(rows, key=int)
    assert {"0", "79"} <= set(rows)


def test_a_failing_layer_is_never_left_out_for_a_passing_one() -> None:
    sites = [s if s.site != "layers.50.key" else cases.site(50, "key", 9.0) for s in cases.layers(80)]
    assert "| 50 | **9.0x** ❌ |" in render_markdown(cases.comparison(*sites))


def test_names_are_neither_markup_nor_mentions() -> None:
    text = render_markdown(cases.evil(), LINK)
    outside = re.sub(r"(`+).*?\1", "", text)
    assert "<img" not in outside
    text = render_markdown(cases.comparison(verdict="error", reason="see @somebody and #1 <b>"), LINK)
    assert "@somebody" not in text
    assert "\\#1 &lt;b&gt;" in text


@given(st.text(max_size=40))
def test_no_name_breaks_a_table_or_ends_a_code_span(name: str) -> None:
    sites = [dataclasses.replace(s, tensor=name) for s in cases.layers(2, ("key",))]
    text = render_markdown(cases.comparison(*sites, candidate=name, command=name), LINK)
    assert len(text.splitlines()) == len(render_markdown(cases.comparison(*sites), LINK).splitlines())
    header, rule = re.findall(r"^\|.*\|$", text, re.MULTILINE)[:2]
    assert len(re.findall(r"(?<!\\)\|", header)) == rule.count("|")


def test_a_link_cannot_end_early() -> None:
    assert "(https://a.b/x%29%20y)" in render_markdown(cases.passes(1), "https://a.b/x) y")


def test_further_causes_are_told_with_their_site() -> None:
    other = dataclasses.replace(cases.OTHER, site="layers.7.value")
    text = render_markdown(dataclasses.replace(cases.fails(), causes=(cases.CAUSE, other)))
    assert "- Also: Products are summed in fp16 at `layers.7.value`" in text
