"""What is said of real engines: the case study's eight layers, recorded once on an H100."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from benchmarks.tensorrt import gemma
from divergence.config import Config
from divergence.pipeline import compare
from divergence.result import Comparison
from tests.reports import recorded as reports
from tests.tensorrt.recorded import recorded_engine

KEYS = tuple(f"layers.{layer}.key" for layer in range(8))
CLEAN = tuple(f"layers.{layer}.{tensor}" for layer in range(8) for tensor in ("value", "hidden"))


@cache
def compared(name: str) -> Comparison:
    engine = recorded_engine(name, Path(mkdtemp(prefix="divergence-recorded-")))
    return compare(gemma.make("small", "cpu"), engine, gemma.inputs("small"), config=Config())


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_weakly_typed_engines_fail_at_the_first_key_with_all_values_clean(name: str) -> None:
    result = compared(name)
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.0.key"
    assert [s.site for s in result.sites if s.verdict == "fail" and s.layer is not None] == list(KEYS)
    assert all(result.site(site).verdict == "pass" for site in CLEAN)
    assert not result.unmatched


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_the_rotary_angles_are_named_with_the_variant_and_what_the_engine_says(name: str) -> None:
    result = compared(name)
    assert [cause.id for cause in result.causes] == ["rope_precision"]
    cause = result.causes[0]
    assert cause.site == "layers.0.key"
    assert cause.parameters["precision"] == name
    assert cause.parameters["rounded"] == ["position", "inv_freq", "angle"]
    assert set(KEYS) == set(cause.parameters["sites"])
    told = [line for line in cause.evidence if line.startswith("the engine ran its rotary")]
    assert len(told) == 1
    assert f"in {name} though the graph asks for Float" in told[0]
    assert "SinCos" in told[0], "the generated kernel is named after what it does"
    assert "STRONGLY_TYPED" in cause.fix


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_what_the_angles_leave_unexplained_is_half_precision_elsewhere(name: str) -> None:
    result = compared(name)
    key, value = result.site("layers.0.key"), result.site("layers.0.value")
    assert key.rel_l2 is not None and value.rel_l2 is not None
    explained = result.causes[0].explained
    assert explained is not None
    # The value takes the same norm and the same kind of product, but is not rotated.
    left = key.rel_l2 * (1 - explained) ** 0.5
    assert left < 1.25 * value.rel_l2
    assert explained > 0.98


def test_the_strongly_typed_engine_passes() -> None:
    result = compared("typed_fp16")
    assert result.verdict == "pass", result.reason
    assert result.policy.precision == "fp16"
    assert len(result.sites) == 27
    assert not result.causes


@pytest.mark.parametrize(
    ("name", "rotary"), [("fp16", "Half"), ("bf16", "BFloat16"), ("typed_fp16", "Float")]
)
def test_the_contract_says_where_the_angles_ran(name: str, rotary: str) -> None:
    rows = compared(name).contract["rows"]
    outside = [row for row in rows if row["role"] == "rotary" and not row["module"]]
    assert [row["precision"] for row in outside] == [rotary]


@pytest.mark.parametrize("name", ["fp16", "bf16", "typed_fp16"])
def test_the_recording_says_here_what_its_engine_said_on_the_device(name: str) -> None:
    """The reference runs on a CPU here and ran on a GPU there: its fp32 differs by rounding alone. Most
    channels, which ratios have been taken of as well since then, can only make them larger."""
    here, there = compared(name), reports.recorded(f"small-{name}")
    assert [s.site for s in here.sites] == [s.site for s in there.sites]
    for site in here.sites:
        then = there.site(site.site)
        assert site.verdict == then.verdict
        assert site.rel_l2 == pytest.approx(then.rel_l2, rel=1e-4), site.site
        assert site.floor == pytest.approx(then.floor, rel=0.05), site.site
        assert site.ratio is not None and then.ratio is not None
        assert site.ratio > 0.95 * then.ratio, site.site
    assert [c.id for c in here.causes] == [c.id for c in there.causes]
    for cause, known in zip(here.causes, there.causes, strict=True):
        assert cause.explained == pytest.approx(known.explained, abs=1e-5)
        assert cause.parameters == known.parameters
