"""Number formats of few bits, read from the values that a candidate shows.

A range that was fixed beforehand, by calibration or by hand, is not that of the tensor at hand: its step
cannot be worked out from the reference. What went through such a format shows it: its values are multiples of
one step, or those of an 8-bit float.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_STEPS = 255  # from zero: 8 bits with any zero point
_CHANCE = 1e-5  # that values which are on no grid look like one
_NEAR = 1e-3  # of a step
_TELLING = 0.25  # of a step: where rounding to the tensor's type may be more, a value tells nothing
_ROUNDED = 0.75  # of the type's eps, which is twice what rounding to nearest does
_DIVISORS = range(1, 33)
_BINADES = 16


@dataclass(frozen=True)
class Grid:
    """The values that a tensor takes.

    Attributes:
        step: of integers, or the scale of floats; one for each group, with axes of length one.
        low, high: the least and the largest value of each group.
        rounded: brings a tensor in units of `step` to the values of the format.
    """

    step: Tensor
    low: Tensor
    high: Tensor
    rounded: Callable[[Tensor], Tensor]

    def of(self, tensor: Tensor) -> Tensor:
        """What the format makes of `tensor`, values beyond its range cut off."""
        step = self.step.to(tensor.device)
        kept = tensor.double().clamp(self.low.to(tensor.device), self.high.to(tensor.device))
        return (self.rounded(kept / step) * step).to(tensor.dtype)

    @property
    def levels(self) -> int:
        """How many steps the largest value has, in magnitude."""
        return round(float((torch.maximum(self.high.abs(), self.low.abs()) / self.step).max()))

    def beyond(self, tensor: Tensor) -> float:
        """Share of the values of `tensor` that lie more than a step beyond the range."""
        step, low, high = (t.to(tensor.device) for t in (self.step, self.low, self.high))
        wide = tensor.double()
        return float(((wide > high + step) | (wide < low - step)).double().mean())


def integers(tensor: Tensor, axes: tuple[int, ...]) -> Grid | None:
    """The grid of whole multiples of a step that the values along `axes` share, `_MOST_STEPS` of them from
    zero at most; None where there is none."""
    return _grid(tensor, axes, lambda row: _step(row, _rounding(tensor)), torch.round)


def floats(tensor: Tensor, axes: tuple[int, ...], dtype: torch.dtype) -> Grid | None:
    """As `integers`, of an 8-bit float of type `dtype` times a scale. Of scales that differ by a power of two
    and give the same values, it is the largest."""
    largest = torch.finfo(dtype).max

    def rounded(units: Tensor) -> Tensor:
        return units.clamp(-largest, largest).to(dtype).to(torch.float64)

    return _grid(tensor, axes, lambda row: _scale(row, dtype, _rounding(tensor)), rounded)


def _grid(
    tensor: Tensor,
    axes: tuple[int, ...],
    read: Callable[[Tensor], float | None],
    rounded: Callable[[Tensor], Tensor],
) -> Grid | None:
    """The grid of groups that all have one; a group of nothing but zeros takes any."""
    rows = _grouped(tensor, axes)
    steps: list[float] = []
    for row in rows:
        step = read(row) if bool(row.any()) else math.nan
        if step is None:
            return None  # most tensors are on no grid, and their first group says so
        steps.append(step)
    made = torch.tensor(steps, dtype=torch.float64)
    if bool(made.isnan().all()):
        return None
    shape = [1 if axis in axes else n for axis, n in enumerate(tensor.shape)]
    made = made.nan_to_num(float(made.nanmedian()))
    return Grid(made.view(shape), rows.amin(1).view(shape), rows.amax(1).view(shape), rounded)


def _grouped(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The values along `axes` as rows, float64 on the CPU."""
    kept = [axis for axis in range(tensor.dim()) if axis not in axes]
    wide = tensor.detach().to("cpu", torch.float64).permute(*kept, *axes)
    return wide.reshape(math.prod(tensor.shape[axis] for axis in kept), -1)


def _rounding(tensor: Tensor) -> float:
    """How far off a value may be, relative to itself: it was rounded to the tensor's type."""
    return _ROUNDED * torch.finfo(tensor.dtype).eps


def _sizes(row: Tensor) -> Tensor:
    """The magnitudes that occur but for zero, smallest first; none where a value is not finite."""
    sizes: Tensor = row.abs().unique()
    return sizes[sizes > 0] if bool(sizes.isfinite().all()) else sizes[:0]


def _step(row: Tensor, rounding: float) -> float | None:
    """The step of which all values are multiples."""
    sizes = _sizes(row)
    if not 0 < len(sizes) <= 2 * _MOST_STEPS:
        return None
    for divisor in _DIVISORS:  # the smallest value is one step, or a few
        step = float(sizes[0]) / divisor
        for limit in (8, 32, 128, _MOST_STEPS):  # what more and larger values tell better
            part = sizes[sizes <= max((limit + 0.5) * step, float(sizes[0]))]
            counts = (part / step).round()
            step = float((part * counts).sum() / counts.square().sum())
        counts = (sizes / step).round()
        allowed = _NEAR + rounding * counts
        telling = allowed < _TELLING
        if float(counts.max()) > _MOST_STEPS or float((2 * allowed[telling][1:]).prod()) > _CHANCE:
            continue
        if bool(((sizes / step - counts).abs() <= allowed)[telling].all()):
            return step
    return None


def _scale(row: Tensor, dtype: torch.dtype, rounding: float) -> float | None:
    """The scale with which all values are those of an 8-bit float."""
    sizes = _sizes(row)
    information = torch.finfo(dtype)
    allowed = rounding + _NEAR * information.eps
    if not 0 < len(sizes) <= _MOST_STEPS or (4 * allowed / information.eps) ** (len(sizes) - 1) > _CHANCE:
        return None
    # The largest value is 1, 1 + eps, 1 + 2 eps, ... times a power of two and the scale.
    top = 2.0 ** math.floor(math.log2(information.max))
    for mantissa in range(round(1 / information.eps)):
        finest = float(sizes[-1]) / (top * (1 + mantissa * information.eps))
        for binade in reversed(range(_BINADES)):
            scale = finest * 2.0**binade
            units = sizes / scale
            cast = units.clamp(max=information.max).to(dtype).to(torch.float64)
            if bool(((units - cast).abs() <= allowed * units).all()):
                return scale
    return None
