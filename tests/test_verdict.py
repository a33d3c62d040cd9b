"""What the verdict of a whole comparison says of one site and of several."""

from __future__ import annotations

import pytest

from divergence.result import Unmatched
from divergence.verdict import overall
from tests.reports import cases


def _missing(count: int) -> list[Unmatched]:
    return [Unmatched(f"layers.{i}.key", "missing in candidate", "") for i in range(count)]


@pytest.mark.parametrize(
    ("sites", "missing", "reason"),
    [
        (1, 0, "the only site is within its limits"),
        (2, 0, "all 2 sites are within their limits"),
        (
            1,
            1,
            (
                "1 site of the reference was not compared, layers.0.key (missing in candidate); "
                "map it in the configuration, or exclude it by name"
            ),
        ),
        (
            1,
            2,
            (
                "2 sites of the reference were not compared, the first layers.0.key (missing in candidate); "
                "map them in the configuration, or exclude them by name"
            ),
        ),
    ],
)
def test_one_site_is_spoken_of_as_one(sites: int, missing: int, reason: str) -> None:
    found = [cases.site(i, "hidden") for i in range(sites)]
    assert overall(found, _missing(missing))[1] == reason
