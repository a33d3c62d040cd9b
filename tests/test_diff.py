from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence.diff import FACTOR, Change, diff
from divergence.errors import AlignmentError, ConfigurationError
from divergence.reports.difference import render_difference
from divergence.result import Comparison, Policy, Unmatched
from tests.reports import cases


def one(ratio: float | None = 1.0, **changes: Any) -> Comparison:
    return cases.comparison(cases.site(0, "key", ratio, **changes), cases.site(0, "value"))


def change(old: Comparison, new: Comparison, factor: float = FACTOR) -> Change:
    return next(c for c in diff(old, new, factor).changes if c.site == "layers.0.key")


def test_a_report_does_not_differ_from_itself() -> None:
    for case in cases.CASES.values():
        if case.sites:
            found = diff(case, case)
            assert found.verdict == "unchanged"
            assert {c.kind for c in found.changes} == {"same"}
            assert len(found.changes) == len(case.sites)


def test_an_error_beyond_noise_is_a_regression() -> None:
    found = diff(one(1.2), one(3.6))
    assert found.verdict == "regressed"
    assert found.reason == "layers.0.key error over floor went from 1.2x to 3.6x"
    assert [c.site for c in found.of("worse")] == ["layers.0.key"]
    assert found.of("worse")[0].change == pytest.approx(3.0)


def test_the_way_back_is_an_improvement() -> None:
    found = diff(one(3.6), one(1.2))
    assert (found.verdict, [c.kind for c in found.changes]) == ("improved", ["better", "same"])


def test_within_the_factor_all_is_noise() -> None:
    assert change(one(1.2), one(2.3)).kind == "same"
    assert change(one(1.2), one(2.3), factor=1.5).kind == "worse"


def test_below_the_floor_all_is_noise() -> None:
    """A hundredth of the floor and the floor itself are the same: nothing."""
    assert change(one(0.01), one(1.0)).kind == "same"
    assert change(one(0.01), one(2.5)).kind == "worse"
    assert change(one(0.01), one(2.5)).change == pytest.approx(2.5)


@given(st.floats(0.01, 1e6), st.floats(0.01, 1e6))
def test_what_is_worse_one_way_is_better_the_other(old: float, new: float) -> None:
    opposite = {"worse": "better", "better": "worse", "same": "same"}
    assert change(one(new), one(old)).kind == opposite[change(one(old), one(new)).kind]


def test_one_regression_outweighs_any_improvement() -> None:
    old = cases.comparison(cases.site(0, "key", 9.0), cases.site(0, "value", 1.0))
    new = cases.comparison(cases.site(0, "key", 1.0), cases.site(0, "value", 9.0))
    assert diff(old, new).verdict == "regressed"


def test_the_introduced_error_is_compared_where_both_have_it() -> None:
    """What is only passed on from an earlier layer is not that layer's regression."""
    own: dict[str, Any] = {"introduced": 2e-4, "introduced_floor": 2e-4, "introduced_ratio": 1.0}
    assert change(one(1.0, **own), one(50.0, verdict="pass", **own)).kind == "same"


def test_a_report_that_did_not_replay_is_compared_by_its_cumulative_error() -> None:
    own: dict[str, Any] = {"introduced": 2e-4, "introduced_floor": 2e-4, "introduced_ratio": 1.0}
    assert change(one(1.0), one(50.0, verdict="pass", **own)).kind == "same"
    assert change(one(50.0, verdict="pass", **own), one(1.0)).kind == "better"


def test_equal_bits_are_no_error() -> None:
    assert change(one(1.0, bit_equal=True), one(1.5)).kind == "same"
    assert change(one(9.0), one(9.0, bit_equal=True, verdict="pass")).kind == "better"


def test_nan_is_worse_whatever_the_ratio() -> None:
    broken = one(None, cand_nonfinite=3, verdict="fail")
    assert change(one(), broken).reason == "became NaN or Inf"
    assert change(broken, one()).kind == "better"
    assert change(broken, broken).kind == "same"


def test_what_can_no_longer_be_judged_is_worse() -> None:
    broken = one(None, verdict="error", reason="no noise floor")
    assert change(one(), broken).kind == "worse"
    assert change(broken, one()).kind == "better"
    assert change(broken, one(9.0)).kind == "worse"


def test_a_limit_crossed_within_noise_is_told_and_no_regression() -> None:
    found = diff(one(3.9), one(4.1))
    assert found.verdict == "unchanged"
    assert "layers.0.key: pass before, fail now, by no more than noise" in render_difference(found)


def test_a_site_that_went_missing_is_a_regression_unless_it_was_excluded() -> None:
    only = cases.comparison(cases.site(0, "value"))
    assert change(one(), only).reason == "is no longer compared"
    assert diff(one(), only).verdict == "regressed"
    excluded = dataclasses.replace(only, unmatched=(Unmatched("layers.0.key", "excluded", "by 'x'"),))
    assert diff(one(), excluded).verdict == "unchanged"
    assert change(one(), excluded).kind == "removed"


def test_a_new_site_is_listed_and_counts_for_nothing() -> None:
    found = diff(cases.comparison(cases.site(0, "value")), one(9.0))
    assert (found.verdict, [c.site for c in found.of("added")]) == ("unchanged", ["layers.0.key"])


def test_without_floors_storage_rounding_is_the_noise() -> None:
    """Absolute limits: fp16 stores to 2^-12 of a value, so 1e-4 is nothing and 1e-2 is not."""
    small, middling, large = (one(None, rel_l2=error, floor=None) for error in (1e-5, 1e-4, 1e-2))
    assert change(small, middling).kind == "same"
    worse = change(middling, large)
    assert worse.kind == "worse"
    assert worse.new == pytest.approx(1e-2 * 2**12)


def test_without_any_figure_the_verdicts_are_compared() -> None:
    unknown: dict[str, Any] = {"ref_dtype": "", "cand_dtype": ""}
    assert change(one(None, **unknown), one(None, verdict="fail", **unknown)).kind == "worse"
    assert change(one(None, **unknown), one(None, **unknown)).kind == "same"


def test_a_new_report_without_sites_answers_nothing() -> None:
    found = diff(one(), cases.error())
    assert (found.verdict, found.reason) == (
        "error",
        "the new report answers nothing: no site could be compared",
    )


def test_reports_of_other_models_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"no site in common \(old 'layers.0.key' and 1 more, new"):
        diff(one(), cases.comparison(cases.site(0, "key", stack="vision")))
    with pytest.raises(AlignmentError, match="old none at all"):
        diff(cases.error(), one())


@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(ConfigurationError, match="a factor above 1; give 2"):
        diff(one(), one(), factor)


def test_what_else_changed_is_noted() -> None:
    new = dataclasses.replace(
        one(), policy=Policy("noise-floor", 8.0, "bf16"), environment={"inputs_digest": "ab", "reference": {}}
    )
    assert diff(one(), new).notes == (
        "the precision judged by changed from fp16 to bf16",
        "the limit changed from 4.0 to 8.0",
        "the digest of the inputs changed from none to ab",
    )


def test_the_text_names_the_worst_first() -> None:
    old = cases.comparison(*cases.layers(40))
    new = cases.comparison(*(cases.site(n, t, 5.0 + n) for n in range(40) for t in cases.ALL))
    text = render_difference(diff(old, new), width=120)
    lines = text.splitlines()
    assert lines[0].startswith("REGRESSED  layers.0.key error over floor went from 1x to 5x, and 119 more")
    assert "  sites  120 worse" in lines
    assert lines[lines.index("Worse: error over noise floor, old and new") + 1].split()[0] == "layers.39.key"
    assert "100 more sites" in text
    assert max(map(len, lines)) <= 120
