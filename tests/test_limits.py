"""What Python is given is checked as what files and options say is."""

from __future__ import annotations

from typing import Any

import pytest

from divergence.config import Tolerance
from divergence.errors import ConfigurationError
from divergence.setting import Options
from divergence.sites import patterns_of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "absolut"}, "policy is 'absolut', which is not known; did you mean 'absolute'?"),
        ({"policy": "none"}, "use one of noise-floor, absolute"),
        ({"policy": "absolute"}, "no limit is given"),
        ({"policy": "absolute", "sites": {"*": {"ratio": 2}}}, "no limit is given"),
        ({"ratio": -4}, "ratio is -4 and must be a finite number above 0"),
        ({"ratio": float("inf")}, "ratio is inf and must be a finite number above 0"),
        ({"ratio": float("nan")}, "ratio is nan and must be"),
        ({"ratio": "4"}, "ratio must be a number, not '4'"),
        ({"ratio": True}, "ratio must be a number, not True"),
        ({"sites": {"*": {"cosin": 0.9}}}, "'cosin' is not a metric; did you mean 'cosine'?"),
        ({"sites": {"*": {"mse": -1}}}, "tolerance of '*': mse is -1 and must be"),
        ({"sites": {"*": 0.1}}, "'*' has 0.1; give limits by metric"),
    ],
)
def test_a_tolerance_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Tolerance(**given)
    assert str(raised.value).startswith("tolerance") and message in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"replay": "sometimes"},
            "replay is 'sometimes', which is not known; use one of auto, always, never",
        ),
        ({"replay": "alway"}, "did you mean 'always'?"),
        ({"memory": -1}, "memory is -1; give bytes, a whole number above 0"),
        ({"memory": 0}, "memory is 0"),
        ({"memory": 1.5}, "memory is 1.5"),
        ({"precision": ""}, "precision '' is unknown; known: fp32, "),
        ({"precision": "fp17"}, "precision 'fp17' is unknown; did you mean 'fp16'?"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Options(**given)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("given", "patterns"),
    [("layers.1.*", ("layers.1.*",)), (["a", "b"], ("a", "b")), ((), ())],
)
def test_one_text_is_one_pattern(given: object, patterns: tuple[str, ...]) -> None:
    assert patterns_of(given) == patterns


@pytest.mark.parametrize("given", ["", " ", ["layers.1.*", ""], [3], 3, None])
def test_what_is_no_pattern_is_refused(given: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^exclude: .* is no pattern of sites such as"):
        patterns_of(given)
