from __future__ import annotations

import dataclasses
import subprocess
import sys

import pandas as pd
import pytest

from divergence.frame import COLUMNS
from divergence.result import METRICS, SiteResult
from tests.reports import cases


def test_the_columns_are_those_documented() -> None:
    frame = cases.fails().to_frame()
    assert [frame.index.name, *frame.columns] == list(COLUMNS)


def test_every_fact_of_a_site_is_a_column_or_left_out_on_purpose() -> None:
    left_out = {"max_abs_at", "layout", "found_ref", "found_cand", "profile"}
    assert {f.name for f in dataclasses.fields(SiteResult)} - left_out == set(COLUMNS)
    assert set(METRICS) <= set(COLUMNS)


def test_a_row_is_a_site_in_execution_order() -> None:
    case = cases.fails()
    frame = case.to_frame()
    assert list(frame.index) == [s.site for s in case.sites]
    key = frame.loc["layers.3.key"]
    site = case.site("layers.3.key")
    assert (key["layer"], key["tensor"], key["rel_l2"], key["verdict"]) == (3, "key", site.rel_l2, "fail")
    assert key["shape"] == (1, 4, 970, 64)


def test_figures_that_do_not_exist_are_missing() -> None:
    frame = cases.nonfinite().to_frame()
    assert pd.isna(frame.loc["layers.9.key", "rel_l2"])
    assert frame.loc["layers.9.key", "cand_nonfinite"] == 1024
    assert pd.isna(cases.passes(1).to_frame().loc["output.logits", "layer"])


@pytest.mark.parametrize("case", [cases.fails(), cases.error(), cases.nonfinite()])
def test_types_do_not_depend_on_what_there_is(case: object) -> None:
    frame = case.to_frame()  # type: ignore[attr-defined]
    assert frame["rel_l2"].dtype == "float64"
    assert str(frame["layer"].dtype) == "Int64"
    assert frame["bit_equal"].dtype == "bool"


def test_it_can_be_grouped() -> None:
    worst = cases.fails().to_frame().groupby("tensor")["rel_l2"].max()
    assert worst["key"] == pytest.approx((55 + 29) * cases.FLOOR)


def test_pandas_is_loaded_on_demand_only() -> None:
    code = "import sys, divergence.result, divergence.frame; print('pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
