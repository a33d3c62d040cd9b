"""What the compiled kernel could get wrong and small tensors do not show: rows of several segments, pairs
of rows, every bit pattern of the narrow dtypes, threads, and numba's cache."""

from __future__ import annotations

import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from divergence.comparison import compare_tensors, cpu, kernel, loops, unlike
from divergence.comparison.cpu import compare
from divergence.comparison.metrics import Metrics, reference_metrics
from divergence.errors import AlignmentError
from tests.comparison.patterns import BYTES, INTEGERS, reads_every_byte, reads_extremes
from tests.comparison.test_properties import ORDER, assert_same
from tests.strategies import DTYPES, SETTINGS, Case, cases


def noisy(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(shape, generator=generator)
    return ref, ref + 1e-3 * torch.randn(shape, generator=generator)


def assert_same_bits(one: Metrics, other: Metrics) -> None:
    for field in dataclasses.fields(Metrics):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "sums":
            for axis, name in itertools.product(
                ("token", "head", "channel"), ("count", "err2", "ref2", "dot")
            ):
                np.testing.assert_array_equal(
                    getattr(getattr(a, axis), name), getattr(getattr(b, axis), name)
                )
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, field.name


@pytest.mark.parametrize("pair", list(itertools.product(DTYPES, repeat=2)), ids=lambda p: f"{p[0]}-{p[1]}")
def test_every_pair_of_dtypes_on_rows_of_several_segments(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """An odd number of rows, a masked one between pairs, and a last segment that is not whole."""
    ref, cand = ((3 * t).to(dtype) for t, dtype in zip(noisy(2, 5, 2 * loops.SEGMENT + 7), pair, strict=True))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 1] = False
    assert_same(compare(ref, cand, mask=mask), reference_metrics(ref, cand, mask=mask))


@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 3, 4, 15), (90,), (30, 1)])
@pytest.mark.parametrize("piece", [1, 7, 60])
def test_non_finite_values_of_the_reference_in_pieces(
    shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlike, "PIECE", piece)
    ref, cand = noisy(*shape)
    for flat, steps in ((ref.view(-1), (5, 6, 7)), (cand.view(-1), (3, 10, 4))):
        for value, step in zip((math.nan, math.inf, -math.inf), steps, strict=True):
            flat[::step] = value
    mask = None
    if len(shape) > 2:
        mask = torch.ones(shape[0], shape[-2], dtype=torch.bool)
        mask[1, 1] = False
    found = compare(ref, cand, mask=mask)
    assert found.unlike_inf > 0 < found.unlike_nan
    assert_same(found, reference_metrics(ref, cand, mask=mask))


@pytest.mark.parametrize("shape", [(1, 3, 5000), (2, 3, 4, 1500), (9000,), (3000, 1)])
@pytest.mark.parametrize("entries", [3, 700, 1 << 18])
@pytest.mark.parametrize("box", [999, 4096, 1 << 20])
def test_segments_boxes_and_pooling(shape: tuple[int, ...], entries: int, box: int) -> None:
    """With NaN and infinities in either row of a pair, on either side, and in the last place."""
    ref, cand = noisy(*shape)
    for n, at in enumerate((0, 1100, 1499, 2999, ref.numel() - 1)):
        (ref, cand)[n % 2].view(-1)[at] = (math.nan, math.inf, -math.inf)[n % 3]
    fast = compare(ref, cand, box=box, entries=entries)
    truth = reference_metrics(ref, cand, entries=entries)
    assert_same(fast, truth)
    assert fast.max_abs_at == truth.max_abs_at


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_every_bit_pattern_of_two_bytes(dtype: torch.dtype, wide: torch.dtype) -> None:
    """Subnormals, zeros of both signs, infinities and every NaN, read as torch reads them."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    m = compare_tensors(values, values.to(wide))
    assert m.max_abs == 0
    assert m.ref_nonfinite == m.cand_nonfinite == int((~values.isfinite()).sum())
    assert (m.ref_min, m.ref_max) == (torch.finfo(dtype).min, torch.finfo(dtype).max)
    assert compare_tensors(values, values.clone()).bit_equal


@pytest.mark.parametrize("dtype", BYTES)
def test_every_bit_pattern_of_one_byte(dtype: torch.dtype) -> None:
    """As torch reads them."""
    reads_every_byte(compare_tensors, dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_extremes_of_integers(dtype: torch.dtype) -> None:
    """As float64 holds them."""
    reads_extremes(compare_tensors, dtype)


def test_a_pair_beyond_float32_is_compared_in_float64() -> None:
    """2^24 + 1 is not 2^24."""
    m = compare_tensors(torch.tensor([(1 << 24) + 1], dtype=torch.int32), torch.tensor([2.0**24]))
    assert m.max_abs == 1


def test_a_tensor_that_torch_negates_while_reading() -> None:
    """Has other bits in memory than values."""
    values = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    assert values.is_neg()
    assert compare_tensors(values, -torch.ones(3)).max_abs == 0


def test_a_dtype_without_values_is_refused() -> None:
    """Two values in a byte, which torch itself cannot convert."""
    values = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(AlignmentError, match="float4_e2m1fn_x2; convert"):
        compare_tensors(values, values)


@pytest.mark.parametrize("shape", [(1, 700, 1100), (2, 3, 300, 500), (900000,)])
def test_threads_change_no_bit(shape: tuple[int, ...]) -> None:
    """Boxes are added up in their order, whoever went over them."""
    ref, cand = noisy(*shape)
    one = compare(ref, cand, box=1 << 14, threads=1)
    for threads in (2, 3, 7):
        assert_same_bits(compare(ref, cand, box=1 << 14, threads=threads), one)


def test_boxes_change_rounding_only() -> None:
    """To a relative 1e-12, as the definitions."""
    ref, cand = noisy(1, 700, 1100)
    truth = reference_metrics(ref, cand)
    for box in (1 << 10, 1 << 14, 1 << 17, 1 << 20):
        other = compare(ref, cand, box=box)
        assert_same(other, truth)
        assert other.mse == pytest.approx(truth.mse, rel=ORDER)


def test_larger_tensors_have_larger_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    ref, cand = noisy(1, 300, 64)
    monkeypatch.setattr(cpu, "BOX", 1 << 10)
    monkeypatch.setattr(cpu, "LARGE_BOX", 1 << 12)
    assert_same_bits(compare(ref, cand), compare(ref, cand, box=1 << 10))
    monkeypatch.setattr(cpu, "MANY", ref.numel() - 1)
    assert_same_bits(compare(ref, cand), compare(ref, cand, box=1 << 12))


@pytest.mark.parametrize("under_way", [1, 1 << 12, 1 << 30])
def test_how_many_boxes_are_under_way_changes_no_bit(monkeypatch: pytest.MonkeyPatch, under_way: int) -> None:
    ref, cand = noisy(2, 3, 300, 64)
    one = compare(ref, cand, box=1 << 10, threads=1)
    monkeypatch.setattr(cpu, "UNDER_WAY", under_way)
    assert_same_bits(compare(ref, cand, box=1 << 10, threads=3), one)


def test_several_threads_may_compare_at_once() -> None:
    """Calls share nothing."""
    pairs = [noisy(1, 64, 1500, seed=seed) for seed in range(8)]
    alone = [compare_tensors(*pair) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: compare(*pair, box=1 << 12, threads=2), pairs * 4))
    for n, m in enumerate(together):
        assert_same(m, alone[n % 8])


def test_of_several_largest_differences_the_first_counts() -> None:
    """In canonical order, whatever the order in which memory was gone through."""
    ref = torch.zeros(2, 3, 4, 5)
    cand = ref.clone()
    cand[1, 0, 0, 0] = cand[0, 2, 3, 4] = cand[0, 2, 3, 1] = -2.0
    assert compare_tensors(ref, cand).max_abs_at == (0, 2, 3, 1)
    assert compare_tensors(ref, ref.clone()).max_abs_at == (0, 0, 0, 0)
    ref[0, 0, 0, :3] = math.nan
    assert compare_tensors(ref, ref.clone()).max_abs_at == (0, 0, 0, 3)


@SETTINGS
@given(cases(), st.floats(0, 100))
def test_a_percentile_is_an_upper_bound_within_a_factor_of_two(case: Case, percent: float) -> None:
    """Of the exact one, by sorting."""
    m = compare_tensors(case.ref, case.cand, axes=case.axes)
    r, c = case.ref.double().flatten(), case.cand.double().flatten()
    errors = (c - r).abs()[r.isfinite() & c.isfinite()].sort().values
    found = m.error_percentile(percent)
    assert int(m.error_exponents.sum()) == errors.numel() == m.compared
    if found is None:
        assert errors.numel() == 0
        return
    exact = float(errors[max(1, math.ceil(percent / 100 * errors.numel())) - 1])
    assert exact <= found <= 2 * exact
    assert m.error_percentile(100) == m.max_abs


def test_percentiles_at_the_ends_of_float64() -> None:
    """Overflow is infinite, and what is smaller than 2^-1022 counts as zero."""
    huge = torch.tensor([1.7e308, 0.0, 5e-324], dtype=torch.float64)
    m = compare_tensors(huge, torch.tensor([-1.7e308, 0.0, 0.0], dtype=torch.float64))
    assert (m.error_percentile(50), m.error_percentile(100)) == (0.0, math.inf)


@pytest.mark.parametrize("percent", [-1, 100.5, math.nan])
def test_a_percentile_outside_of_0_to_100_is_an_error(percent: float) -> None:
    """Rather than the nearest."""
    with pytest.raises(ValueError, match="0 to 100"):
        compare_tensors(torch.ones(2), torch.ones(2)).error_percentile(percent)


def test_where_no_cache_can_be_written_the_kernel_compiles_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read-only package and no home: numba then refuses to make a caching function."""
    from numba.core.caching import CacheImpl, NullCache

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert isinstance(kernel._cached("source")._cache, NullCache)


def test_the_cache_notices_a_change_of_the_loops() -> None:
    """Which stand in another file than the function that is cached."""
    one, other = (kernel._cached(source) for source in ("one", "other"))
    assert one._cache._index_key((), one.targetctx.codegen()) != other._cache._index_key(
        (), other.targetctx.codegen()
    )
