"""Number formats read from values: against torch's own quantisers, whose steps are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from divergence.diagnosis import grids

EVERY = (0, 1, 2, 3)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 2, 24, 8)), generator=torch.Generator().manual_seed(seed))


@given(
    step=st.floats(1e-3, 0.3),
    zero=st.integers(-60, 60),
    seed=st.integers(0, 50),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_step_and_range_of_integers_are_read(step: float, zero: int, seed: int, dtype: torch.dtype) -> None:
    tensor = drawn(seed)
    made = torch.fake_quantize_per_tensor_affine(tensor, step, zero, -128, 127)
    grid = grids.integers(made.to(dtype), EVERY)
    assert grid is not None
    assert math.isclose(float(grid.step), step, rel_tol=max(1e-5, torch.finfo(dtype).eps / 2))
    if dtype is torch.float32:
        torch.testing.assert_close(grid.of(tensor), made, atol=1e-5, rtol=1e-4)
    low, high = (-128 - zero) * step, (127 - zero) * step
    lost = ((tensor < low - step) | (tensor > high + step)).double().mean()
    assert grid.beyond(tensor) == pytest.approx(float(lost), abs=0.02)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_a_step_for_every_group_is_read(axis: int) -> None:
    tensor = drawn(1)
    steps = 0.02 * (1 + torch.arange(tensor.shape[axis]))
    zeros = torch.zeros(tensor.shape[axis], dtype=torch.int32)
    made = torch.fake_quantize_per_channel_affine(tensor, steps, zeros, axis, -128, 127)
    grid = grids.integers(made, tuple(a for a in EVERY if a != axis))
    assert grid is not None
    torch.testing.assert_close(grid.step.flatten().float(), steps)
    torch.testing.assert_close(grid.of(tensor), made)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@given(scale=st.floats(1e-4, 0.2), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_the_scale_of_floats_is_read(dtype: torch.dtype, scale: float, seed: int) -> None:
    tensor = drawn(seed)
    largest = torch.finfo(dtype).max
    made = (tensor / scale).clamp(-largest, largest).to(dtype).float() * scale
    grid = grids.floats(made, EVERY, dtype)
    assert grid is not None
    power = math.log2(float(grid.step) / scale)
    assert abs(power - round(power)) < 1e-3
    torch.testing.assert_close(grid.of(tensor), made, rtol=1e-4, atol=float(grid.step) * 2**-16)


@given(seed=st.integers(0, 200), size=st.sampled_from([(2, 2, 24, 8), (1, 1, 4, 4), (1, 4, 64, 16)]))
@settings(max_examples=60, deadline=None)
def test_ordinary_values_are_on_no_grid(seed: int, size: tuple[int, ...]) -> None:
    tensor = drawn(seed, *size)
    for axes in (EVERY, (0, 2, 3), (3,)):
        for held in (tensor, tensor.half(), tensor.bfloat16()):
            assert grids.integers(held, axes) is None
            assert grids.floats(held, axes, torch.float8_e4m3fn) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_on_no_grid(value: float) -> None:
    made = torch.fake_quantize_per_tensor_affine(drawn(0), 0.02, 0, -128, 127)
    made[0, 0, 0, 0] = value
    assert grids.integers(made, EVERY) is None
    assert grids.floats(made, EVERY, torch.float8_e5m2) is None


def test_zeros_are_on_no_grid_and_in_any_group() -> None:
    assert grids.integers(torch.zeros(1, 2, 8, 4), EVERY) is None
    made = torch.fake_quantize_per_tensor_affine(drawn(0), 0.02, 0, -128, 127)
    made[:, 1] = 0.0
    grid = grids.integers(made, (0, 2, 3))
    assert grid is not None
    assert grid.step.shape == (1, 2, 1, 1)
    assert float(grid.step[0, 1]) == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("least", [1, 3, 10, 25])
def test_a_few_values_far_from_zero_tell_their_step(least: int) -> None:
    counts = torch.tensor([least, *range(least + 3, 120, 7)], dtype=torch.float32)
    grid = grids.integers((counts * 0.013)[None, None, None], EVERY)
    assert grid is not None
    assert float(grid.step) == pytest.approx(0.013, rel=1e-5)


def test_more_steps_than_eight_bits_have_are_no_grid() -> None:
    made = torch.fake_quantize_per_tensor_affine(drawn(0, 4, 4, 64, 16), 0.005, 0, -1000, 1000)
    assert grids.integers(made, EVERY) is None
