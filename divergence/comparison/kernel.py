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
    Place,
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

ROWS = 16
"""Float64s for the sums of two rows, `ROWS // 2` apart."""

WORK = 4 * PLACE + ROWS + SEGMENT // 2 + BINS * LANES // 2
"""Float64s of work space beside the channel sums: values of two rows of each side, sums of these rows,
their exponents in uint16, and the histogram in uint32."""


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


class _Out(NamedTuple):
    """Pointers to what the loops write to; arrays would be counted references at every call.

    Attributes:
        found, counts: those of `Results`.
        channel, entries: `Results.channel`, row after row, and the length of a row.
        row, other_row: sums of the rows under way.
        exponents, other_exponents: of their errors.
        histogram: `LANES` copies.
        blocks: address of the blocks of channel sums.
    """

    found: Any
    counts: Any
    channel: Any
    entries: int
    row: Any
    other_row: Any
    exponents: Any
    other_exponents: Any
    histogram: Any
    blocks: int


@njit(**INNER)
def _flush(sums: Any, n: int, pool: Pool, start: int, rows: int, to: Any) -> None:
    """Adds a block of channel sums over `rows` rows to the entries of these channels, and clears it."""
    if pool.group == 1:
        for k in range(4):
            base = (k + 1) * to.entries + start
            for j in range(n):
                to.channel[base + j] += sums[k * PITCH + j]
                sums[k * PITCH + j] = 0.0
        for j in range(n):
            to.channel[start + j] += rows
        return
    entry, phase = divmod(pool.before + start, pool.group)
    j = 0
    while j < n:
        stop = min(n, j + pool.group - phase)
        to.channel[entry] += rows * (stop - j)
        for k in range(4):
            to.channel[(k + 1) * to.entries + entry] += take(sums, k * PITCH + j, k * PITCH + stop)
        j = stop
        entry += 1
        phase = 0


@njit(**INNER)
def _book(
    ref: Any, cand: Any, n: int, place: Place, added: Any, gone: Any, exponents: Any, row: Any, to: Any
) -> None:
    """Books what `add` returned for a segment at `place`; `gone`: what `purge` returned."""
    absolute, err2, ref2, cand2, dot, top = added
    dropped, kept = gone
    to.found[ABS_SUM] += absolute
    row[0] += n - dropped
    row[1] += err2
    row[2] += ref2
    row[3] += cand2
    row[4] += dot
    if top:
        tally(exponents, n, to.histogram, place)
    else:
        to.histogram[0] += n
    to.counts[DROPPED] += dropped
    error = np.int64(top).view(np.float64)
    if error > to.found[WORST] or (error == to.found[WORST] and place.number < to.counts[WORST_AT]):
        to.found[WORST] = error
        to.counts[WORST_AT] = place.number + (first(ref, cand, n, error) if top else kept)


@njit(**INNER)
def _one_row(
    ref: Any, cand: Any, spare: Any, n: int, place: Place, sums: Any, zero: Any, entry: Any, row: Any, to: Any
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
        added = add(ref, cand, n, sums, to.exponents)
        _book(ref, cand, n, place, added, gone, to.exponents, row, to)


@njit(**INNER)
def _two_rows(a: Any, b: Any, c: Any, d: Any, n: int, places: Any, sums: Any, zero: Any, to: Any) -> bool:
    """Adds a segment of two rows, reference and candidate of each, if all of it is finite."""
    a_ok, a_low, a_high = survey(a, n, zero)
    b_ok, b_low, b_high = survey(b, n, zero)
    c_ok, c_low, c_high = survey(c, n, zero)
    d_ok, d_low, d_high = survey(d, n, zero)
    if not (a_ok and b_ok and c_ok and d_ok):
        return False
    widen(to.found, REF_LOW, min(a_low, c_low), max(a_high, c_high))
    widen(to.found, CAND_LOW, min(b_low, d_low), max(b_high, d_high))
    one, other = add_two(a, b, c, d, n, sums, to.exponents)
    _book(a, b, n, places[0], one, (0, 0), to.exponents, to.row, to)
    _book(c, d, n, places[1], other, (0, 0), to.other_exponents, to.other_row, to)
    return True


@njit(**INNER)
def _segment(
    kind: Any, values: Any, spare: Any, rows: int, n: int, places: Any, sums: Any, entry: Any, to: Any
) -> None:
    """Adds a segment of one or two rows; none (`rows` 0) is one that is padded.

    Args:
        kind: np.float32 or np.float64.
        values, spare: addresses of the values and of where they may be written: reference and
            candidate of the first row, then of the second.
        rows: 0, 1 or 2.
        n: elements of the segment.
        places: where the segment stands in each row.
        sums: block of channel sums.
        entry: index of the first channel, and how channels are pooled.
        to: see `_Out`.
    """
    zero = kind(0)
    a, b, c, d = at(values[0], kind), at(values[1], kind), at(values[2], kind), at(values[3], kind)
    if rows == 0:
        to.found[PADDED] = largest(a, b, n, to.found[PADDED])
        return
    if rows == 2 and _two_rows(a, b, c, d, n, places, sums, zero, to):
        return
    for k in range(rows):
        ref, cand = at(values[2 * k], kind), at(values[2 * k + 1], kind)
        own = (at(spare[2 * k], kind), at(spare[2 * k + 1], kind))
        row = to.other_row if k else to.row
        _one_row(ref, cand, own, n, places[k], sums, zero, entry, row, to)


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
def _add_rows(box: Box, h: int, i: int, rows: int, base: int, one_block: bool, to: Any) -> None:
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
    plain = ref.channel == 1 and cand.channel == 1 and ref.itemsize == cand.itemsize
    side_by_side = ref.itemsize if plain else 0
    for start in range(0, channels, SEGMENT):
        n = min(SEGMENT, channels - start)
        beyond = (n * ref.itemsize, n * cand.itemsize)
        if start + n == channels:  # the rows that are next in turn
            beyond = ((ref.token * 2 - start) * ref.itemsize, (cand.token * 2 - start) * cand.itemsize)
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
        sums = at(to.blocks if one_block else to.blocks + 32 * PITCH * (start // SEGMENT), np.float64)
        places = (
            Place(numbers[0] + start, raw[0] + beyond[0], raw[1] + beyond[1], side_by_side),
            Place(numbers[1] + start, raw[2] + beyond[0], raw[3] + beyond[1], side_by_side),
        )
        entry = (h * channels + start, box.channel)
        if wide:
            _segment(np.float64, values, spare, rows, n, places, sums, entry, to)
        else:
            _segment(np.float32, values, spare, rows, n, places, sums, entry, to)
        if one_block and rows:
            _flush(sums, n, box.channel, entry[0], rows, to)


@njit(**INNER)
def _out(base: int, results: Any) -> Any:
    """Where the loops write to; `base` is the address of the work space."""
    rows = base + 32 * PLACE
    exponents = rows + 8 * ROWS
    histogram = exponents + 4 * SEGMENT
    return _Out(
        at(np.int64(results.found.ctypes.data), np.float64),
        at(np.int64(results.counts.ctypes.data), np.int64),
        at(np.int64(results.channel.ctypes.data), np.float64),
        results.channel.shape[1],
        at(rows, np.float64),
        at(rows + 4 * ROWS, np.float64),
        at(exponents, np.uint16),
        at(exponents + 2 * SEGMENT, np.uint16),
        at(histogram, np.uint32),
        histogram + 4 * BINS * LANES,
    )


@njit(**INNER)
def _scan(box: Box, work: Any, results: Any) -> None:
    batch, heads, tokens, channels = box.sizes
    base = np.int64(work.ctypes.data)
    to = _out(base, results)
    token, head = results.token, results.head
    all_rows = batch * tokens
    one_block = all_rows == 1 or box.channel.group > 1
    for h in range(heads):
        head_entry = (box.head.before + h) // box.head.group
        valid_rows = i = 0
        while i < all_rows:
            rows = 1 if _valid(box.mask, i, tokens) else 0
            if rows and i + 1 < all_rows and _valid(box.mask, i + 1, tokens):
                rows = 2
            _add_rows(box, h, i, rows, base, one_block, to)
            for j in range(rows):
                row = to.other_row if j else to.row
                token_entry = (box.token.before + i + j) // box.token.group
                for k in range(5):
                    token[k, token_entry] += row[k]
                    head[k, head_entry] += row[k]
                    row[k] = 0.0
            valid_rows += rows
            i += max(rows, 1)
        to.counts[ELEMENTS] += valid_rows * channels
        if not one_block:
            for start in range(0, channels, SEGMENT):
                sums = at(to.blocks + 32 * PITCH * (start // SEGMENT), np.float64)
                _flush(
                    sums, min(SEGMENT, channels - start), box.channel, h * channels + start, valid_rows, to
                )
    for entry in range(BINS):
        for lane in range(LANES):
            results.exponents[entry] += to.histogram[entry * LANES + lane]
    results.exponents[0] -= to.counts[DROPPED]


def _cached(source: str) -> Any:
    """`_scan` with numba's cache on disk, or without where no folder for one can be written.

    The cache knows a function by the file that it stands in and by what it closes over: `source`, a
    digest of `loops`, lets it notice a change there.
    """

    def scan(box: Box, work: Any, results: Any) -> None:
        _ = source
        _scan(box, work, results)

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
