"""Hypothesis strategies that tests share: pairs of tensors of every kind that may be compared, and
layouts that a candidate may bring."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st

from divergence.sites import HEAD_AXES

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
DTYPES = (*FLOATS, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)

SETTINGS = settings(deadline=None, max_examples=60)
"""The first use of an operator may take a second, so no example has a deadline."""


@dataclass(frozen=True)
class Case:
    """Arguments of a comparison."""

    ref: torch.Tensor
    cand: torch.Tensor
    axes: tuple[str, ...]
    mask: torch.Tensor | None

    def size(self, axis: str) -> int:
        """Size of a named axis, 1 if there is none."""
        return self.ref.shape[self.axes.index(axis)] if axis in self.axes else 1


@st.composite
def cases(draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = DTYPES, nonfinite: bool = True) -> Case:
    """Pairs of tensors of one shape: dtypes mixed, any strides, with masks and non-finite values."""
    axes = tuple(draw(st.permutations(HEAD_AXES)))[: draw(st.integers(0, 4))]
    shape = tuple(draw(st.integers(1, 6)) for _ in axes)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=seed, dtype=torch.float64) * draw(st.sampled_from((1e-6, 1.0, 1e3)))
    noise = torch.randn(shape, generator=seed, dtype=torch.float64) * draw(st.sampled_from((0.0, 1e-3, 1.0)))
    pair = []
    for side in (values, values * (1 + noise)):
        tensor = side.clone()
        if nonfinite and draw(st.booleans()):
            spots = torch.rand(shape, generator=seed) < draw(st.sampled_from((0.05, 0.3, 1.0)))
            tensor[spots] = draw(st.sampled_from((math.nan, math.inf, -math.inf)))
        dtype = draw(st.sampled_from(dtypes))
        if not dtype.is_floating_point:
            tensor = tensor.nan_to_num(0.0, 1.0, -1.0).clamp(-100, 100)
        pair.append(draw(strided(tensor.to(dtype))))
    mask = None
    if draw(st.booleans()):
        sizes = [shape[axes.index(name)] if name in axes else 1 for name in ("batch", "token")]
        mask = torch.rand(sizes, generator=seed) < draw(st.sampled_from((0.0, 0.5, 0.9, 1.0)))
    return Case(pair[0], pair[1], axes, mask)


@st.composite
def strided(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """The same values in another memory layout: permuted, with gaps, or an offset."""
    order = draw(st.permutations(range(tensor.dim())))
    memory = tensor.permute(order).contiguous()
    if memory.dim() and draw(st.booleans()):
        wide = torch.zeros(*memory.shape[:-1], 2 * memory.shape[-1] + 1, dtype=memory.dtype)
        wide[..., 1::2] = memory
        memory = wide[..., 1::2]
    back = sorted(range(len(order)), key=order.__getitem__)
    return memory.permute(back)


@st.composite
def distinct_sizes(draw: st.DrawFn, count: int, *, least: int = 2) -> tuple[int, ...]:
    """Axis sizes none of which is another or the product of two, so that sizes tell axes apart."""
    size = st.integers(least, 13)
    sizes = st.lists(size, min_size=count, max_size=count, unique=True)
    return tuple(draw(sizes.filter(_tell_apart)))


def _tell_apart(sizes: list[int]) -> bool:
    return all(a % b for a, b in itertools.permutations(sizes, 2))
