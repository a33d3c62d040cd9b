from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence.reports.junit import render_junit
from divergence.result import Comparison, Unmatched
from tests.reports import cases


def suite(comparison: Comparison) -> ET.Element:
    found = ET.fromstring(render_junit(comparison)).find("testsuite")  # noqa: S314 (written by us)
    assert found is not None
    return found


@pytest.mark.parametrize("name", cases.CASES)
def test_the_counts_are_those_of_the_cases(name: str) -> None:
    read = suite(cases.CASES[name])
    for attribute, element in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert read.get(attribute) == str(len(read.findall(f"testcase/{element}")))
    assert read.get("tests") == str(len(read.findall("testcase")))


@pytest.mark.parametrize("name", cases.CASES)
def test_it_is_green_exactly_when_the_verdict_is_pass(name: str) -> None:
    read = suite(cases.CASES[name])
    green = read.get("failures") == "0" and read.get("errors") == "0"
    assert green == (cases.CASES[name].verdict == "pass")


def test_every_site_is_a_case() -> None:
    read = suite(cases.fails())
    names = [case.get("name") for case in read.findall("testcase")]
    assert names[:91] == [s.site for s in cases.fails().sites]
    assert read.findall("testcase")[0].get("classname") == "divergence.layers.0"
    assert read.get("time") == "3.200"


def test_a_failure_tells_figure_against_limit_and_the_cause() -> None:
    failure = suite(cases.fails()).find("testcase[@name='layers.0.key']/failure")
    assert failure is not None
    message = "layers.0.key: introduces an error of 1.1e-2, 55x its own noise floor of 2.0e-4 (limit 4x)"
    assert failure.get("message") == message
    assert f"cause: {cases.CAUSE.title}" in str(failure.text)
    assert f"fix: {cases.CAUSE.fix}" in str(failure.text)
    other = suite(cases.fails()).find("testcase[@name='layers.1.key']/failure")
    assert other is not None
    assert "cause:" not in str(other.text)


def test_an_error_without_sites_is_an_error_in_the_suite() -> None:
    read = suite(dataclasses.replace(cases.error(), unmatched=()))
    error = read.find("testcase[@name='verdict']/error")
    assert error is not None
    assert error.get("message") == "no site could be compared"
    assert read.get("errors") == "1"


def test_a_site_that_could_not_be_judged_is_an_error() -> None:
    broken = cases.site(0, "key", None, verdict="error", reason="the reference itself overflows here")
    error = suite(cases.comparison(broken, verdict="error")).find("testcase/error")
    assert error is not None
    assert error.get("message") == "layers.0.key: the reference itself overflows here"


def test_missing_sites_fail_and_excluded_ones_are_skipped() -> None:
    read = suite(
        cases.comparison(
            *cases.layers(1),
            verdict="fail",
            unmatched=(
                Unmatched("layers.1.key", "missing in candidate", "no output", "map it"),
                Unmatched("layers.2.key", "shape mismatch", "[1, 2] and [2, 1]"),
                Unmatched("layers.3.key", "excluded", "by 'layers.3.*'"),
                Unmatched("layers.4.key", "missing in reference", "only the candidate has it"),
            ),
        )
    )
    kinds = {case.get("name"): [child.tag for child in case] for case in read.findall("testcase")}
    assert kinds["layers.1.key"] == kinds["layers.2.key"] == ["failure"]
    assert kinds["layers.3.key"] == kinds["layers.4.key"] == ["skipped"]


@given(st.text(max_size=40))
@settings(max_examples=50)
def test_any_name_gives_valid_xml(name: str) -> None:
    """Control characters and lone surrogates are no XML; they are written as escapes."""
    site = dataclasses.replace(cases.site(0, "key", 9.0), site=name, reason=name)
    read = suite(cases.comparison(site, causes=(dataclasses.replace(cases.CAUSE, fix=name),)))
    assert len(read.findall("testcase/failure")) == 1


def test_a_cause_is_told_at_the_site_that_it_explains() -> None:
    bad = [cases.site(n, "key", 9.0) for n in range(3)]
    cause = dataclasses.replace(cases.CAUSE, site="layers.2.key")
    read = suite(cases.comparison(*bad, causes=(cause,)))
    told = [case.get("name") for case in read.findall("testcase") if "cause:" in "".join(case.itertext())]
    assert told == ["layers.2.key"]
