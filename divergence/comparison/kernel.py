"""The compiled kernel: one box of both tensors, read once, a segment of a row at a time.

A row is all that shares batch, head and token; a segment of it stays in the first-level cache while
the loops below go over it: values become float32 where every value of the dtype is one, else
float64, are searched for what is not finite, and then enter the sums in float64.

Everything is addressed by integers (`Side`), so that one specialisation serves every dtype and
layout; the loops are specialised for float32 and float64. All compiled functions stand in this file:
numba's cache on disk knows a function by its file, and would not notice a change in another one.

Sums may be reassociated by the compiler (vector lanes), alike for all of them and for every call:
the same box gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SEGMENT = 1024
"""Elements of a row that are worked on at a time; a multiple of `LANES`."""

PITCH = SEGMENT + 8
"""Distance of the four sums in a block of channel sums: a power of two would make their addresses
look alike to the processor's store queue."""

BINS = 2048
"""Of the histogram: the exponents of float64."""

LANES = 8
"""Copies of the histogram, so that increments of one bin do not wait for each other."""

PLACE = SEGMENT + SEGMENT // 2
"""Float64s for the values of one segment: in float64, and in float32 before that."""

WORK = 4 * PLACE + SEGMENT // 2 + BINS * LANES // 2
"""Float64s of work space beside the channel sums: two rows of each side, their exponents in uint16,
and the histogram in uint32."""

REORDER = {"reassoc", "contract", "nsz"}
"""Freedom to add in vector lanes. NaN and infinities keep their meaning."""

FLOAT32, FLOAT64, BFLOAT16, FLOAT16, TABLE, INT16, UINT16, INT32, UINT32, INT64, UINT64 = range(11)
"""How values are stored. `TABLE`: one byte, an index into 256 float32 values."""

WIDE = (FLOAT64, INT32, UINT32, INT64, UINT64)
"""Those that float32 cannot hold exactly."""

# Places in the results of `scan`.
ABS_SUM, WORST, PADDED, REF_LOW, REF_HIGH, CAND_LOW, CAND_HIGH = range(7)
ELEMENTS, REF_NONFINITE, CAND_NONFINITE, DIFFERENT, WORST_AT, DROPPED = range(6)

FOUND, COUNTS = CAND_HIGH + 1, DROPPED + 1


class Side(NamedTuple):
    """One tensor's part of a box: address, steps in elements, and how values are stored."""

    address: int
    batch: int
    head: int
    token: int
    channel: int
    kind: int
    itemsize: int
    table: int


class Mask(NamedTuple):
    """Valid tokens of a box, one byte each; address 0 where all are."""

    address: int
    batch: int
    token: int


class Pool(NamedTuple):
    """Each `group` members of an axis make one entry; `before` of the first entry's lie before the box."""

    group: int
    before: int


def _cached(function: Any) -> Any:
    """`numba.njit` with its cache, or without where no folder for one can be written."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "no locator available": neither beside this file nor in the user's cache
        return njit(nogil=True)(function)


@intrinsic
def _at(_: Any, address: Any, kind: Any) -> Any:
    """A pointer to values of a numpy dtype at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(address, kind), generate


def _extreme(name: str) -> Any:
    """The smaller or larger of two numbers that are not NaN: an LLVM intrinsic, which its vectoriser
    knows as a reduction, as it does not know numba's `min` and `max` of floats."""

    @intrinsic
    def extreme(_: Any, one: Any, other: Any) -> Any:
        def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
            kind = args[0].type
            function = builder.module.declare_intrinsic(name, [kind], ir.FunctionType(kind, [kind, kind]))
            return builder.call(function, args, fastmath=("nnan", "nsz"))

        return one(one, other), generate

    return extreme


_least = _extreme("llvm.minnum")
_most = _extreme("llvm.maxnum")


@njit
def _copy(source: Any, step: int, out: Any, n: int) -> None:
    if step == 1:
        for j in range(n):
            out[j] = source[j]
    else:
        for j in range(n):
            out[j] = source[j * step]


@njit
def _copy_bfloat16(source: Any, step: int, out: Any, n: int) -> None:
    if step == 1:
        for j in range(n):
            out[j] = np.uint32(source[j]) << 16
    else:
        for j in range(n):
            out[j] = np.uint32(source[j * step]) << 16


@njit
def _widen_float16(half: int) -> float:
    """IEEE 754 binary16 to binary32 without a denormal on the way."""
    magnitude = np.uint32((half & 0x7FFF) << 13)
    exponent = half & 0x7C00
    smallest = np.uint32(113 << 23)
    subnormal = np.uint32(magnitude + smallest).view(np.float32) - smallest.view(np.float32)
    normal = np.uint32(magnitude + (((255 - 31) if exponent == 0x7C00 else (127 - 15)) << 23))
    bits = np.float32(subnormal).view(np.uint32) if exponent == 0 else normal
    return np.uint32(bits | (half & 0x8000) << 16)


@njit
def _copy_float16(source: Any, step: int, out: Any, n: int) -> None:
    if step == 1:
        for j in range(n):
            out[j] = _widen_float16(source[j])
    else:
        for j in range(n):
            out[j] = _widen_float16(source[j * step])


@njit
def _copy_table(source: Any, step: int, table: Any, out: Any, n: int) -> None:
    for j in range(n):
        out[j] = table[source[j * step]]


@njit
def _narrow(side: Side, address: int, work: int, n: int) -> int:
    """The address of `n` values as float32: in place, or in `work`."""
    step = side.channel
    if side.kind == FLOAT32:
        if step == 1:
            return address
        _copy(_at(address, np.float32), step, _at(work, np.float32), n)
    elif side.kind == BFLOAT16:
        _copy_bfloat16(_at(address, np.uint16), step, _at(work, np.uint32), n)
    elif side.kind == FLOAT16:
        _copy_float16(_at(address, np.uint16), step, _at(work, np.uint32), n)
    elif side.kind == TABLE:
        _copy_table(_at(address, np.uint8), step, _at(side.table, np.float32), _at(work, np.float32), n)
    elif side.kind == INT16:
        _copy(_at(address, np.int16), step, _at(work, np.float32), n)
    else:
        _copy(_at(address, np.uint16), step, _at(work, np.float32), n)
    return work


@njit
def _load(side: Side, address: int, work: int, n: int, wide: bool) -> int:
    """The address of `n` values, as float64 if `wide`, else as float32: in place, or in `work`."""
    if not wide:
        return _narrow(side, address, work, n)
    step = side.channel
    out = _at(work, np.float64)
    if side.kind == FLOAT64:
        if step == 1:
            return address
        _copy(_at(address, np.float64), step, out, n)
    elif side.kind == INT32:
        _copy(_at(address, np.int32), step, out, n)
    elif side.kind == UINT32:
        _copy(_at(address, np.uint32), step, out, n)
    elif side.kind == INT64:
        _copy(_at(address, np.int64), step, out, n)
    elif side.kind == UINT64:
        _copy(_at(address, np.uint64), step, out, n)
    else:
        narrow = _narrow(side, address, work + 8 * SEGMENT, n)
        _copy(_at(narrow, np.float32), 1, out, n)
    return work


@njit
def _equal(one: Any, step: int, other: Any, other_step: int, n: int) -> bool:
    different = 0
    for j in range(n):
        different |= one[j * step] ^ other[j * other_step]
    return different == 0


@njit
def _same_bits(ref: Side, ref_at: int, cand: Side, cand_at: int, n: int) -> bool:
    a, b = ref.channel, cand.channel
    if ref.itemsize == 1:
        return _equal(_at(ref_at, np.uint8), a, _at(cand_at, np.uint8), b, n)
    if ref.itemsize == 2:
        return _equal(_at(ref_at, np.uint16), a, _at(cand_at, np.uint16), b, n)
    if ref.itemsize == 4:
        return _equal(_at(ref_at, np.uint32), a, _at(cand_at, np.uint32), b, n)
    return _equal(_at(ref_at, np.int64), a, _at(cand_at, np.int64), b, n)


@njit(fastmath=REORDER)
def _survey(values: Any, n: int, zero: Any) -> tuple[bool, float, float]:
    """Whether all values are finite and, where they are, the smallest and the largest: anything times
    zero is zero, but for NaN and infinities."""
    total = zero
    low = high = values[0]
    for j in range(n):
        total += values[j] * zero
        low = _least(low, values[j])
        high = _most(high, values[j])
    return total == zero, low, high


@njit
def _widen(found: Any, low_at: int, low: float, high: float) -> None:
    found[low_at] = min(found[low_at], low)
    found[low_at + 1] = max(found[low_at + 1], high)


@njit(fastmath=REORDER)
def _add(ref: Any, cand: Any, n: int, sums: Any, exponents: Any) -> tuple[float, float, float, float, float, int]:
    """Adds finite values to the sums of their channels (a block of four rows, `PITCH` apart).

    Returns:
        The sums of |c - r|, (c - r)^2, r^2, c^2 and r c, and the bits of the largest |c - r|; bits of
        floats that are not negative are in the order of their values.
    """
    absolute = err2 = ref2 = cand2 = dot = 0.0
    top = np.int64(0)
    for j in range(n):
        r, c = np.float64(ref[j]), np.float64(cand[j])
        error = abs(c - r)
        e2, r2, c2, rc = error * error, r * r, c * c, r * c
        absolute += error
        err2 += e2
        ref2 += r2
        cand2 += c2
        dot += rc
        sums[j] += e2
        sums[PITCH + j] += r2
        sums[2 * PITCH + j] += c2
        sums[3 * PITCH + j] += rc
        bits = np.float64(error).view(np.int64)
        top = max(top, bits)
        exponents[j] = bits >> 52
    return absolute, err2, ref2, cand2, dot, top


@njit(fastmath=REORDER)
def _add_two(ref: Any, cand: Any, ref_2: Any, cand_2: Any, n: int, sums: Any, exponents: Any) -> tuple[Any, Any]:
    """`_add` for two rows at a time, which halves the traffic to the channel sums. The exponents of the
    second stand `SEGMENT` behind those of the first."""
    absolute = err2 = ref2 = cand2 = dot = 0.0
    absolute_2 = err2_2 = ref2_2 = cand2_2 = dot_2 = 0.0
    top = top_2 = np.int64(0)
    for j in range(n):
        r, c = np.float64(ref[j]), np.float64(cand[j])
        error = abs(c - r)
        e2, r2, c2, rc = error * error, r * r, c * c, r * c
        absolute += error
        err2 += e2
        ref2 += r2
        cand2 += c2
        dot += rc
        bits = np.float64(error).view(np.int64)
        top = max(top, bits)
        exponents[j] = bits >> 52
        r, c = np.float64(ref_2[j]), np.float64(cand_2[j])
        error = abs(c - r)
        e2_2, r2_2, c2_2, rc_2 = error * error, r * r, c * c, r * c
        absolute_2 += error
        err2_2 += e2_2
        ref2_2 += r2_2
        cand2_2 += c2_2
        dot_2 += rc_2
        sums[j] += e2 + e2_2
        sums[PITCH + j] += r2 + r2_2
        sums[2 * PITCH + j] += c2 + c2_2
        sums[3 * PITCH + j] += rc + rc_2
        bits = np.float64(error).view(np.int64)
        top_2 = max(top_2, bits)
        exponents[SEGMENT + j] = bits >> 52
    return (absolute, err2, ref2, cand2, dot, top), (absolute_2, err2_2, ref2_2, cand2_2, dot_2, top_2)


@njit
def _tally(exponents: Any, n: int, histogram: Any) -> None:
    """Counts exponents, each of `LANES` neighbours in a copy of its own."""
    whole = n & ~(LANES - 1)
    for j in range(0, whole, LANES):
        for lane in range(LANES):
            histogram[exponents[j + lane] * LANES + lane] += 1
    for j in range(whole, n):
        histogram[exponents[j] * LANES] += 1


@njit
def _first(ref: Any, cand: Any, n: int, error: float) -> int:
    """The first position with that |c - r|."""
    for j in range(n):
        if abs(np.float64(cand[j]) - np.float64(ref[j])) == error:
            return j
    return n


@njit
def _largest(ref: Any, cand: Any, n: int, least: float) -> float:
    """The largest |c - r| of finite values, `least` if that is larger."""
    for j in range(n):
        if abs(ref[j]) < np.inf and abs(cand[j]) < np.inf:
            least = max(least, abs(np.float64(cand[j]) - np.float64(ref[j])))
    return least


@njit
def _purge(
    ref: Any, cand: Any, n: int, spare: Any, channel: Any, entry: Any, found: Any, counts: Any
) -> tuple[int, int]:
    """Copies a segment with zeros where either side is not finite, and takes these out of the counts.

    Returns:
        How many were taken out, and the first position that was not (`n` if there is none).
    """
    first, pool = entry
    dropped = 0
    kept = n
    for j in range(n):
        r, c = ref[j], cand[j]
        ref_ok, cand_ok = abs(r) < np.inf, abs(c) < np.inf
        if ref_ok:
            found[REF_LOW] = min(found[REF_LOW], r)
            found[REF_HIGH] = max(found[REF_HIGH], r)
        else:
            counts[REF_NONFINITE] += 1
        if cand_ok:
            found[CAND_LOW] = min(found[CAND_LOW], c)
            found[CAND_HIGH] = max(found[CAND_HIGH], c)
        else:
            counts[CAND_NONFINITE] += 1
        if ref_ok and cand_ok:
            spare[0][j] = r
            spare[1][j] = c
            kept = min(kept, j)
        else:
            spare[0][j] = 0.0
            spare[1][j] = 0.0
            dropped += 1
            channel[0, (pool.before + first + j) // pool.group] -= 1
    return dropped, kept


@njit(fastmath=REORDER)
def _take(sums: Any, start: int, stop: int) -> float:
    """The sum of a run, which is cleared."""
    total = 0.0
    for i in range(start, stop):
        total += sums[i]
        sums[i] = 0.0
    return total


@njit
def _flush(sums: Any, n: int, pool: Pool, first: int, rows: int, channel: Any) -> None:
    """Adds a block of channel sums over `rows` rows to the entries of these channels, and clears it."""
    if pool.group == 1:
        for k in range(4):
            out = channel[k + 1, first : first + n]
            for j in range(n):
                out[j] += sums[k * PITCH + j]
                sums[k * PITCH + j] = 0.0
        channel[0, first : first + n] += rows
        return
    entry, phase = divmod(pool.before + first, pool.group)
    j = 0
    while j < n:
        stop = min(n, j + pool.group - phase)
        channel[0, entry] += rows * (stop - j)
        for k in range(4):
            channel[k + 1, entry] += _take(sums, k * PITCH + j, k * PITCH + stop)
        j = stop
        entry += 1
        phase = 0


@njit
def _book(
    ref: Any, cand: Any, n: int, at: int, added: Any, dropped: int, kept: int,
    exponents: Any, histogram: Any, row: Any, found: Any, counts: Any,
) -> None:
    """Books what `_add` returned for a segment that starts at position `at` of the box."""
    absolute, err2, ref2, cand2, dot, top = added
    found[ABS_SUM] += absolute
    row[0] += n - dropped
    row[1] += err2
    row[2] += ref2
    row[3] += cand2
    row[4] += dot
    if top:
        _tally(exponents, n, histogram)
    else:
        histogram[0] += n
    counts[DROPPED] += dropped
    error = np.int64(top).view(np.float64)
    if error > found[WORST] or (error == found[WORST] and at < counts[WORST_AT]):
        found[WORST] = error
        counts[WORST_AT] = at + (_first(ref, cand, n, error) if top else kept)


@njit
def _one_row(
    ref: Any, cand: Any, spare: Any, n: int, at: int, scratch: Any, zero: Any,
    channel: Any, entry: Any, row: Any, found: Any, counts: Any,
) -> None:
    """Adds a segment of a valid row."""
    sums, exponents, _, histogram = scratch
    ref_ok, ref_low, ref_high = _survey(ref, n, zero)
    cand_ok, cand_low, cand_high = _survey(cand, n, zero)
    dropped, kept = 0, 0
    if ref_ok and cand_ok:
        _widen(found, REF_LOW, ref_low, ref_high)
        _widen(found, CAND_LOW, cand_low, cand_high)
    else:
        dropped, kept = _purge(ref, cand, n, spare, channel, entry, found, counts)
        ref, cand = spare
    if dropped < n:
        added = _add(ref, cand, n, sums, exponents)
        _book(ref, cand, n, at, added, dropped, kept, exponents, histogram, row, found, counts)


@njit
def _segment(
    kind: Any, places: Any, work: Any, rows: int, n: int, at: Any, scratch: Any,
    channel: Any, entry: Any, row: Any, found: Any, counts: Any,
) -> None:
    """Adds a segment of one or two valid rows.

    Args:
        kind: np.float32 or np.float64.
        places: addresses of the values: reference and candidate of the first row, of the second.
        work: where values of each may be written.
        rows: 1 or 2.
        n: elements of the segment.
        at: its position in the box, of each row.
        scratch: sums, exponents and histogram.
        channel, entry: for `_purge`.
        row: `[2, 5]`, the fields of `metrics.AxisSums` of each row, to be added to.
        found, counts: results of `scan`.
    """
    zero = kind(0)
    sums, exponents, second_exponents, histogram = scratch
    a, b, c, d = _at(places[0], kind), _at(places[1], kind), _at(places[2], kind), _at(places[3], kind)
    spare = (_at(work[0], kind), _at(work[1], kind))
    if rows == 1:
        _one_row(a, b, spare, n, at[0], scratch, zero, channel, entry, row[0], found, counts)
        return
    a_ok, a_low, a_high = _survey(a, n, zero)
    b_ok, b_low, b_high = _survey(b, n, zero)
    c_ok, c_low, c_high = _survey(c, n, zero)
    d_ok, d_low, d_high = _survey(d, n, zero)
    if a_ok and b_ok and c_ok and d_ok:
        _widen(found, REF_LOW, min(a_low, c_low), max(a_high, c_high))
        _widen(found, CAND_LOW, min(b_low, d_low), max(b_high, d_high))
        first, second = _add_two(a, b, c, d, n, sums, exponents)
        _book(a, b, n, at[0], first, 0, 0, exponents, histogram, row[0], found, counts)
        _book(c, d, n, at[1], second, 0, 0, second_exponents, histogram, row[1], found, counts)
    else:
        other = (_at(work[2], kind), _at(work[3], kind))
        _one_row(a, b, spare, n, at[0], scratch, zero, channel, entry, row[0], found, counts)
        _one_row(c, d, other, n, at[1], scratch, zero, channel, entry, row[1], found, counts)


@njit
def _row_at(side: Side, row: int, head: int, tokens: int) -> int:
    """The address of a row of a box; rows are numbered over batch and token."""
    batch, token = divmod(row, tokens)
    return side.address + (batch * side.batch + head * side.head + token * side.token) * side.itemsize


@njit
def _position(row: int, head: int, heads: int, tokens: int) -> int:
    """The number of a row in the order of a box."""
    batch, token = divmod(row, tokens)
    return (batch * heads + head) * tokens + token


@njit
def _valid(mask: Mask, row: int, tokens: int) -> bool:
    batch, token = divmod(row, tokens)
    return mask.address == 0 or _at(mask.address + batch * mask.batch + token * mask.token, np.uint8)[0] != 0


@_cached
def scan(
    ref: Side,
    cand: Side,
    mask: Mask,
    sizes: tuple[int, int, int, int],
    pools: tuple[Pool, Pool, Pool],
    work: Any,
    token: Any,
    head: Any,
    channel: Any,
    histogram: Any,
    found: Any,
    counts: Any,
) -> None:
    """Reads a box `[batch, head, token, channel]` of both tensors once.

    Args:
        ref, cand: the tensors.
        mask: their valid tokens.
        sizes: of the box.
        pools: how the entries of `token`, `head` and `channel` are pooled.
        work: zeros, `[work_size(...)]`.
        token, head, channel: zeros `[5, entries]`; the fields of `metrics.AxisSums` for the box.
        histogram: zeros `[BINS]`; see `metrics.Metrics.error_exponents`.
        found, counts: results by the names above. `found` starts at -inf, its sum at 0 and lows at inf.
    """
    batch, heads, tokens, channels = sizes
    token_pool, head_pool, channel_pool = pools
    base = np.int64(work.ctypes.data)
    room = (base, base + 8 * PLACE, base + 16 * PLACE, base + 24 * PLACE)
    exponents = base + 32 * PLACE
    lanes = _at(exponents + 4 * SEGMENT, np.uint32)
    blocks = exponents + 4 * SEGMENT + 4 * BINS * LANES
    wide = ref.kind in WIDE or cand.kind in WIDE
    all_rows = batch * tokens
    one_block = all_rows == 1 or channel_pool.group > 1
    row = np.zeros((2, 5))
    for h in range(heads):
        valid_rows = i = 0
        while i < all_rows:
            valid = _valid(mask, i, tokens)
            rows = 2 if valid and i + 1 < all_rows and _valid(mask, i + 1, tokens) else 1
            last = i + rows - 1
            starts = (_row_at(ref, i, h, tokens), _row_at(cand, i, h, tokens),
                      _row_at(ref, last, h, tokens), _row_at(cand, last, h, tokens))
            row[:] = 0.0
            for first in range(0, channels, SEGMENT):
                n = min(SEGMENT, channels - first)
                ref_step, cand_step = first * ref.channel * ref.itemsize, first * cand.channel * cand.itemsize
                raw = (starts[0] + ref_step, starts[1] + cand_step, starts[2] + ref_step, starts[3] + cand_step)
                if counts[DIFFERENT] == 0 and not (
                    _same_bits(ref, raw[0], cand, raw[1], n) and _same_bits(ref, raw[2], cand, raw[3], n)
                ):
                    counts[DIFFERENT] = 1
                r, c = _load(ref, raw[0], room[0], n, wide), _load(cand, raw[1], room[1], n, wide)
                places = (r, c, r, c)
                if rows == 2:
                    places = (r, c, _load(ref, raw[2], room[2], n, wide), _load(cand, raw[3], room[3], n, wide))
                if not valid:
                    if wide:
                        found[PADDED] = _largest(_at(r, np.float64), _at(c, np.float64), n, found[PADDED])
                    else:
                        found[PADDED] = _largest(_at(r, np.float32), _at(c, np.float32), n, found[PADDED])
                    continue
                sums = _at(blocks if one_block else blocks + 32 * PITCH * (first // SEGMENT), np.float64)
                scratch = (sums, _at(exponents, np.uint16), _at(exponents + 2 * SEGMENT, np.uint16), lanes)
                at = (_position(i, h, heads, tokens) * channels + first, _position(last, h, heads, tokens) * channels + first)
                entry = (h * channels + first, channel_pool)
                if wide:
                    _segment(np.float64, places, room, rows, n, at, scratch, channel, entry, row, found, counts)
                else:
                    _segment(np.float32, places, room, rows, n, at, scratch, channel, entry, row, found, counts)
                if one_block:
                    _flush(sums, n, channel_pool, entry[0], rows, channel)
            if valid:
                valid_rows += rows
                counts[ELEMENTS] += rows * channels
                head_entry = (head_pool.before + h) // head_pool.group
                for j in range(rows):
                    token_entry = (token_pool.before + i + j) // token_pool.group
                    for k in range(5):
                        token[k, token_entry] += row[j, k]
                        head[k, head_entry] += row[j, k]
            i += rows
        if not one_block:
            for first in range(0, channels, SEGMENT):
                n = min(SEGMENT, channels - first)
                sums = _at(blocks + 32 * PITCH * (first // SEGMENT), np.float64)
                _flush(sums, n, channel_pool, h * channels + first, valid_rows, channel)
    for bin_ in range(BINS):
        total = 0
        for lane in range(LANES):
            total += lanes[bin_ * LANES + lane]
        histogram[bin_] += total
    histogram[0] -= counts[DROPPED]


def work_size(sizes: tuple[int, int, int, int], pool: Pool) -> int:
    """Float64s of work space that `scan` needs for a box."""
    batch, _, tokens, channels = sizes
    blocks = 1 if batch * tokens == 1 or pool.group > 1 else -(-channels // SEGMENT)
    return WORK + 4 * PITCH * blocks
