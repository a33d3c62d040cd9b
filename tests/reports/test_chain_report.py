from __future__ import annotations

from typing import Any

import pytest

from divergence.chain_result import Chain, Difference, Step
from divergence.reports.chain import render_chain
from divergence.result import Comparison, FirstDivergence, Policy, SiteResult
from divergence.sites import Site


def site(layer: int, tensor: str, ratio: float, **changes: Any) -> SiteResult:
    """A site whose error is `ratio` times its floor of 1e-3; over 4 fails."""
    values: dict[str, Any] = {"rel_l2": ratio * 1e-3, "floor": 1e-3, "ratio": ratio}
    values["verdict"] = "fail" if ratio > 4 else "pass"
    return SiteResult(str(Site(layer, tensor)), "", layer, tensor, 1, **{**values, **changes})


def comparison(name: str, *sites: SiteResult, **changes: Any) -> Comparison:
    failing = next((s for s in sites if s.verdict == "fail"), None)
    values: dict[str, Any] = {
        "verdict": "fail" if failing else "pass",
        "reason": "",
        "first_divergence": failing and FirstDivergence(failing.site, "", failing.layer, failing.tensor),
        "reference": "pytorch",
        "candidate": name,
        "policy": Policy("noise-floor", 4.0, "fp16"),
    }
    return Comparison(sites=sites, **{**values, **changes})


def chain(*, layers: int = 3, key: float = 90.0, **facts: Any) -> Chain:
    """A clean wrapper, an engine that is wrong at the key of layer 1, and one that is missing."""
    tensors = [(n, t) for n in range(layers) for t in ("key", "hidden")]
    wrapper = [site(n, t, 0.0, bit_equal=True) for n, t in tensors]
    engine = [site(n, t, key if (n, t) == (1, "key") else 1.5) for n, t in tensors]
    differences = tuple(Difference(s.site, s.rel_l2, s.rel_l2, 0.5, s.ratio) for s in engine)
    failed = comparison("gone", verdict="error", reason="gone: no such file")
    return Chain(
        "error",
        "gone could not be compared",
        "pytorch",
        ("wrapper", "engine", "gone"),
        (
            Step("pytorch", "wrapper", "pass", "equal to the bit", bit_equal=True),
            Step("wrapper", "engine", "fail", "brings an error in at layers.1.key", "layers.1.key", False,
                 0.09, "layers.1.key", differences),
            Step("engine", "gone", "error", "could not be compared: gone: no such file"),
        ),
        (comparison("wrapper", *wrapper), comparison("engine", *engine, **facts), failed),
    )  # fmt: skip


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(start)]


def test_verdict_and_steps_come_first() -> None:
    text = render_chain(chain()).splitlines()
    assert text[0] == "ERROR  gone could not be compared"
    assert text[2].startswith("Steps")
    assert text[3] == "  ✓ pytorch -> wrapper  equal to the bit"
    assert text[4] == "  ✗ wrapper -> engine  brings an error in at layers.1.key"
    assert text[5] == "  ? engine -> gone  could not be compared: gone: no such file"


def test_every_candidate_has_a_row() -> None:
    text = render_chain(chain())
    assert lines(text, "engine ")[0].split() == ["engine", "FAIL", "fp16", "layers.1.key", "9.0e-2", "90x"]
    assert lines(text, "gone ")[0].split()[:2] == ["gone", "ERROR"]


def test_the_sites_stand_side_by_side() -> None:
    first, direct = lines(render_chain(chain()), "layers.1.key")
    assert first.split() == ["layers.1.key", "equal", "✓", "9.0e-2", "90x", "✗"]
    assert direct.split() == ["layers.1.key", "9.0e-2", "90x"]


def test_the_plot_has_a_series_for_each_candidate() -> None:
    text = render_chain(chain()).split("Accumulation")[1]
    first = next(line for line in text.splitlines() if line.startswith("      0"))
    assert "equal" in first and "█" in first


def test_latency_stands_beside_accuracy_where_it_is_known() -> None:
    assert "ms" not in render_chain(chain()).split("Sites")[0]
    facts = {"candidate": {"latency_ms": 8.437}, "reference": {"latency_ms": 104}}
    text = render_chain(chain(environment=facts))
    assert lines(text, "candidate ")[0].split()[-1] == "ms"
    assert lines(text, "reference ")[0].split()[-1] == "104"
    assert lines(text, "engine ")[0].split()[-1] == "8.44"
    assert lines(text, "wrapper ")[0].split()[-1] == "-"


def test_nan_is_named_as_such() -> None:
    broken = chain()
    sites = (site(0, "hidden", 1.0, cand_nonfinite=3, verdict="fail"),)
    text = render_chain(Chain("fail", "r", "pytorch", ("a",), broken.steps[:1], (comparison("a", *sites),)))
    assert "NaN/Inf" in text and "NaN or Inf" in text


@pytest.mark.parametrize("width", [40, 60, 100, 160])
@pytest.mark.parametrize("layers", [2, 60])
def test_no_line_is_wider_than_the_page_and_ascii_is_ascii(width: int, layers: int) -> None:
    text = render_chain(chain(layers=layers), width=width, ascii=True)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text and "\x1b" in render_chain(chain(), color=True)


def test_the_passing_middle_of_a_long_model_is_folded() -> None:
    text = render_chain(chain(layers=60))
    assert "layers 5 to 56: all pass" in text


def test_names_cannot_break_the_page() -> None:
    hostile = chain()
    named = Chain(
        hostile.verdict, "a\x1b[31m", "r", ("x" * 90, "y\n\x1b[2J", "z"), hostile.steps, hostile.comparisons
    )
    text = render_chain(named)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
