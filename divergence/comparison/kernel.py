"""The compiled kernel: one box of both tensors, read once, a segment of two rows at a time.

A row is all that shares batch, head and token; segments of two of them stay in the first-level cache
while the loops of `loops` go over them: values become float32 where every value of the dtype is one,
else float64, are searched for what is not finite, and then enter the sums in float64. Sums may be
reassociated by the compiler (vector lanes), alike for all of them and for every call: the same box
gives the same bits.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from divergence.comparison import loops
from divergence.comparison.loops import (
    ABS_SUM,
    BINS,
    CAND_LOW,
    DIFFERENT,
    DROPPED,
    ELEMENTS,
    INNER,
    LANES,
    PADDED,
    PITCH,
    REF_LOW,
    SEGMENT,
    WIDE,
    WORST,
    WORST_AT,
    Pool,
    Side,
    add,
    add_two,
    at,
    first,
    largest,
    load,
    purge,
    same_bits,
    survey,
    take,
    tally,
    widen,
)

PLACE = SEGMENT + SEGMENT // 2
"""Float64s for the values of one segment: in float64, and in float32 before that."""

WORK = 4 * PLACE + SEGMENT // 2 + BINS * LANES // 2
"""Float64s of work space beside the channel sums: two rows of each side, their exponents in uint16,
and the histogram in uint32."""


class Mask(NamedTuple):
    """Valid tokens of a box, one byte each; address 0 where all are."""

    address: int
    batch: int
    token: int


class Box(NamedTuple):
    """A box `[batch, head, token, channel]` of both tensors, and how the entries of its sums are pooled."""

    ref: Side
    cand: Side
    mask: Mask
    sizes: tuple[int, int, int, int]
    token: Pool
    head: Pool
    channel: Pool


class Results(NamedTuple):
    """What is found in a box.

    Attributes:
        token, head, channel: `[5, entries]`, zeros at first; the fields of `metrics.AxisSums`.
        exponents: `[BINS]`, zeros at first; `metrics.Metrics.error_exponents`.
        found: `[FOUND]`, at first infinities that every value is within, and 0 for the sum.
        counts: `[COUNTS]`, zeros at first.
    """

    token: Any
    head: Any
    channel: Any
    exponents: Any
    found: Any
    counts: Any


class _Scratch(NamedTuple):
    """Pointers to a block of channel sums, the exponents of either row, and the histogram."""

    sums: Any
    exponents: Any
    other_exponents: Any
    histogram: Any


@njit(**INNER)
def _flush(sums: Any, n: int, pool: Pool, start: int, rows: int, channel: Any) -> None:
    """Adds a block of channel sums over `rows` rows to the entries of these channels, and clears it."""
    if pool.group == 1:
        for k in range(4):
            out = channel[k + 1, start : start + n]
            for j in range(n):
                out[j] += sums[k * PITCH + j]
                sums[k * PITCH + j] = 0.0
        channel[0, start : start + n] += rows
        return
    entry, phase = divmod(pool.before + start, pool.group)
    j = 0
    while j < n:
        stop = min(n, j + pool.group - phase)
        channel[0, entry] += rows * (stop - j)
        for k in range(4):
            channel[k + 1, entry] += take(sums, k * PITCH + j, k * PITCH + stop)
        j = stop
        entry += 1
        phase = 0


@njit(**INNER)
def _book(
    ref: Any,
    cand: Any,
    n: int,
    place: int,
    added: Any,
    gone: Any,
    exponents: Any,
    histogram: Any,
    row: Any,
    to: Any,
) -> None:
    """Books what `add` returned for a segment that starts at `place`; `gone`: what `purge` returned."""
    absolute, err2, ref2, cand2, dot, top = added
    dropped, kept = gone
    to.found[ABS_SUM] += absolute
    row[0] += n - dropped
    row[1] += err2
    row[2] += ref2
    row[3] += cand2
    row[4] += dot
    if top:
        tally(exponents, n, histogram)
    else:
        histogram[0] += n
    to.counts[DROPPED] += dropped
    error = np.int64(top).view(np.float64)
    if error > to.found[WORST] or (error == to.found[WORST] and place < to.counts[WORST_AT]):
        to.found[WORST] = error
        to.counts[WORST_AT] = place + (first(ref, cand, n, error) if top else kept)


@njit(**INNER)
def _one_row(
    ref: Any,
    cand: Any,
    spare: Any,
    n: int,
    place: int,
    scratch: Any,
    zero: Any,
    entry: Any,
    row: Any,
    to: Any,
) -> None:
    """Adds a segment of one row; `spare` is where its values may be written."""
    ref_ok, ref_low, ref_high = survey(ref, n, zero)
    cand_ok, cand_low, cand_high = survey(cand, n, zero)
    gone = (0, 0)
    if ref_ok and cand_ok:
        widen(to.found, REF_LOW, ref_low, ref_high)
        widen(to.found, CAND_LOW, cand_low, cand_high)
    else:
        gone = purge(ref, cand, n, spare, to.channel, entry, to.found, to.counts)
        ref, cand = spare
    if gone[0] < n:
        added = add(ref, cand, n, scratch.sums, scratch.exponents)
        _book(ref, cand, n, place, added, gone, scratch.exponents, scratch.histogram, row, to)


@njit(**INNER)
def _two_rows(
    a: Any, b: Any, c: Any, d: Any, n: int, places: Any, scratch: Any, zero: Any, row: Any, to: Any
) -> bool:
    """Adds a segment of two rows, reference and candidate of each, if all of it is finite."""
    a_ok, a_low, a_high = survey(a, n, zero)
    b_ok, b_low, b_high = survey(b, n, zero)
    c_ok, c_low, c_high = survey(c, n, zero)
    d_ok, d_low, d_high = survey(d, n, zero)
    if not (a_ok and b_ok and c_ok and d_ok):
        return False
    widen(to.found, REF_LOW, min(a_low, c_low), max(a_high, c_high))
    widen(to.found, CAND_LOW, min(b_low, d_low), max(b_high, d_high))
    one, other = add_two(a, b, c, d, n, scratch.sums, scratch.exponents)
    _book(a, b, n, places[0], one, (0, 0), scratch.exponents, scratch.histogram, row[0], to)
    _book(c, d, n, places[1], other, (0, 0), scratch.other_exponents, scratch.histogram, row[1], to)
    return True


@njit(**INNER)
def _segment(
    kind: Any,
    values: Any,
    spare: Any,
    rows: int,
    n: int,
    places: Any,
    scratch: Any,
    entry: Any,
    row: Any,
    to: Any,
) -> None:
    """Adds a segment of one or two rows; none (`rows` 0) is one that is padded.

    Args:
        kind: np.float32 or np.float64.
        values, spare: addresses of the values and of where they may be written: reference and
            candidate of the first row, then of the second.
        rows: 0, 1 or 2.
        n: elements of the segment.
        places: position in the box of each row's first element.
        scratch: see `_Scratch`.
        entry: index of the first channel, and how channels are pooled.
        row: `[2, 5]`, the fields of `metrics.AxisSums` of each row, to be added to.
        to: the results.
    """
    zero = kind(0)
    a, b, c, d = at(values[0], kind), at(values[1], kind), at(values[2], kind), at(values[3], kind)
    if rows == 0:
        to.found[PADDED] = largest(a, b, n, to.found[PADDED])
        return
    if rows == 2 and _two_rows(a, b, c, d, n, places, scratch, zero, row, to):
        return
    for k in range(rows):
        ref, cand = at(values[2 * k], kind), at(values[2 * k + 1], kind)
        own = (at(spare[2 * k], kind), at(spare[2 * k + 1], kind))
        _one_row(ref, cand, own, n, places[k], scratch, zero, entry, row[k], to)


@njit(**INNER)
def _row_at(side: Side, row: int, head: int, tokens: int) -> int:
    """The address of a row of a box; rows are numbered over batch and token."""
    batch, token = divmod(row, tokens)
    return side.address + (batch * side.batch + head * side.head + token * side.token) * side.itemsize


@njit(**INNER)
def _position(row: int, head: int, heads: int, tokens: int) -> int:
    """The number of a row in the order of a box."""
    batch, token = divmod(row, tokens)
    return (batch * heads + head) * tokens + token


@njit(**INNER)
def _valid(mask: Mask, row: int, tokens: int) -> bool:
    batch, token = divmod(row, tokens)
    return mask.address == 0 or at(mask.address + batch * mask.batch + token * mask.token, np.uint8)[0] != 0


@njit(**INNER)
def _add_rows(box: Box, h: int, i: int, rows: int, base: int, one_block: bool, row: Any, to: Any) -> None:
    """Goes over the rows `i` to `i + rows` of a head, segment by segment; 0 rows are one padded row."""
    ref, cand = box.ref, box.cand
    _, heads, tokens, channels = box.sizes
    wide = ref.kind in WIDE or cand.kind in WIDE
    last = i + max(rows, 1) - 1
    starts = (
        _row_at(ref, i, h, tokens),
        _row_at(cand, i, h, tokens),
        _row_at(ref, last, h, tokens),
        _row_at(cand, last, h, tokens),
    )
    numbers = (_position(i, h, heads, tokens) * channels, _position(last, h, heads, tokens) * channels)
    spare = (base, base + 8 * PLACE, base + 16 * PLACE, base + 24 * PLACE)
    exponents = base + 32 * PLACE
    histogram = exponents + 4 * SEGMENT
    blocks = histogram + 4 * BINS * LANES
    for start in range(0, channels, SEGMENT):
        n = min(SEGMENT, channels - start)
        r, c = start * ref.channel * ref.itemsize, start * cand.channel * cand.itemsize
        raw = (starts[0] + r, starts[1] + c, starts[2] + r, starts[3] + c)
        if to.counts[DIFFERENT] == 0 and not (
            same_bits(ref, raw[0], cand, raw[1], n) and same_bits(ref, raw[2], cand, raw[3], n)
        ):
            to.counts[DIFFERENT] = 1
        one, other = load(ref, raw[0], spare[0], n, wide), load(cand, raw[1], spare[1], n, wide)
        values = (one, other, one, other)
        if rows == 2:
            values = (one, other, load(ref, raw[2], spare[2], n, wide), load(cand, raw[3], spare[3], n, wide))
        sums = at(blocks if one_block else blocks + 32 * PITCH * (start // SEGMENT), np.float64)
        scratch = _Scratch(
            sums, at(exponents, np.uint16), at(exponents + 2 * SEGMENT, np.uint16), at(histogram, np.uint32)
        )
        places = (numbers[0] + start, numbers[1] + start)
        entry = (h * channels + start, box.channel)
        if wide:
            _segment(np.float64, values, spare, rows, n, places, scratch, entry, row, to)
        else:
            _segment(np.float32, values, spare, rows, n, places, scratch, entry, row, to)
        if one_block and rows:
            _flush(sums, n, box.channel, entry[0], rows, to.channel)


@njit(**INNER)
def _scan(box: Box, work: Any, to: Any) -> None:
    batch, heads, tokens, channels = box.sizes
    base = np.int64(work.ctypes.data)
    lanes = at(base + 32 * PLACE + 4 * SEGMENT, np.uint32)
    blocks = base + 32 * PLACE + 4 * SEGMENT + 4 * BINS * LANES
    all_rows = batch * tokens
    one_block = all_rows == 1 or box.channel.group > 1
    row = np.zeros((2, 5))
    for h in range(heads):
        head_entry = (box.head.before + h) // box.head.group
        valid_rows = i = 0
        while i < all_rows:
            rows = 1 if _valid(box.mask, i, tokens) else 0
            if rows and i + 1 < all_rows and _valid(box.mask, i + 1, tokens):
                rows = 2
            row[:] = 0.0
            _add_rows(box, h, i, rows, base, one_block, row, to)
            for j in range(rows):
                token_entry = (box.token.before + i + j) // box.token.group
                for k in range(5):
                    to.token[k, token_entry] += row[j, k]
                    to.head[k, head_entry] += row[j, k]
            valid_rows += rows
            i += max(rows, 1)
        to.counts[ELEMENTS] += valid_rows * channels
        if not one_block:
            for start in range(0, channels, SEGMENT):
                sums = at(blocks + 32 * PITCH * (start // SEGMENT), np.float64)
                n = min(SEGMENT, channels - start)
                _flush(sums, n, box.channel, h * channels + start, valid_rows, to.channel)
    for entry in range(BINS):
        for lane in range(LANES):
            to.exponents[entry] += lanes[entry * LANES + lane]
    to.exponents[0] -= to.counts[DROPPED]


def _cached(source: str) -> Any:
    """`_scan` with numba's cache on disk, or without where no folder for one can be written.

    The cache knows a function by the file that it stands in and by what it closes over: `source`, a
    digest of `loops`, lets it notice a change there.
    """

    def scan(box: Box, work: Any, to: Any) -> None:
        _ = source
        _scan(box, work, to)

    try:
        return njit(cache=True, nogil=True)(scan)
    except RuntimeError:  # "no locator available": neither beside this file nor in the user's cache
        return njit(nogil=True)(scan)


scan = _cached(sha256(Path(loops.__file__).read_bytes()).hexdigest())
"""Reads a `Box` once, with zeros `[work_size(...)]` to work in, into `Results`."""


def work_size(sizes: tuple[int, int, int, int], pool: Pool) -> int:
    """Float64s of work space that `scan` needs for a box; `pool` is that of the channels."""
    batch, _, tokens, channels = sizes
    blocks = 1 if batch * tokens == 1 or pool.group > 1 else -(-channels // SEGMENT)
    return WORK + 4 * PITCH * blocks
