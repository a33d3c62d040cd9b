"""The metrics: what each figure means, and an implementation that is plainly right.

With r the reference, c the candidate, over the n elements that are compared (those at valid
tokens where both are finite), all in float64:

    mse         sum (c - r)^2 / n                            torch.nn.functional.mse_loss
    max_abs     max |c - r|
    mean_abs    sum |c - r| / n                              torch.nn.functional.l1_loss
    error_norm  ||c - r|| = sqrt(sum (c - r)^2)
    rel_l2      ||c - r|| / ||r||                            Higham, Accuracy and Stability of
                                                             Numerical Algorithms, 2nd ed., 6.1
    row_rel_l2  median over tokens of ||c_t - r_t|| / ||r_t||
    cosine      <r, c> / (||r|| ||c||)                       torch.nn.functional.cosine_similarity

Where a norm is zero: 0/0 is a relative error of 0 and a cosine of 1 (both tensors are zero), a
nonzero error over a zero norm is infinite, and the cosine of one zero tensor is 0. Cosine is cut
to [-1, 1], which undoes rounding only (Cauchy-Schwarz). Squares of float64 values beyond 1e154
overflow: norms and relative errors are then inf and the cosine is None, never a good figure.

Non-finite values are counted first. A position where either side is not finite enters no other
figure; equal infinities are counted on both sides. Where the reference is not finite, the candidate should
be the same: an Inf of the same sign, or NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from divergence.comparison.views import operands
from divergence.result import Profile

if TYPE_CHECKING:
    import torch

    from divergence.comparison.views import Form, Values

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Counts = np.ndarray[Any, np.dtype[np.int64]]

PROFILE_ENTRIES = 1 << 18
"""Most entries that the sums over one axis keep (64 MiB would hold 32 times as many). A longer
axis is pooled: flattened, each `ceil(length / PROFILE_ENTRIES)` consecutive members make one."""

EXPONENTS = 2048
"""Of float64: entries of the histogram of errors."""

BINS = 64
"""Most entries of a binned profile."""


@dataclass(frozen=True, eq=False)
class AxisSums:
    """Sums over all that shares a token, a head or a channel; float64 arrays of one shape.

    Attributes:
        count: elements compared.
        err2: sum of (c - r)^2.
        ref2: sum of r^2.
        cand2: sum of c^2.
        dot: sum of r * c. The best gain from reference to candidate is `dot / ref2`.
    """

    count: Floats
    err2: Floats
    ref2: Floats
    cand2: Floats
    dot: Floats

    def rel_l2(self) -> Floats:
        """Relative L2 error of each entry; NaN where nothing was compared."""
        return relative(self.err2, self.ref2, self.count)

    def cosine(self) -> Floats:
        """Cosine of each entry; NaN where nothing was compared or squares overflowed."""
        return cosines(self.dot, self.ref2, self.cand2, self.count)


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums behind the profiles; see `PROFILE_ENTRIES` for axes that are longer than that.

    Attributes:
        token: `[batch, token]`; pooled, `[1, entries]`.
        head: `[head]`; empty without a head axis.
        channel: `[channel]`, or `[head, channel]` with a head axis; pooled, `[entries]`.
    """

    token: AxisSums
    head: AxisSums
    channel: AxisSums


@dataclass(frozen=True, eq=False)
class Metrics:
    """How a candidate tensor differs from its reference. Figures are None where they do not exist.

    Attributes:
        elements: elements at valid tokens.
        compared: of these, the ones that are finite on both sides.
        bit_equal: same dtype and same bits everywhere, padding included: -0.0 is not 0.0, and a
            NaN equals a NaN of the same bits.
        mse: in squared units of the tensor.
        max_abs, mean_abs: in units of the tensor.
        max_abs_at: index of the largest difference; of several, the first in canonical order.
        rel_l2, row_rel_l2, cosine: see the head of this module. A token is all that shares
            (batch, token): heads and channels are pooled.
        ref_min, ref_max, cand_min, cand_max: ranges of the finite values at valid tokens.
        ref_nonfinite, cand_nonfinite: numbers of NaN and Inf at valid tokens.
        ref_norm, error_norm: L2 norms over the elements compared.
        padded_max_abs: largest difference of finite values at padded tokens; None if there are none.
        token, head, channel: relative L2 errors, shaped as in `Sums`; NaN where nothing was compared.
        sums: what they were computed from.
        unlike_inf, unlike_nan: numbers of Inf, and of NaN, in the reference at valid tokens where the
            candidate is something else.
        error_exponents: histogram of |c - r| over the elements compared, `[2048]`: entry k counts
            2^(k - 1023) <= |c - r| < 2^(k - 1022), the exponents of float64. Entry 0 counts what is
            smaller than 2^-1022, zeros included, and entry 2047 what overflowed.
    """

    elements: int
    compared: int
    bit_equal: bool
    mse: float | None
    max_abs: float | None
    max_abs_at: tuple[int, ...] | None
    mean_abs: float | None
    rel_l2: float | None
    row_rel_l2: float | None
    cosine: float | None
    ref_min: float | None
    ref_max: float | None
    cand_min: float | None
    cand_max: float | None
    ref_nonfinite: int
    cand_nonfinite: int
    ref_norm: float | None
    error_norm: float | None
    padded_max_abs: float | None
    token: Floats = field(repr=False)
    head: Floats = field(repr=False)
    channel: Floats = field(repr=False)
    sums: Sums = field(repr=False)
    error_exponents: Counts = field(repr=False)
    unlike_inf: int = 0
    unlike_nan: int = 0

    def error_percentile(self, percent: float) -> float | None:
        """What `percent` of the elements compared are not off by more than.

        From a histogram of powers of two: an upper bound of the exact percentile (that of rank
        `ceil(percent / 100 * compared)`) and at most twice as large; 0 where that is below 2^-1022.

        Args:
            percent: from 0 to 100.

        Returns:
            |c - r| in units of the tensor, `max_abs` at most; None where nothing was compared.

        Raises:
            ValueError: `percent` is not from 0 to 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"a percentile of {percent}: give 0 to 100")
        if self.max_abs is None:
            return None
        rank = max(1, math.ceil(percent / 100 * self.compared))
        entry = int(np.searchsorted(np.cumsum(self.error_exponents), rank))
        # The top entry ends beyond float64; the largest error bounds it.
        bound = 2.0 ** (entry - 1022) if entry < EXPONENTS - 2 else math.inf
        return min(bound, self.max_abs) if entry else 0.0

    def profile(self, bins: int = BINS) -> Profile:
        """Where the error sits, in at most `bins` entries an axis: tokens pooled over the batch,
        channels over the heads."""
        token, head, channel = self.sums.token, self.sums.head, self.sums.channel
        per_channel = [channel.err2, channel.ref2, channel.count]
        if channel.err2.ndim == 2:
            per_channel = [a.sum(0) for a in per_channel]
        return Profile(
            token=binned(token.err2.sum(0), token.ref2.sum(0), token.count.sum(0), bins),
            head=binned(head.err2, head.ref2, head.count, bins),
            channel=binned(per_channel[0], per_channel[1], per_channel[2], bins),
        )


@dataclass(frozen=True)
class Scan:
    """What one pass over both tensors finds beside the sums; the input of `assemble`.

    Attributes:
        elements, ref_nonfinite, cand_nonfinite: counts at valid tokens.
        bit_equal: see `Metrics`.
        abs_sum: sum of |c - r| over the elements compared.
        max_abs: largest |c - r| and its index, or None where nothing was compared.
        ref_range, cand_range: (min, max) of finite values, or None where there are none.
        padded_max_abs, error_exponents: see `Metrics`.
    """

    elements: int
    ref_nonfinite: int
    cand_nonfinite: int
    bit_equal: bool
    abs_sum: float
    max_abs: tuple[float, tuple[int, ...]] | None
    ref_range: tuple[float, float] | None
    cand_range: tuple[float, float] | None
    padded_max_abs: float | None
    error_exponents: Counts


def relative(err2: Floats, ref2: Floats, count: Floats) -> Floats:
    """`sqrt(err2 / ref2)` entry by entry: 0/0 is 0, and NaN where `count` is 0."""
    with np.errstate(all="ignore"):
        result = np.sqrt(err2) / np.sqrt(ref2)
    result = np.where(err2 == 0, 0.0, np.where(np.isinf(err2), np.inf, result))
    return np.where(count == 0, np.nan, result)


def cosines(dot: Floats, ref2: Floats, cand2: Floats, count: Floats) -> Floats:
    """`dot / sqrt(ref2 * cand2)` entry by entry, in [-1, 1]: 1 where both are zero, 0 where one
    is, and NaN where `count` is 0 or squares overflowed."""
    with np.errstate(all="ignore"):
        product = ref2 * cand2
        # The root of the product is exact for equal tensors; the product of roots never overflows.
        inside = (product > 0) & np.isfinite(product)
        scale = np.where(inside, np.sqrt(product), np.sqrt(ref2) * np.sqrt(cand2))
        result = np.clip(dot / scale, -1.0, 1.0)
    zeros = (ref2 == 0).astype(int) + (cand2 == 0)
    result = np.where(zeros == 2, 1.0, np.where(zeros == 1, 0.0, result))
    return np.where((count == 0) | ~np.isfinite(ref2 + cand2), np.nan, result)


def binned(err2: Floats, ref2: Floats, count: Floats, bins: int = BINS) -> tuple[float, ...]:
    """Relative L2 errors of at most `bins` runs of consecutive entries, as equal in length as can be.

    Args:
        err2, ref2, count: sums along one axis, `[entries]` (see `AxisSums`).
        bins: most entries of the result.

    Returns:
        For each run the relative L2 error over its members; NaN where it has none.
    """
    if err2.size == 0:
        return ()
    runs = min(bins, err2.size)
    starts = np.arange(runs) * err2.size // runs
    err, ref, n = (np.add.reduceat(a, starts) for a in (err2, ref2, count))
    return tuple(float(x) for x in relative(err, ref, n))


def assemble(scan: Scan, sums: Sums) -> Metrics:
    """The metrics that follow from what a pass over both tensors found.

    Totals are taken from the token sums in their order, so that they depend on the order of
    addition within a token only.
    """
    token = sums.token
    n, err2, ref2, cand2, dot = (
        float(np.sum(a)) for a in (token.count, token.err2, token.ref2, token.cand2, token.dot)
    )
    total = AxisSums(*(np.array([x]) for x in (n, err2, ref2, cand2, dot)))
    rows = token.rel_l2()
    some = n > 0
    cosine = float(total.cosine()[0])
    return Metrics(
        elements=scan.elements,
        compared=int(n),
        bit_equal=scan.bit_equal,
        mse=err2 / n if some else None,
        max_abs=scan.max_abs[0] if scan.max_abs else None,
        max_abs_at=scan.max_abs[1] if scan.max_abs else None,
        mean_abs=scan.abs_sum / n if some else None,
        rel_l2=float(total.rel_l2()[0]) if some else None,
        row_rel_l2=float(np.median(rows[token.count > 0])) if some else None,
        cosine=None if math.isnan(cosine) else cosine,
        ref_min=scan.ref_range[0] if scan.ref_range else None,
        ref_max=scan.ref_range[1] if scan.ref_range else None,
        cand_min=scan.cand_range[0] if scan.cand_range else None,
        cand_max=scan.cand_range[1] if scan.cand_range else None,
        ref_nonfinite=scan.ref_nonfinite,
        cand_nonfinite=scan.cand_nonfinite,
        ref_norm=math.sqrt(ref2) if some else None,
        error_norm=math.sqrt(err2) if some else None,
        padded_max_abs=scan.padded_max_abs,
        token=rows,
        head=sums.head.rel_l2(),
        channel=sums.channel.rel_l2(),
        sums=sums,
        error_exponents=scan.error_exponents,
    )


def reference_metrics(
    ref: Values,
    cand: Values,
    *,
    axes: tuple[str, ...] = (),
    mask: Values | None = None,
    entries: int = PROFILE_ENTRIES,
) -> Metrics:
    """The metrics by their definitions, with float64 copies of everything: the truth in tests.

    Args and raises: as `divergence.comparison.compare_tensors`; `entries` as `PROFILE_ENTRIES`.
    """
    given = operands(ref, cand, axes, mask)
    form = given.form
    batch, _, tokens, _ = form.pooled
    r, c = (_float64(form.view(t)).reshape(form.pooled) for t in (given.ref, given.cand))
    here = np.ones((batch, tokens), bool) if given.mask is None else given.mask.numpy()
    valid = np.broadcast_to(here[:, None, :, None], r.shape)
    finite = np.isfinite(r) & np.isfinite(c)
    used = valid & finite
    with np.errstate(all="ignore"):
        diff = np.abs(np.where(finite, c, 0.0) - np.where(finite, r, 0.0))
        terms = (np.ones_like(r), diff**2, r**2, c**2, r * c)
        summed = [np.where(used, x, 0.0) for x in terms]
    worst = None
    if used.any():
        at = np.unravel_index(int(np.argmax(np.where(used, diff, -1.0))), r.shape)
        worst = (float(diff[at]), form.index(*(int(i) for i in at)))
    padded = diff[finite & ~valid]
    scan = Scan(
        elements=int(valid.sum()),
        ref_nonfinite=int((valid & ~np.isfinite(r)).sum()),
        cand_nonfinite=int((valid & ~np.isfinite(c)).sum()),
        bit_equal=given.ref.dtype == given.cand.dtype and _bytes(given.ref) == _bytes(given.cand),
        abs_sum=float(diff[used].sum()),
        max_abs=worst,
        ref_range=_range(r[valid & np.isfinite(r)]),
        cand_range=_range(c[valid & np.isfinite(c)]),
        padded_max_abs=float(padded.max()) if padded.size else None,
        error_exponents=np.bincount(diff[used].view(np.int64) >> 52, minlength=EXPONENTS),
    )
    kept = ([x.sum(over) for x in summed] for over in ((1, 3), (0, 2, 3), (0, 2)))
    return replace(
        assemble(scan, arrange(form, *(_pooled(x, entries) for x in kept))),
        unlike_inf=int((valid & np.isinf(r) & (r != c)).sum()),
        unlike_nan=int((valid & np.isnan(r) & ~np.isnan(c)).sum()),
    )


def arrange(form: Form, token: Floats, head: Floats, channel: Floats) -> Sums:
    """Shapes sums over the axes of a tensor of `form`.

    Args:
        form: of the tensor.
        token, head, channel: `[5, entries]`, the fields of `AxisSums` in order over the flattened
            axes, pooled where these are longer than `PROFILE_ENTRIES`.
    """
    batch, heads, tokens, channels = form.pooled
    whole = token.shape[1] == batch * tokens
    token = token.reshape(5, batch, tokens) if whole else token[:, None]
    if form.has_head and channel.shape[1] == heads * channels:
        channel = channel.reshape(5, heads, channels)
    return Sums(AxisSums(*token), AxisSums(*head if form.has_head else head[:, :0]), AxisSums(*channel))


def _float64(tensor: torch.Tensor) -> Floats:
    import torch

    result: Floats = tensor.to("cpu", torch.float64).numpy()
    return result


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    copy = tensor.to("cpu").clone(memory_format=torch.contiguous_format).reshape(-1)
    return copy.view(torch.uint8).numpy().tobytes()


def _pooled(sums: list[Floats], entries: int) -> Floats:
    size = sums[0].size
    starts = np.arange(0, size, math.ceil(size / entries))
    result: Floats = np.add.reduceat(np.stack([x.reshape(-1) for x in sums]), starts, axis=1)
    return result


def _range(values: Floats) -> tuple[float, float] | None:
    return (float(values.min()), float(values.max())) if values.size else None
