from __future__ import annotations

import dataclasses

import pytest

from divergence.reports.words import many, part, percent, place, story
from divergence.result import Policy, Unmatched
from tests.reports import cases


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (4.2, "4.2"),
        (55.4, "55"),
        (211.3, "211"),
        (5831, "5\u202f800"),
        (77_321, "77\u202f000"),
        (3e12, "3e12"),
    ],
)
def test_ratios_are_said_as_people_say_them(ratio: float, said: str) -> None:
    assert many(ratio) == said


@pytest.mark.parametrize(("share", "said"), [(0.021, "2.1 %"), (1.9e-7, "1.9e-5 %"), (2.11, "211 %")])
def test_shares_are_percentages(share: float, said: str) -> None:
    assert percent(share) == said


def test_a_place_has_stack_and_call_where_there_are_several() -> None:
    assert place(cases.site(3, "key")) == "the key of layer 3"
    assert place(cases.site(3, "hidden", stack="vision", call=2)) == (
        "the hidden state of layer 3 (vision, call 2)"
    )
    assert place(cases.site(None, "logits")) == "the output logits"


def test_absolute_limits_are_told_as_such() -> None:
    policy = Policy("absolute", 4.0, sites={"layers.*.key": {"cosine": 0.999}})
    bad = cases.site(0, "key", None, cosine=0.22, floor=None, verdict="fail")
    told = story(cases.comparison(bad, policy=policy))
    assert told.detail.endswith("Cosine 0.22 is below the limit 0.999.")


def test_a_failure_for_missing_sites_only_claims_no_place() -> None:
    told = story(cases.comparison(*cases.layers(1), verdict="fail", reason="3 sites were not compared"))
    assert (told.headline, told.where) == ("The candidate could not be compared in full", "")


def test_a_pass_by_absolute_limits_claims_no_ratio() -> None:
    told = story(dataclasses.replace(cases.passes(2), policy=Policy("absolute", 4.0)))
    assert told.detail == "All 7 sites are within their limits."


def test_what_comes_before_is_said_as_far_as_it_is_known() -> None:
    good, bad = cases.site(0, "key"), cases.site(0, "value", 9.0)
    missing = Unmatched("layers.0.query", "missing in candidate", "gone")
    unknown = cases.site(0, "query", None, verdict="error")
    assert story(cases.comparison(bad)).detail.startswith("Nothing was compared before it.")
    assert story(cases.comparison(good, bad)).detail.startswith("All that is computed before it is within")
    for case in (cases.comparison(unknown, bad), cases.comparison(good, bad, unmatched=(missing,))):
        assert story(case).detail.startswith("All that could be judged before it is within its limits.")


@pytest.mark.parametrize(("explained", "said"), [(0.974, "97.4 %"), (0.0, "0 %"), (-3e6, "none")])
def test_what_an_emulation_explains(explained: float, said: str) -> None:
    assert part(explained) == said
