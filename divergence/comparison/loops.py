"""Loops over one segment of a row, compiled; `kernel` puts them together.

Values are addressed by integers and pointers, so that one specialisation serves every dtype and layout
of memory; what computes is specialised for float32 and float64 only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SEGMENT = 2048
"""Elements of a row that are worked on at a time; a multiple of `LANES`."""

PITCH = SEGMENT + 8
"""Distance of the four sums in a block of channel sums: a power of two would make their addresses
look alike to the processor's store queue."""

BINS = 2048
"""Of the histogram: the exponents of float64."""

LANES = 8
"""Copies of the histogram, so that increments of one bin do not wait for each other."""

REORDER = {"reassoc", "contract", "nsz"}
"""Freedom to add in vector lanes. NaN and infinities keep their meaning."""

INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""Options of what is called from compiled code only: less to compile."""

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


class Pool(NamedTuple):
    """Each `group` members of an axis make one entry; `before` of the first entry's lie before the box."""

    group: int
    before: int


class Place(NamedTuple):
    """Where a segment of a row stands, and what comes next.

    Attributes:
        number: position of its first element in the box.
        ref_next, cand_next: addresses of what is read next.
        itemsize: bytes of a value of both sides; 0 where they do not lie side by side.
    """

    number: int
    ref_next: int
    cand_next: int
    itemsize: int


@intrinsic
def at(_: Any, address: Any, kind: Any) -> Any:
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


@intrinsic
def prefetch(_: Any, address: Any) -> Any:  # noqa: ARG001 - seen by numba
    """Asks for the cache line at an address, in the second-level cache; any address will do."""

    def generate(_: Any, builder: Any, __: Any, args: Any) -> Any:
        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, outer, data = flag(0), flag(2), flag(1)
        builder.call(function, [builder.inttoptr(args[0], pointer), read, outer, data])
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(types.int64), generate


least = _extreme("llvm.minnum")
most = _extreme("llvm.maxnum")


@njit(**INNER)
def _copy(source: Any, step: int, out: Any, n: int) -> None:
    for j in range(n):
        out[j] = source[j * step]


@njit(**INNER)
def _copy_bfloat16(source: Any, step: int, out: Any, n: int) -> None:
    for j in range(n):
        out[j] = np.uint32(source[j * step]) << 16


@njit(**INNER)
def _widen_float16(half: int) -> Any:
    """IEEE 754 binary16 to binary32 without a denormal on the way."""
    magnitude = np.uint32((half & 0x7FFF) << 13)
    exponent = half & 0x7C00
    smallest = np.uint32(113 << 23)
    subnormal = np.uint32(magnitude + smallest).view(np.float32) - smallest.view(np.float32)
    normal = np.uint32(magnitude + (((255 - 31) if exponent == 0x7C00 else (127 - 15)) << 23))
    bits = np.float32(subnormal).view(np.uint32) if exponent == 0 else normal
    return np.uint32(bits | (half & 0x8000) << 16)


@njit(**INNER)
def _copy_float16(source: Any, step: int, out: Any, n: int) -> None:
    for j in range(n):
        out[j] = _widen_float16(source[j * step])


@njit(**INNER)
def _copy_table(source: Any, step: int, table: Any, out: Any, n: int) -> None:
    for j in range(n):
        out[j] = table[source[j * step]]


@njit(**INNER)
def _narrow(side: Side, address: int, work: int, n: int) -> int:
    """The address of `n` values as float32: in place, or in `work`."""
    step = side.channel
    if side.kind == FLOAT32:
        if step == 1:
            return address
        _copy(at(address, np.float32), step, at(work, np.float32), n)
    elif side.kind == BFLOAT16:
        _copy_bfloat16(at(address, np.uint16), step, at(work, np.uint32), n)
    elif side.kind == FLOAT16:
        _copy_float16(at(address, np.uint16), step, at(work, np.uint32), n)
    elif side.kind == TABLE:
        _copy_table(at(address, np.uint8), step, at(side.table, np.float32), at(work, np.float32), n)
    elif side.kind == INT16:
        _copy(at(address, np.int16), step, at(work, np.float32), n)
    else:
        _copy(at(address, np.uint16), step, at(work, np.float32), n)
    return work


@njit(**INNER)
def load(side: Side, address: int, work: int, n: int, wide: bool) -> int:
    """The address of `n` values, as float64 if `wide`, else as float32: in place, or in `work`."""
    if not wide:
        return _narrow(side, address, work, n)
    step = side.channel
    out = at(work, np.float64)
    if side.kind == FLOAT64:
        if step == 1:
            return address
        _copy(at(address, np.float64), step, out, n)
    elif side.kind == INT32:
        _copy(at(address, np.int32), step, out, n)
    elif side.kind == UINT32:
        _copy(at(address, np.uint32), step, out, n)
    elif side.kind == INT64:
        _copy(at(address, np.int64), step, out, n)
    elif side.kind == UINT64:
        _copy(at(address, np.uint64), step, out, n)
    else:
        narrow = _narrow(side, address, work + 8 * SEGMENT, n)
        _copy(at(narrow, np.float32), 1, out, n)
    return work


@njit(**INNER)
def _equal(one: Any, step: int, other: Any, other_step: int, n: int) -> bool:
    different = 0
    for j in range(n):
        different |= one[j * step] ^ other[j * other_step]
    return different == 0


@njit(**INNER)
def same_bits(ref: Side, ref_at: int, cand: Side, cand_at: int, n: int) -> bool:
    """Whether a segment of both sides, of one dtype, has the same bits."""
    a, b = ref.channel, cand.channel
    if ref.itemsize == 1:
        return _equal(at(ref_at, np.uint8), a, at(cand_at, np.uint8), b, n)
    if ref.itemsize == 2:
        return _equal(at(ref_at, np.uint16), a, at(cand_at, np.uint16), b, n)
    if ref.itemsize == 4:
        return _equal(at(ref_at, np.uint32), a, at(cand_at, np.uint32), b, n)
    return _equal(at(ref_at, np.int64), a, at(cand_at, np.int64), b, n)


@njit(fastmath=REORDER, **INNER)
def survey(values: Any, n: int, zero: Any) -> tuple[bool, float, float]:
    """Whether all values are finite and, where they are, the smallest and the largest: anything times
    zero is zero, but for NaN and infinities."""
    total = zero
    low = high = values[0]
    for j in range(n):
        total += values[j] * zero
        low = least(low, values[j])
        high = most(high, values[j])
    return total == zero, low, high


@njit(**INNER)
def widen(found: Any, low_at: int, low: float, high: float) -> None:
    """Widens the range at `low_at` in the results."""
    found[low_at] = min(found[low_at], low)
    found[low_at + 1] = max(found[low_at + 1], high)


@njit(fastmath=REORDER, **INNER)
def add(
    ref: Any, cand: Any, n: int, sums: Any, exponents: Any
) -> tuple[float, float, float, float, float, Any]:
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


@njit(fastmath=REORDER, **INNER)
def add_two(
    ref: Any, cand: Any, ref_2: Any, cand_2: Any, n: int, sums: Any, exponents: Any
) -> tuple[Any, Any]:
    """`add` for two rows at a time, which halves the traffic to the channel sums. The exponents of the
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


@njit(**INNER)
def tally(exponents: Any, n: int, histogram: Any, place: Place) -> None:
    """Counts exponents, each of `LANES` neighbours in a copy of its own, and fetches meanwhile what comes
    next: counting leaves memory idle, and a processor does not look ahead from one row to another."""
    whole = n & ~(LANES - 1)
    for j in range(0, whole, LANES):
        for lane in range(LANES):
            histogram[exponents[j + lane] * LANES + lane] += 1
        if place.itemsize:
            prefetch(place.ref_next + j * place.itemsize)
            prefetch(place.cand_next + j * place.itemsize)
    for j in range(whole, n):
        histogram[exponents[j] * LANES] += 1


@njit(**INNER)
def first(ref: Any, cand: Any, n: int, error: float) -> int:
    """The first position with that |c - r|."""
    for j in range(n):
        if abs(np.float64(cand[j]) - np.float64(ref[j])) == error:
            return j
    return n


@njit(**INNER)
def largest(ref: Any, cand: Any, n: int, least: float) -> float:
    """The largest |c - r| of finite values, `least` if that is larger."""
    for j in range(n):
        if abs(ref[j]) < np.inf and abs(cand[j]) < np.inf:
            least = max(least, abs(np.float64(cand[j]) - np.float64(ref[j])))
    return least


@njit(**INNER)
def purge(
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
            channel[(pool.before + first + j) // pool.group] -= 1
    return dropped, kept


@njit(fastmath=REORDER, **INNER)
def take(sums: Any, start: int, stop: int) -> float:
    """The sum of a run, which is cleared."""
    total = 0.0
    for i in range(start, stop):
        total += sums[i]
        sums[i] = 0.0
    return total
