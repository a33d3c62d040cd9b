from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence.errors import SourceError
from divergence.result import (
    METRICS,
    Cause,
    Comparison,
    FirstDivergence,
    Policy,
    Profile,
    SiteResult,
    Unmatched,
)
from tests.reports import cases

FINITE = st.none() | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=12)
SITE_RESULTS = st.builds(
    SiteResult,
    site=TEXT,
    stack=TEXT,
    layer=st.none() | st.integers(0, 99),
    tensor=TEXT,
    call=st.integers(1, 9),
    verdict=st.sampled_from(["pass", "fail", "error"]),
    mse=FINITE,
    cosine=FINITE,
    max_abs_at=st.none() | st.lists(st.integers(0, 9), max_size=4).map(tuple),
    ref_nonfinite=st.integers(0, 5),
    bit_equal=st.booleans(),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    profile=st.builds(
        Profile,
        token=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
    ),
)
COMPARISONS = st.builds(
    Comparison,
    verdict=st.sampled_from(["pass", "fail", "error"]),
    reason=TEXT,
    first_divergence=st.none() | st.builds(FirstDivergence, TEXT, TEXT, st.none() | st.integers(0, 9), TEXT),
    reference=TEXT,
    candidate=TEXT,
    policy=st.builds(
        Policy,
        policy=st.sampled_from(["noise-floor", "absolute"]),
        ratio=st.floats(1, 9),
        sites=st.dictionaries(TEXT, st.dictionaries(st.sampled_from(list(METRICS)), st.floats(0, 1))),
    ),
    sites=st.lists(SITE_RESULTS, max_size=3).map(tuple),
    unmatched=st.lists(st.builds(Unmatched, TEXT, st.just("excluded"), TEXT), max_size=2).map(tuple),
    causes=st.lists(
        st.builds(Cause, TEXT, TEXT, st.lists(TEXT, max_size=2).map(tuple), FINITE, TEXT), max_size=2
    ).map(tuple),
    notes=st.lists(TEXT, max_size=2).map(tuple),
    environment=st.dictionaries(TEXT, TEXT | st.lists(st.integers(), max_size=2), max_size=3),
    contract=st.dictionaries(TEXT, st.none() | st.integers() | TEXT, max_size=3),
    command=TEXT,
)


def _comparison(**changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "verdict": "pass",
        "reason": "",
        "first_divergence": None,
        "reference": "a",
        "candidate": "b",
        "policy": Policy("noise-floor", 4.0),
        "sites": (SiteResult("layers.0.key", "", 0, "key", 1, "pass"),),
    }
    return Comparison(**{**values, **changes})


@given(COMPARISONS)
def test_a_comparison_survives_its_json(comparison: Comparison) -> None:
    assert Comparison.from_json(comparison.to_json()) == comparison


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_is_strict_where_figures_are_not_finite(value: float) -> None:
    site = SiteResult("layers.0.key", "", 0, "key", 1, "fail", mse=value, profile=Profile(token=(value, 1.0)))
    text = _comparison(sites=(site,), environment={"nested": [{"x": value}]}).to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(text, parse_constant=refuse)
    assert content["sites"][0]["mse"] is None
    assert content["sites"][0]["profile"]["token"] == [None, 1.0]
    assert content["environment"] == {"nested": [{"x": None}]}


def test_json_holds_the_keys_of_the_contract() -> None:
    content = json.loads(_comparison().to_json())
    assert content["schema"] == 1
    assert set(content) >= {
        *("verdict", "reason", "first_divergence", "causes", "sites", "unmatched"),
        *("contract", "environment", "command"),
    }
    assert set(content["sites"][0]) >= {
        *("site", "layer", "tensor", "mse", "max_abs", "max_abs_at", "mean_abs", "rel_l2", "row_rel_l2"),
        *("cosine", "ref_min", "ref_max", "cand_min", "cand_max", "ref_nonfinite", "cand_nonfinite"),
        *("floor", "ratio", "introduced", "verdict"),
    }


def test_every_metric_is_a_figure_of_a_site_with_unit_and_direction() -> None:
    fields = set(SiteResult.__dataclass_fields__)
    for name, info in METRICS.items():
        assert name in fields
        assert info.label
        assert info.unit


def test_saved_report_is_read_back_from_a_new_folder(tmp_path: Path) -> None:
    comparison = _comparison()
    path = tmp_path / "deep" / "report.json"
    comparison.save(path)
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert Comparison.from_json(path.read_text(encoding="utf-8"), str(path)) == comparison


def test_a_site_is_found_by_name() -> None:
    assert _comparison().site("layers.0.key").tensor == "key"
    with pytest.raises(KeyError):
        _comparison().site("layers.1.key")


def test_unknown_keys_of_a_later_minor_version_are_passed_over() -> None:
    content = json.loads(_comparison().to_json())
    content["later"] = 1
    content["sites"][0]["later"] = {"x": 1}
    assert Comparison.from_json(json.dumps(content)) == _comparison()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.json: not a report of divergence"),
        ("{", "r.json: not a report of divergence"),
        ("[]", "r.json: not a report of divergence"),
        ("null", "r.json: not a report of divergence"),
        ("{}", "r.json: not a report of divergence"),
        ('{"schema": 2}', "r.json: report schema 2, this version reads 1; update divergence"),
        ('{"schema": 1}', "r.json: not a report of divergence"),
        ('{"schema": 1, "sites": [3]}', "r.json: not a report of divergence"),
    ],
)
def test_other_json_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(SourceError) as raised:
        Comparison.from_json(text, "r.json")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_what_is_read_back_is_equal_though_a_figure_is_nan() -> None:
    case = cases.CASES["fail"]
    odd = dataclasses.replace(
        case,
        sites=(dataclasses.replace(case.sites[0], mse=float("nan"), max_abs=float("inf")), *case.sites[1:]),
    )
    assert Comparison.from_json(odd.to_json()) == odd
    assert odd != case
    assert odd != "another thing"


def test_a_site_that_is_none_comes_with_the_nearest() -> None:
    with pytest.raises(
        KeyError, match=r"layers.0.kye: no such site was compared; did you mean 'layers.0.key'\?"
    ):
        cases.CASES["pass"].site("layers.0.kye")
