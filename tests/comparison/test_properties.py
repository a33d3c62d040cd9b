"""Properties that any two tensors must show."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence.comparison import compare_tensors
from divergence.comparison.cpu import compare
from divergence.comparison.metrics import AxisSums, Metrics, reference_metrics
from tests.strategies import FLOATS, SETTINGS, Case, cases

# Sums of at most 6^4 float64 terms in two orders differ by less than n u = 1300 * 1.1e-16.
ORDER = 1e-12

finite = cases(dtypes=FLOATS, nonfinite=False)
wide = cases(dtypes=(torch.float64,), nonfinite=False)


def run(case: Case, **change: Any) -> Metrics:
    given_ = dataclasses.replace(case, **change)
    return compare_tensors(given_.ref, given_.cand, axes=given_.axes, mask=given_.mask)


def assert_same(one: Metrics, other: Metrics) -> None:
    """Every figure of two results agrees: counts and extremes exactly, sums to rounding."""
    for field in dataclasses.fields(Metrics):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "sums":
            for axis in ("token", "head", "channel"):
                assert_same_sums(getattr(a, axis), getattr(b, axis))
        elif field.name == "max_abs_at":
            assert (a is None) == (b is None)
        elif isinstance(a, np.ndarray):
            np.testing.assert_allclose(a, b, rtol=ORDER, atol=0, err_msg=field.name)
        elif isinstance(a, float) and field.name not in ("max_abs", "padded_max_abs"):
            assert a == pytest.approx(b, rel=ORDER, abs=ORDER if field.name == "cosine" else 0), field.name
        else:
            assert a == b, field.name


def assert_same_sums(one: AxisSums, other: AxisSums) -> None:
    np.testing.assert_array_equal(one.count, other.count)
    for name in ("err2", "ref2", "cand2"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=ORDER, atol=0, err_msg=name)
    scale = np.sqrt(one.ref2 * one.cand2)
    assert np.all(np.abs(one.dot - other.dot) <= ORDER * scale)


@settings(SETTINGS, max_examples=200)
@given(cases(), st.sampled_from((1, 3, 16, 1 << 17)), st.sampled_from((2, 5, 1 << 18)))
def test_the_fast_one_agrees_with_the_definitions(case: Case, box: int, entries: int) -> None:
    """Shapes, dtypes, strides, masks and non-finite values, whatever the box and the pooling."""
    fast = compare(case.ref, case.cand, axes=case.axes, mask=case.mask, box=box, entries=entries)
    truth = reference_metrics(case.ref, case.cand, axes=case.axes, mask=case.mask, entries=entries)
    assert_same(fast, truth)
    assert fast.max_abs_at == truth.max_abs_at


@SETTINGS
@given(finite)
def test_figures_equal_those_of_torch(case: Case) -> None:
    """Without mask and non-finite values: torch's own functions in float64."""
    m = run(case, mask=None)
    r, c = (t.double().flatten() for t in (case.ref, case.cand))
    assert m.mse == pytest.approx(float(torch.nn.functional.mse_loss(c, r)), rel=ORDER)
    assert m.mean_abs == pytest.approx(float(torch.nn.functional.l1_loss(c, r)), rel=ORDER)
    assert m.max_abs == float((c - r).abs().max())
    assert float((case.cand.double() - case.ref.double())[m.max_abs_at].abs()) == m.max_abs
    if r.norm() > 0 and c.norm() > 0:
        cosine = torch.nn.functional.cosine_similarity(r, c, dim=0, eps=0.0)
        assert m.cosine == pytest.approx(float(cosine), abs=ORDER)
        assert m.rel_l2 == pytest.approx(float((c - r).norm() / r.norm()), rel=ORDER)


@SETTINGS
@given(cases())
def test_a_tensor_does_not_differ_from_itself(case: Case) -> None:
    """Errors are exactly zero, cosine exactly one, bits equal; NaN is counted all the same."""
    m = run(case, cand=case.ref)
    assert m.bit_equal
    assert m.ref_nonfinite == m.cand_nonfinite
    if m.compared:
        assert (m.mse, m.max_abs, m.mean_abs, m.rel_l2, m.row_rel_l2, m.cosine) == (0, 0, 0, 0, 0, 1)
    else:
        assert (m.mse, m.max_abs, m.mean_abs, m.rel_l2, m.row_rel_l2, m.cosine) == (None,) * 6


@SETTINGS
@given(wide, st.integers(-20, 20))
def test_scaling_both_scales_what_has_units(case: Case, power: int) -> None:
    """By a power of two, which is exact."""
    s = 2.0**power
    m, scaled = run(case), run(case, ref=case.ref * s, cand=case.cand * s)
    if m.compared:
        assert m.mse is not None
        assert m.max_abs is not None
        assert (scaled.mse, scaled.max_abs) == (m.mse * s * s, m.max_abs * s)
    assert (scaled.rel_l2, scaled.row_rel_l2, scaled.cosine) == (m.rel_l2, m.row_rel_l2, m.cosine)


@SETTINGS
@given(wide, st.floats(0.1, 10.0))
def test_cosine_ignores_the_scale_of_one_side(case: Case, scale: float) -> None:
    """And its sign turns with that of the scale."""
    m, grown, turned = run(case), run(case, cand=case.cand * scale), run(case, cand=-case.cand)
    if m.cosine is not None and m.ref_norm:
        assert grown.cosine == pytest.approx(m.cosine, abs=ORDER)
        assert turned.cosine == pytest.approx(-m.cosine, abs=ORDER)


@SETTINGS
@given(cases(), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_token_profile(case: Case, random: Any) -> None:
    """And changes no other figure."""
    order = list(range(case.size("token")))
    random.shuffle(order)
    mask = None if case.mask is None else case.mask[:, order]
    m = run(case)
    if "token" in case.axes:
        axis = case.axes.index("token")
        index = torch.tensor(order)
        ref, cand = (
            t.view(torch.uint8 if t.element_size() == 1 else t.dtype).index_select(axis, index).view(t.dtype)
            for t in (case.ref.contiguous(), case.cand.contiguous())
        )
        other = run(case, ref=ref, cand=cand, mask=mask)
        np.testing.assert_allclose(other.token, m.token[:, order], rtol=ORDER, atol=0)
        if m.mse is not None:
            assert other.mse == pytest.approx(m.mse, rel=ORDER)
        assert (other.max_abs, other.ref_nonfinite) == (m.max_abs, m.ref_nonfinite)


@SETTINGS
@given(cases())
def test_figures_hang_together(case: Case) -> None:
    """The mse is the squared error norm over n; mean <= rms <= max; cosine stays within [-1, 1]."""
    m = run(case)
    assert m.elements >= m.compared >= m.elements - m.ref_nonfinite - m.cand_nonfinite
    if m.mse is None or m.error_norm is None or m.mean_abs is None or m.max_abs is None:
        assert m.compared == 0
        return
    assert m.mse == pytest.approx(m.error_norm**2 / m.compared, rel=ORDER)
    assert m.mean_abs <= math.sqrt(m.mse) * (1 + ORDER)
    assert math.sqrt(m.mse) <= m.max_abs * (1 + ORDER)
    assert m.cosine is not None
    assert -1 <= m.cosine <= 1
    assert np.nansum(m.sums.channel.err2) == pytest.approx(m.error_norm**2, rel=ORDER)


@SETTINGS
@given(wide, st.integers(0, 2**32))
def test_error_norms_obey_the_triangle_inequality(case: Case, seed: int) -> None:
    """The way over a third tensor is not shorter."""
    third = case.ref + torch.randn(case.ref.shape, generator=torch.Generator().manual_seed(seed))
    direct, first, second = run(case), run(case, cand=third), run(case, ref=third)
    if direct.error_norm is not None and first.error_norm is not None and second.error_norm is not None:
        assert direct.error_norm <= (first.error_norm + second.error_norm) * (1 + ORDER)


@SETTINGS
@given(cases())
def test_padding_counts_for_nothing_else(case: Case) -> None:
    """Whatever stands at padded tokens, only `padded_max_abs` and `bit_equal` may know."""
    if case.mask is None or not {"batch", "token"} <= set(case.axes):
        return
    order = [case.axes.index(name) for name in case.axes]
    shape = [case.ref.shape[i] if case.axes[i] in ("batch", "token") else 1 for i in order]
    mask = case.mask if case.axes.index("batch") < case.axes.index("token") else case.mask.t()
    padded = ~mask.reshape(shape)
    junk = torch.full_like(case.cand.double(), 7e3)
    cand = torch.where(padded, junk, case.cand.double())
    m, other = run(case, cand=case.cand.double()), run(case, cand=cand)
    assert_same(
        dataclasses.replace(m, padded_max_abs=None, bit_equal=False),
        dataclasses.replace(other, padded_max_abs=None, bit_equal=False),
    )
