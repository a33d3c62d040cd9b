"""Comparison on the CPU: one pass over both tensors in boxes, float64 accumulators.

A box is a run of consecutive elements of the canonical form, contiguous in memory or not. What is
held beside the tensors is four float64 planes of one box, the sums of `metrics.PROFILE_ENTRIES`
entries an axis at most, and the results. The size of a box and the number of threads change the
order of addition and nothing else: figures agree to a relative 1e-12.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from divergence.comparison.metrics import PROFILE_ENTRIES, Metrics, Scan, arrange, assemble
from divergence.comparison.views import Form, Operands, operands

if TYPE_CHECKING:
    from divergence.comparison.views import Values

BOX = 1 << 17
"""Elements in a box: four float64 planes of it are 4 MiB, which stays in cache."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compare(
    ref: Values,
    cand: Values,
    *,
    axes: tuple[str, ...] = (),
    mask: Values | None = None,
    box: int = BOX,
    entries: int = PROFILE_ENTRIES,
) -> Metrics:
    """Compares two tensors or arrays in one pass.

    Args and raises: as `divergence.comparison.compare_tensors`; `box` as `BOX`, `entries` as
    `metrics.PROFILE_ENTRIES`.
    """
    given = operands(ref, cand, axes, mask)
    scanner = _Scanner(given, box, entries)
    with torch.no_grad(), _one_thread():
        for part in _boxes(given, box):
            scanner.add(part)
    sums = (s.sums.numpy() for s in (scanner.token, scanner.head, scanner.channel))
    return assemble(scanner.scan(), arrange(given.form, *sums))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for the duration: operators on a box are so short that handing half of each to a
    second thread gains a third on an idle machine, and costs ten times as much on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Box:
    """Part of both tensors `[batch, head, token, channel]`, and where it starts."""

    ref: torch.Tensor
    cand: torch.Tensor
    start: tuple[int, int, int, int]


class _AxisSums:
    """Sums `[5, entries]` over one flattened axis (the fields of `metrics.AxisSums`), pooled."""

    def __init__(self, size: int, entries: int) -> None:
        self.group = math.ceil(size / entries)
        self.sums = torch.zeros(5, math.ceil(size / self.group), dtype=torch.float64)

    def add(self, start: int, sums: torch.Tensor, count: torch.Tensor) -> None:
        """Adds sums `[4, n]` and counts `[n]` of the members `start` to `start + n`."""
        first, before = divmod(start, self.group)
        last = first + math.ceil((before + sums.shape[1]) / self.group)
        self.sums[1:, first:last] += self._pool(sums, before)
        self.sums[:1, first:last] += self._pool(count[None], before)

    def _pool(self, values: torch.Tensor, before: int) -> torch.Tensor:
        if self.group == 1:
            return values
        after = -(before + values.shape[1]) % self.group
        if before or after:
            values = torch.nn.functional.pad(values, (before, after))
        return values.reshape(values.shape[0], -1, self.group).sum(-1)


class _Scanner:
    """Accumulates boxes."""

    def __init__(self, given: Operands, box: int, entries: int) -> None:
        self.form = given.form
        self.mask = given.mask
        batch, heads, tokens, channels = self.form.pooled
        self.token = _AxisSums(batch * tokens, entries)
        self.head = _AxisSums(heads, entries)
        self.channel = _AxisSums(heads * channels, entries)
        size = min(box, batch * heads * tokens * channels)
        self._planes = torch.empty(4 * size, dtype=torch.float64)
        self._bit_equal = given.ref.dtype == given.cand.dtype
        self._elements = 0
        self._abs_sum = 0.0
        self._nonfinite = [0, 0]
        self._ranges = [(math.inf, -math.inf), (math.inf, -math.inf)]
        self._worst = -1.0
        self._worst_at: tuple[int, ...] = ()
        self._padded = -1.0

    def scan(self) -> Scan:
        """What was found beside the sums."""
        ranges = [r if r[0] <= r[1] else None for r in self._ranges]
        return Scan(
            elements=self._elements,
            ref_nonfinite=self._nonfinite[0],
            cand_nonfinite=self._nonfinite[1],
            bit_equal=self._bit_equal,
            abs_sum=self._abs_sum,
            max_abs=(self._worst, self._worst_at) if self._worst >= 0 else None,
            ref_range=ranges[0],
            cand_range=ranges[1],
            padded_max_abs=self._padded if self._padded >= 0 else None,
        )

    def add(self, box: _Box) -> None:
        """Adds one box."""
        self._bit_equal = self._bit_equal and _same_bits(box.ref, box.cand)
        planes = self._planes[: 4 * box.ref.numel()].view(4, *box.ref.shape)
        _, ref, cand, _ = planes
        ref.copy_(box.ref)
        cand.copy_(box.cand)
        here = self._valid_tokens(box)
        ranges = [_range(box.ref, ref), _range(box.cand, cand)]
        finite = all(math.isfinite(x) for pair in ranges for x in pair)
        if here is None and finite:
            self._widen(ranges)
            self._elements += ref.numel()
            self._sum(box, planes, None)
        elif here is not None and finite:
            self._sum(box, planes, self._select_valid(ref, cand, here))
        else:
            self._sum(box, planes, self._select_finite(ref, cand, here))

    def _valid_tokens(self, box: _Box) -> torch.Tensor | None:
        """Mask `[batch, 1, token, 1]` of the box, or None where all its tokens are valid."""
        if self.mask is None:
            return None
        (batch, _, tokens, _), (first_batch, _, first_token, _) = box.ref.shape, box.start
        here = self.mask[first_batch : first_batch + batch, first_token : first_token + tokens]
        return None if bool(here.all()) else here[:, None, :, None]

    def _select_valid(self, ref: torch.Tensor, cand: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Counts the valid elements of a box that is finite throughout, and tells which they are."""
        valid = here[:, 0, :, 0]
        self._elements += int(valid.sum()) * ref.shape[1] * ref.shape[3]
        if bool(valid.any()):
            low, high = ([fold(p, (1, 3))[valid] for p in (ref, cand)] for fold in (torch.amin, torch.amax))
            self._widen([(float(a.min()), float(b.max())) for a, b in zip(low, high, strict=True)])
        self._padded = max(self._padded, float((cand - ref).abs_().amax((1, 3))[~valid].max()))
        return here.expand_as(ref)

    def _select_finite(
        self, ref: torch.Tensor, cand: torch.Tensor, here: torch.Tensor | None
    ) -> torch.Tensor:
        """Counts what is not finite or not valid, and tells which elements are compared."""
        finite = [plane.abs() < math.inf for plane in (ref, cand)]
        valid = torch.ones_like(finite[0]) if here is None else here.expand_as(ref)
        self._elements += int(valid.sum())
        ranges = []
        for side, (plane, ok) in enumerate(zip((ref, cand), finite, strict=True)):
            inside = valid & ok
            self._nonfinite[side] += int((valid & ~ok).sum())
            low, high = (plane.where(inside, fill) for fill in (math.inf, -math.inf))
            ranges.append((float(low.min()), float(high.max())))
        self._widen(ranges)
        both = finite[0] & finite[1]
        padded = both & ~valid
        if bool(padded.any()):
            self._padded = max(self._padded, float((cand - ref).abs_().where(padded, 0.0).max()))
        return both & valid

    def _widen(self, ranges: list[tuple[float, float]]) -> None:
        self._ranges = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(self._ranges, ranges, strict=True)]

    def _sum(self, box: _Box, planes: torch.Tensor, used: torch.Tensor | None) -> None:
        """Adds the sums of a box.

        Args:
            box: the box.
            planes: `[4, batch, head, token, channel]`; 1 and 2 hold reference and candidate.
            used: which elements are compared, or None for all.
        """
        error, ref, cand, product = planes
        if used is not None:
            ref.masked_fill_(~used, 0.0)
            cand.masked_fill_(~used, 0.0)
        torch.sub(cand, ref, out=error).abs_()
        self._abs_sum += float(error.sum())
        self._find_worst(box, error if used is None else error.masked_fill(~used, -1.0))
        torch.mul(ref, cand, out=product)
        planes[:3].square_()
        self._pool(box, planes, used)

    def _pool(self, box: _Box, planes: torch.Tensor, used: torch.Tensor | None) -> None:
        """Adds the sums over tokens, heads and channels of a box; arguments as of `_sum`."""
        _, batch, heads, tokens, channels = planes.shape
        rows = planes.sum(4)
        columns = planes.sum((1, 3)) if batch * tokens > 1 else planes[:, 0, :, 0]
        if used is None:
            row_count = rows.new_tensor(channels).expand(batch, heads, tokens)
            column_count = rows.new_tensor(batch * tokens).expand(heads, channels)
        else:
            row_count, column_count = used.sum(3), used.sum((0, 2))
        first_batch, first_head, first_token, first_channel = box.start
        _, _, all_tokens, all_channels = self.form.pooled
        first_row = first_batch * all_tokens + first_token
        self.token.add(first_row, rows.sum(2).flatten(1), row_count.sum(1).flatten())
        self.head.add(first_head, rows.sum((1, 3)), row_count.sum((0, 2)))
        first_column = first_head * all_channels + first_channel
        self.channel.add(first_column, columns.flatten(1), column_count.flatten())

    def _find_worst(self, box: _Box, error: torch.Tensor) -> None:
        worst = float(error.max())
        if worst > self._worst:
            at = int(error.argmax())
            steps = (error.stride(0), error.stride(1), error.stride(2), 1)
            index = [at // step % size for step, size in zip(steps, error.shape, strict=True)]
            self._worst = worst
            self._worst_at = self.form.index(*(i + first for i, first in zip(index, box.start, strict=True)))


def _boxes(given: Operands, limit: int) -> Iterator[_Box]:
    """Both tensors in boxes of at most `limit` elements that are consecutive in canonical order."""
    for first_head, ref, cand in _slabs(given):
        steps: list[int] = []
        room = limit
        for size in reversed(ref.shape):
            steps.insert(0, max(1, min(size, room)))
            room //= steps[0]
        ranges = [range(0, size, step) for size, step in zip(ref.shape, steps, strict=True)]
        for start in itertools.product(*ranges):
            part = tuple(slice(i, i + step) for i, step in zip(start, steps, strict=True))
            yield _Box(ref[part], cand[part], (start[0], first_head + start[1], start[2], start[3]))


def _slabs(given: Operands) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Both tensors as `[batch, head, token, channel]`, and their first head: several head axes are
    one where memory allows that view, and are gone through one by one where not."""
    form: Form = given.form
    ref, cand = form.view(given.ref), form.view(given.cand)
    try:
        whole = ref.view(form.pooled), cand.view(form.pooled)
    except RuntimeError:
        inner = form.sizes[-3]
        for n, index in enumerate(itertools.product(*(range(size) for size in form.sizes[1:-3]))):
            at: tuple[slice | int, ...] = (slice(None), *index)
            yield n * inner, ref[at], cand[at]
    else:
        yield 0, *whole


def _same_bits(ref: torch.Tensor, cand: torch.Tensor) -> bool:
    bits = _BITS[ref.element_size()]
    return torch.equal(ref.view(bits), cand.to(ref.device).view(bits))


def _range(raw: torch.Tensor, plane: torch.Tensor) -> tuple[float, float]:
    """Smallest and largest value, NaN if there is any; of the raw values where they are half the
    work, else of their float64 plane."""
    low, high = torch.aminmax(raw if raw.dtype is torch.float32 and raw.device.type == "cpu" else plane)
    return float(low), float(high)
