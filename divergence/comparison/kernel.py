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

WORK = 3 * SEGMENT + SEGMENT // 4 + BINS * LANES // 2
"""Work space of a call beside the channel sums, in float64s: a segment of each side in float64 and in
float32, exponents in uint16, histogram in uint32."""

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


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """`numba.njit` with its cache, or without where no folder for one can be written."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # "no locator available": neither beside this file nor in the user's cache
            return njit(nogil=True, **options)(function)

    return decorate


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


@_compiled()
def _copy(source: Any, step: int, out: Any, n: int) -> None:
    if step == 1:
        for j in range(n):
            out[j] = source[j]
    else:
        for j in range(n):
            out[j] = source[j * step]


@_compiled()
def _copy_bfloat16(source: Any, step: int, out: Any, n: int) -> None:
    if step == 1:
        for j in range(n):
            out[j] = np.uint32(source[j]) << 16
    else:
        for j in range(n):
            out[j] = np.uint32(source[j * step]) << 16


@_compiled()
def _widen_float16(half: int) -> float:
    """IEEE 754 binary16 to binary32 without a denormal on the way."""
    magnitude = np.uint32((half & 0x7FFF) << 13)
    exponent = half & 0x7C00
    smallest = np.uint32(113 << 23)
    subnormal = np.uint32(magnitude + smallest).view(np.float32) - smallest.view(np.float32)
    normal = np.uint32(magnitude + (((255 - 31) if exponent == 0x7C00 else (127 - 15)) << 23))
    bits = np.float32(subnormal).view(np.uint32) if exponent == 0 else normal
    return np.uint32(bits | (half & 0x8000) << 16)


@_compiled()
def _copy_float16(source: Any, step: int, out: Any, n: int) -> None:
    if step == 1:
        for j in range(n):
            out[j] = _widen_float16(source[j])
    else:
        for j in range(n):
            out[j] = _widen_float16(source[j * step])


@_compiled()
def _copy_table(source: Any, step: int, table: Any, out: Any, n: int) -> None:
    for j in range(n):
        out[j] = table[source[j * step]]


@_compiled()
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


@_compiled()
def _wide(side: Side, address: int, work: int, n: int) -> int:
    """The address of `n` values as float64: in place, or in `work`."""
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


@_compiled()
def _equal(one: Any, step: int, other: Any, other_step: int, n: int) -> bool:
    different = 0
    for j in range(n):
        different |= one[j * step] ^ other[j * other_step]
    return different == 0


@_compiled()
def _same_bits(ref: Side, ref_at: int, cand: Side, cand_at: int, n: int) -> bool:
    a, b = ref.channel, cand.channel
    if ref.itemsize == 1:
        return _equal(_at(ref_at, np.uint8), a, _at(cand_at, np.uint8), b, n)
    if ref.itemsize == 2:
        return _equal(_at(ref_at, np.uint16), a, _at(cand_at, np.uint16), b, n)
    if ref.itemsize == 4:
        return _equal(_at(ref_at, np.uint32), a, _at(cand_at, np.uint32), b, n)
    return _equal(_at(ref_at, np.int64), a, _at(cand_at, np.int64), b, n)


@_compiled()
def _finite(values: Any, n: int) -> bool:
    bad = 0
    for j in range(n):
        bad += not abs(values[j]) < np.inf
    return bad == 0


@_compiled()
def _extent(values: Any, n: int, found: Any, low_at: int) -> None:
    """Widens the range at `found[low_at : low_at + 2]` to finite values."""
    low = high = values[0]
    for j in range(n):
        low = _least(low, values[j])
        high = _most(high, values[j])
    found[low_at] = min(found[low_at], low)
    found[low_at + 1] = max(found[low_at + 1], high)


@_compiled(fastmath={"reassoc", "contract", "nsz"})
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


@_compiled()
def _tally(exponents: Any, n: int, histogram: Any) -> None:
    """Counts exponents, each of `LANES` neighbours in a copy of its own."""
    whole = n & ~(LANES - 1)
    for j in range(0, whole, LANES):
        for lane in range(LANES):
            histogram[exponents[j + lane] * LANES + lane] += 1
    for j in range(whole, n):
        histogram[exponents[j] * LANES] += 1


@_compiled()
def _first(ref: Any, cand: Any, n: int, error: float) -> int:
    """The first position with that |c - r|."""
    for j in range(n):
        if abs(np.float64(cand[j]) - np.float64(ref[j])) == error:
            return j
    return n


@_compiled()
def _largest(ref: Any, cand: Any, n: int, least: float) -> float:
    """The largest |c - r| of finite values, `least` if that is larger."""
    for j in range(n):
        if abs(ref[j]) < np.inf and abs(cand[j]) < np.inf:
            least = max(least, abs(np.float64(cand[j]) - np.float64(ref[j])))
    return least


@_compiled()
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


@_compiled()
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
    j = 0
    while j < n:
        entry, phase = divmod(pool.before + first + j, pool.group)
        stop = min(n, j + pool.group - phase)
        channel[0, entry] += rows * (stop - j)
        for k in range(4):
            total = 0.0
            for i in range(k * PITCH + j, k * PITCH + stop):
                total += sums[i]
                sums[i] = 0.0
            channel[k + 1, entry] += total
        j = stop


@_compiled()
def _segment(
    ref: Any, cand: Any, spare: Any, n: int, at: int, scratch: Any, channel: Any, entry: Any, row: Any, found: Any, counts: Any
) -> None:
    """Adds a segment of a valid row.

    Args:
        ref, cand, n: the values.
        spare: where values of each side may be written.
        at: position of the first in the box.
        scratch: sums, exponents and histogram.
        channel, entry: for `_purge`.
        row: the fields of `metrics.AxisSums`, to be added to.
        found, counts: results of `scan`.
    """
    sums, exponents, histogram = scratch
    dropped, kept = 0, 0
    if _finite(ref, n) and _finite(cand, n):
        _extent(ref, n, found, REF_LOW)
        _extent(cand, n, found, CAND_LOW)
    else:
        dropped, kept = _purge(ref, cand, n, spare, channel, entry, found, counts)
        ref, cand = spare
    if dropped == n:
        return
    absolute, err2, ref2, cand2, dot, top = _add(ref, cand, n, sums, exponents)
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


@_compiled()
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
    places = (base, base + 12 * SEGMENT)
    exponents = _at(base + 24 * SEGMENT, np.uint16)
    lanes = _at(base + 26 * SEGMENT, np.uint32)
    blocks = base + 26 * SEGMENT + 4 * BINS * LANES
    wide = ref.kind in WIDE or cand.kind in WIDE
    one_block = batch * tokens == 1 or channel_pool.group > 1
    row = np.zeros(5)
    for h in range(heads):
        rows = 0
        for bt in range(batch * tokens):
            b, t = divmod(bt, tokens)
            ref_at = ref.address + (b * ref.batch + h * ref.head + t * ref.token) * ref.itemsize
            cand_at = cand.address + (b * cand.batch + h * cand.head + t * cand.token) * cand.itemsize
            valid = mask.address == 0 or _at(mask.address + b * mask.batch + t * mask.token, np.uint8)[0] != 0
            row[:] = 0.0
            for first in range(0, channels, SEGMENT):
                n = min(SEGMENT, channels - first)
                r_at = ref_at + first * ref.channel * ref.itemsize
                c_at = cand_at + first * cand.channel * cand.itemsize
                if counts[DIFFERENT] == 0 and not _same_bits(ref, r_at, cand, c_at, n):
                    counts[DIFFERENT] = 1
                block = blocks if one_block else blocks + 32 * PITCH * (first // SEGMENT)
                scratch = (_at(block, np.float64), exponents, lanes)
                at = ((b * heads + h) * tokens + t) * channels + first
                entry = (h * channels + first, channel_pool)
                if wide:
                    r = _at(_wide(ref, r_at, places[0], n), np.float64)
                    c = _at(_wide(cand, c_at, places[1], n), np.float64)
                    if valid:
                        spare = (_at(places[0], np.float64), _at(places[1], np.float64))
                        _segment(r, c, spare, n, at, scratch, channel, entry, row, found, counts)
                    else:
                        found[PADDED] = _largest(r, c, n, found[PADDED])
                else:
                    x = _at(_narrow(ref, r_at, places[0], n), np.float32)
                    y = _at(_narrow(cand, c_at, places[1], n), np.float32)
                    if valid:
                        room = (_at(places[0], np.float32), _at(places[1], np.float32))
                        _segment(x, y, room, n, at, scratch, channel, entry, row, found, counts)
                    else:
                        found[PADDED] = _largest(x, y, n, found[PADDED])
                if one_block and valid:
                    _flush(scratch[0], n, channel_pool, entry[0], 1, channel)
            if valid:
                rows += 1
                counts[ELEMENTS] += channels
                place = (token_pool.before + bt) // token_pool.group
                head_place = (head_pool.before + h) // head_pool.group
                for k in range(5):
                    token[k, place] += row[k]
                    head[k, head_place] += row[k]
        if not one_block:
            for first in range(0, channels, SEGMENT):
                sums = _at(blocks + 32 * PITCH * (first // SEGMENT), np.float64)
                n = min(SEGMENT, channels - first)
                _flush(sums, n, channel_pool, h * channels + first, rows, channel)
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
