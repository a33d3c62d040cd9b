"""Comparison on the CPU: both tensors are read once, in boxes, by a compiled kernel (`kernel`).

A box is a run of consecutive elements of the canonical form, contiguous in memory or not. Boxes are
shared out to torch's number of threads; what each found is added up in the order of the boxes, so the
number of threads changes no bit of the result. The size of a box changes the order of addition:
figures agree to a relative 1e-12. What is held beside the tensors is the sums of
`metrics.PROFILE_ENTRIES` entries an axis at most, and the results of the boxes under way.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from divergence.comparison import kernel, loops
from divergence.comparison.boxes import Part, boxes_of
from divergence.comparison.kernel import Box, Mask, Results
from divergence.comparison.loops import Pool, Side
from divergence.comparison.metrics import (
    PROFILE_ENTRIES,
    Floats,
    Metrics,
    Scan,
    arrange,
    assemble,
)
from divergence.comparison.unlike import with_unlike
from divergence.comparison.views import Operands, byte_values, operands
from divergence.errors import AlignmentError
from divergence.shards import release

if TYPE_CHECKING:
    from divergence.comparison.views import Values

BOX = 1 << 20
"""Elements in a box: about a millisecond of work, of which a tenth is spent around the kernel."""

LARGE_BOX, MANY = 1 << 22, 1 << 24
"""Elements in a box of tensors that have more than so many."""

TOGETHER = 8
"""Most boxes that a thread is handed at a time: handing over wakes the thread that adds results up, and with
as many threads as cores that takes a core from one of them."""

UNDER_WAY = 32 << 20
"""Most bytes that the results of boxes under way may take."""

_LOWS = [loops.REF_LOW, loops.CAND_LOW]

_KINDS = {
    torch.float32: loops.FLOAT32,
    torch.float64: loops.FLOAT64,
    torch.bfloat16: loops.BFLOAT16,
    torch.float16: loops.FLOAT16,
    torch.int16: loops.INT16,
    torch.uint16: loops.UINT16,
    torch.int32: loops.INT32,
    torch.uint32: loops.UINT32,
    torch.int64: loops.INT64,
    torch.uint64: loops.UINT64,
}


def compare(
    ref: Values,
    cand: Values,
    *,
    axes: tuple[str, ...] = (),
    mask: Values | None = None,
    box: int | None = None,
    entries: int = PROFILE_ENTRIES,
    threads: int | None = None,
) -> Metrics:
    """Compares two tensors or arrays in one pass.

    Args and raises: as `divergence.comparison.compare_tensors`; `box` is `BOX` or `LARGE_BOX`
    by default, `entries` as `metrics.PROFILE_ENTRIES`; `threads` is torch's number by default.
    """
    given = operands(ref, cand, axes, mask)
    for tensor in (given.ref, given.cand):
        _kind(tensor.dtype)
    total = _Total(given, entries)
    threads = threads or torch.get_num_threads()
    box = box or (BOX if given.ref.numel() <= MANY else LARGE_BOX)
    for found in _results(total, list(boxes_of(given, box)), threads):
        total.add(found)
    sums = arrange(given.form, total.token.sums, total.head.sums, total.channel.sums)
    return with_unlike(assemble(total.scan(), sums), given)


@dataclass(frozen=True)
class _Found:
    """A box and what the kernel found in it."""

    box: Part
    results: Results


class _AxisSums:
    """Sums `[5, entries]` over one flattened axis (the fields of `metrics.AxisSums`), pooled."""

    def __init__(self, size: int, entries: int) -> None:
        self.group = -(-size // entries)
        self.sums = np.zeros((5, -(-size // self.group)))

    def part(self, start: int, length: int) -> tuple[Pool, Floats]:
        """How `length` members from `start` on are pooled, and zeros for their entries."""
        before = start % self.group
        return Pool(self.group, before), np.zeros((5, -(-(before + length) // self.group)))

    def add(self, start: int, sums: Floats) -> None:
        """Adds the sums of a part that starts at `start`."""
        first = start // self.group
        self.sums[:, first : first + sums.shape[1]] += sums


class _Total:
    """What was found in all boxes."""

    def __init__(self, given: Operands, entries: int) -> None:
        self.form = given.form
        self.mask = given.mask
        batch, heads, tokens, channels = self.form.pooled
        self.token = _AxisSums(batch * tokens, entries)
        self.head = _AxisSums(heads, entries)
        self.channel = _AxisSums(heads * channels, entries)
        self.exponents = np.zeros(loops.BINS, np.int64)
        self.found = _nothing()
        self.counts = np.zeros(loops.COUNTS, np.int64)
        self.worst_at: tuple[int, ...] = ()
        self.same_dtype = given.ref.dtype == given.cand.dtype
        self._own = threading.local()

    def starts(self, box: Part) -> tuple[int, int, int]:
        """Where a box starts on the flattened token, head and channel axes."""
        _, _, tokens, channels = self.form.pooled
        batch, head, token, channel = box.start
        return batch * tokens + token, head, head * channels + channel

    def scan_box(self, box: Part) -> _Found:
        """Runs the kernel on a box. Changes nothing here: several threads may."""
        ref, cand = box.ref.cpu(), box.cand.cpu()
        batch, heads, tokens, channels = ref.shape
        at_token, at_head, at_channel = self.starts(box)
        token_pool, token = self.token.part(at_token, batch * tokens)
        head_pool, head = self.head.part(at_head, heads)
        channel_pool, channel = self.channel.part(at_channel, heads * channels)
        results = Results(
            token, head, channel, np.zeros(loops.BINS, np.int64), _nothing(), np.zeros(loops.COUNTS, np.int64)
        )
        results.counts[loops.DIFFERENT] = not self.same_dtype
        sizes = (batch, heads, tokens, channels)
        work = self._cleared(kernel.work_size(sizes, channel_pool))
        part = Box(_side(ref), _side(cand), self._mask(box), sizes, token_pool, head_pool, channel_pool)
        kernel.scan(part, work, results)
        for tensor in (box.ref, box.cand):
            release(tensor)
        return _Found(box, results)

    def _cleared(self, size: int) -> Floats:
        """Zeros to work in, of this thread: fresh memory for every box costs more than clearing it."""
        work: Floats | None = getattr(self._own, "work", None)
        if work is None or len(work) != size:
            work = self._own.work = np.empty(size)
        work.fill(0)
        return work

    def most_under_way(self, box: Part, most: int) -> int:
        """How many results like that of `box` may be held."""
        batch, heads, tokens, channels = box.ref.shape
        members = (batch * tokens, heads, heads * channels)
        entries = sum(
            length // axis.group + 2
            for length, axis in zip(members, (self.token, self.head, self.channel), strict=True)
        )
        return max(1, min(most, UNDER_WAY // (40 * entries)))

    def _mask(self, box: Part) -> Mask:
        if self.mask is None:
            return Mask(0, 0, 0)
        batch, token = self.mask.stride()
        first = self.mask.data_ptr() + box.start[0] * batch + box.start[2] * token
        return Mask(first, batch, token)

    def add(self, part: _Found) -> None:
        """Adds a box."""
        at_token, at_head, at_channel = self.starts(part.box)
        results = part.results
        self.token.add(at_token, results.token)
        self.head.add(at_head, results.head)
        self.channel.add(at_channel, results.channel)
        self.exponents += results.exponents
        self.counts += results.counts
        if results.found[loops.WORST] > self.found[loops.WORST]:
            index = np.unravel_index(int(results.counts[loops.WORST_AT]), tuple(part.box.ref.shape))
            self.worst_at = self.form.index(*(int(i) + s for i, s in zip(index, part.box.start, strict=True)))
        least = np.minimum(self.found, results.found)
        absolute = self.found[loops.ABS_SUM] + results.found[loops.ABS_SUM]
        np.maximum(self.found, results.found, out=self.found)
        self.found[_LOWS] = least[_LOWS]
        self.found[loops.ABS_SUM] = absolute

    def scan(self) -> Scan:
        """What was found beside the sums."""
        found = self.found.tolist()
        counts = self.counts.tolist()
        worst, padded = found[loops.WORST], found[loops.PADDED]
        ref, cand = (
            (low, found[at + 1]) if (low := found[at]) <= found[at + 1] else None
            for at in (loops.REF_LOW, loops.CAND_LOW)
        )
        return Scan(
            elements=counts[loops.ELEMENTS],
            ref_nonfinite=counts[loops.REF_NONFINITE],
            cand_nonfinite=counts[loops.CAND_NONFINITE],
            bit_equal=counts[loops.DIFFERENT] == 0,
            abs_sum=found[loops.ABS_SUM],
            max_abs=(worst, self.worst_at) if worst >= 0 else None,
            ref_range=ref,
            cand_range=cand,
            padded_max_abs=padded if padded >= 0 else None,
            error_exponents=self.exponents,
        )


def _results(total: _Total, boxes: list[Part], threads: int) -> Iterator[_Found]:
    """What was found in each box, in their order; few tensors are large enough for threads."""
    if threads == 1 or len(boxes) == 1:
        yield from map(total.scan_box, boxes)
        return
    most = total.most_under_way(boxes[0], 2 * threads * TOGETHER)
    together = max(1, min(TOGETHER, most // (2 * threads), len(boxes) // (2 * threads)))
    under_way: deque[Future[list[_Found]]] = deque()

    def scan(start: int) -> list[_Found]:
        return [total.scan_box(box) for box in boxes[start : start + together]]

    with ThreadPoolExecutor(min(threads, len(boxes))) as pool:
        for start in range(0, len(boxes), together):
            under_way.append(pool.submit(scan, start))
            if len(under_way) >= min(most, 2 * threads):
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()


def _kind(dtype: torch.dtype) -> int:
    """How the kernel reads a dtype.

    Raises:
        AlignmentError: it does not.
    """
    if dtype in _KINDS:
        return _KINDS[dtype]
    if dtype.itemsize == 1:
        try:
            byte_values(dtype)
        except RuntimeError:  # packed types have no values of their own
            pass
        else:
            return loops.TABLE
    raise AlignmentError(f"cannot compare tensors of dtype {dtype}; convert them to float32 first")


def _side(tensor: torch.Tensor) -> Side:
    """Where the kernel finds a tensor `[batch, head, token, channel]` on the CPU."""
    kind = _kind(tensor.dtype)
    table = byte_values(tensor.dtype).ctypes.data if kind == loops.TABLE else 0
    batch, head, token, channel = tensor.stride()
    return Side(tensor.data_ptr(), batch, head, token, channel, kind, tensor.element_size(), table)


def _nothing() -> Floats:
    """What the kernel has found before it starts."""
    found = np.full(loops.FOUND, -math.inf)
    found[loops.ABS_SUM] = 0.0
    found[_LOWS] = math.inf
    return found
