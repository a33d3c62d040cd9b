"""Parts of the GPU kernel: reading values, counting in bits, sums over the threads of a warp."""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT32, FLOAT64, BFLOAT16, FLOAT16, TABLE, SIGNED, UNSIGNED = (tl.constexpr(i) for i in range(7))
"""How values are stored, in signed integers of their size. `TABLE`: one byte, an index into 256 float32."""

EXPONENTS = tl.constexpr(2048)

PLANES = tl.constexpr(13)
"""Digits of a thread's counters."""

MOST_COUNTED = (1 << PLANES.value) - 1
"""Elements that a thread may go over."""

FLOATS, INTEGERS = tl.constexpr(8), tl.constexpr(4)
"""Figures of a program: sum and maximum of |c - r|, range of either side, maximum of |c - r| at padded tokens;
place of the maximum in canonical order, non-finite values of either side, whether bits differ."""


def _sixteen_sums() -> str:
    """PTX that sums sixteen float64 of each thread over its warp. Where every sum for itself would take five
    exchanges, threads first share the sums out: in each step a thread keeps half of what it has and is
    given its partner's share of that half. Results: one sum, and which."""
    lines = [".reg .pred p;", ".reg .b32 lane, bit, lo, hi;", ".reg .f64 keep, send;"]
    lines += [f".reg .f64 x<{16}>;", "mov.u32 lane, %laneid;"]
    lines += [f"mov.f64 x{i}, ${i + 2};" for i in range(16)]
    for half, lane in ((8, 16), (4, 8), (2, 4), (1, 2)):
        lines += [f"and.b32 bit, lane, {lane};", "setp.ne.b32 p, bit, 0;"]
        for i in range(half):
            lines += [
                f"selp.f64 keep, x{i + half}, x{i}, p;",
                f"selp.f64 send, x{i}, x{i + half}, p;",
                *_exchange("send", lane),
                f"add.f64 x{i}, keep, send;",
            ]
    lines += ["mov.f64 send, x0;", *_exchange("send", 1), "add.f64 $0, x0, send;", "shr.u32 $1, lane, 1;"]
    return "{" + " ".join(lines) + "}"


def _exchange(name: str, lane: int) -> list[str]:
    swap = [f"shfl.sync.bfly.b32 {word}, {word}, {lane}, 31, -1;" for word in ("lo", "hi")]
    return [f"mov.b64 {{lo, hi}}, {name};", *swap, f"mov.b64 {name}, {{lo, hi}};"]


SIXTEEN_SUMS = tl.constexpr(_sixteen_sums())
SIXTEEN_OPERANDS = tl.constexpr("=d,=r" + ",d" * 16)

NOWHERE = tl.constexpr((1 << 63) - 1)


@triton.jit
def _full(a, b, c):
    """Sum and carry of three binary digits."""
    return a ^ b ^ c, (a & b) | (c & (a ^ b))


@triton.jit
def plus(a, b, LONG: tl.constexpr, SHORT: tl.constexpr):
    """Adds binary numbers of `LONG` and `SHORT` digits, in `LONG` digits."""
    total = ()
    carry = a[0] & b[0]
    total = total + (a[0] ^ b[0],)
    for p in tl.static_range(1, SHORT):
        digit, carry = _full(a[p], b[p], carry)
        total = total + (digit,)
    for p in tl.static_range(SHORT, LONG):
        total = total + (a[p] ^ carry,)
        carry = a[p] & carry
    return total


@triton.jit
def _sum(a, b, N: tl.constexpr):
    """Adds binary numbers of `N` digits: `N + 1` digits."""
    total = (a[0] ^ b[0],)
    carry = a[0] & b[0]
    for p in tl.static_range(1, N):
        digit, carry = _full(a[p], b[p], carry)
        total = total + (digit,)
    return total + (carry,)


@triton.jit
def _halve(x, N: tl.constexpr):
    """Both halves of `[..., N]`: even and odd places."""
    return tl.split(tl.reshape(x, (x.shape[0], N // 2, 2)))


@triton.jit
def digits_of(words, LOG: tl.constexpr):
    """Sums over the last axis of `[m, 2^LOG]`, bit by bit: `LOG + 1` planes `[m]`."""
    planes = (words,)
    for level in tl.static_range(LOG):
        even, odd = _halve(planes[0], 1 << (LOG - level))
        total = (even ^ odd,)
        carry = even & odd
        for p in tl.static_range(1, level + 1):
            even, odd = _halve(planes[p], 1 << (LOG - level))
            digit, carry = _full(even, odd, carry)
            total = total + (digit,)
        planes = total + (carry,)
    result = ()
    for p in tl.static_range(LOG + 1):
        result = result + (tl.reshape(planes[p], (words.shape[0],)),)
    return result


@triton.jit
def any_bit(words, LOG: tl.constexpr):
    """Whatever bit is set anywhere in the last axis of `[m, 2^LOG]`: `[m]`."""
    for level in tl.static_range(LOG):
        even, odd = _halve(words, 1 << (LOG - level))
        words = even | odd
    return tl.reshape(words, (words.shape[0],))


@triton.jit
def zeros(M: tl.constexpr, BITS: tl.constexpr):
    planes = ()
    for _ in tl.static_range(PLANES):
        planes = planes + (tl.zeros((M,), tl.int64 if BITS == 64 else tl.int32),)
    return planes


@triton.jit
def own(x, NT: tl.constexpr, V: tl.constexpr):
    """A row of a strip as `[NT, V]`: what one thread has read is one row."""
    return tl.reshape(x, (NT, V))


@triton.jit
def sum_rows(digits, BR: tl.constexpr, N: tl.constexpr):
    """Adds `BR` binary numbers of `N` digits: `N + log2(BR)` digits."""
    tl.static_assert(BR == 1 or BR == 2 or BR == 4)
    if BR == 1:
        result = digits[0]
    elif BR == 2:
        result = _sum(digits[0], digits[1], N)
    else:
        result = _sum(_sum(digits[0], digits[1], N), _sum(digits[2], digits[3], N), N + 1)
    return result


@triton.jit
def values_of(raw, table, KIND: tl.constexpr, WIDE: tl.constexpr):
    """Values of what is stored: as float32, or as float64 if `WIDE`."""
    if KIND == FLOAT32:
        values = raw.to(tl.float32, bitcast=True)
    elif KIND == FLOAT64:
        values = raw.to(tl.float64, bitcast=True)
    elif KIND == BFLOAT16:
        values = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == FLOAT16:
        values = raw.to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == TABLE:
        values = tl.load(table + (raw.to(tl.int32) & 255))
    elif KIND == UNSIGNED:
        if raw.dtype == tl.int64:
            values = raw.to(tl.uint64, bitcast=True).to(tl.float64)
        elif raw.dtype == tl.int32:
            values = raw.to(tl.uint32, bitcast=True).to(tl.float64)
        elif raw.dtype == tl.int16:
            values = raw.to(tl.uint16, bitcast=True).to(tl.float32)
        else:
            values = raw.to(tl.uint8, bitcast=True).to(tl.float32)
    else:
        values = raw.to(tl.float64 if WIDE else tl.float32)
    return values.to(tl.float64) if WIDE else values


@triton.jit
def finite(values):
    return tl.abs(values) < float("inf")


@triton.jit
def _offsets(members, inner, outer_step, inner_step, FLAT: tl.constexpr):
    """Where members of an axis start that is two flattened into one, `inner` members of the inner one to each of
    the outer; `FLAT`: these follow each other in memory in equal steps."""
    if FLAT:
        return tl.cast(members, tl.int64) * inner_step
    return tl.cast(members // inner, tl.int64) * outer_step + tl.cast(members % inner, tl.int64) * inner_step


@triton.jit
def columns_at(side, columns, sizes, FLAT: tl.constexpr):
    """Addresses of columns in row 0; `side` is (address, steps of batch, head, token and channel, table)."""
    return side[0] + _offsets(columns, sizes[2], side[2], side[4], FLAT)


@triton.jit
def load(side, at, row, inside, sizes, FLAT: tl.constexpr, WHOLE: tl.constexpr):
    """What is stored in a row of one side, zero bits where not `inside`; `at`: addresses of columns."""
    addresses = at + _offsets(row, sizes[1], side[1], side[3], FLAT)
    if WHOLE:
        raw = tl.load(addresses, eviction_policy="evict_first")
    else:
        raw = tl.load(addresses, mask=inside, other=0, eviction_policy="evict_first")
    return raw


@triton.jit
def errors_of(
    ref, cand, at, row, inside, sizes,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """|c - r| of a row; -1 where a side is not finite or not `inside`."""
    r = values_of(load(ref, at[0], row, inside, sizes, FLAT & 1, False), ref[5], REF, WIDE)
    c = values_of(load(cand, at[1], row, inside, sizes, FLAT & 2, False), cand[5], CAND, WIDE)
    used = inside & finite(r) & finite(c)
    return tl.where(used, tl.abs(c.to(tl.float64) - r.to(tl.float64)), -1.0)


@triton.jit
def is_valid(mask, row, end, MASKED: tl.constexpr):
    """Whether a row is one that counts."""
    if MASKED:
        return (row < end) & (tl.load(mask + row, mask=row < end, other=0) != 0)
    return row < end


@triton.jit
def exponents_of(errors):
    """The exponents of float64 numbers that are not negative."""
    return (errors.to(tl.int64, bitcast=True) >> 32).to(tl.int32) >> 20


@triton.jit
def words_of(exponents, BITS: tl.constexpr):
    """One bit for each exponent; none for 0."""
    one = ((0 - exponents).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    if BITS == 64:
        words = one.to(tl.int64) << (exponents & 63).to(tl.int64)
    else:
        words = one << (exponents & 31)
    return words


@triton.jit
def tally(planes, top, histogram, BITS: tl.constexpr):
    """Adds the counters of all threads to the histogram, for exponents from `top - BITS + 1` to `top`."""
    bits = tl.arange(0, BITS)
    counts = tl.zeros((BITS,), tl.int32)
    for p in tl.static_range(PLANES):
        digits = (planes[p][:, None] >> bits[None, :].to(planes[p].dtype)) & 1
        counts += tl.sum(digits.to(tl.int32), axis=0) << p
    exponents = top - ((top - bits) & (BITS - 1))
    tl.atomic_add(
        histogram + exponents, counts.to(tl.int64), mask=(exponents > 0) & (counts > 0), sem="relaxed"
    )


@triton.jit
def store_rows(
    sums, to, start, end, NT: tl.constexpr, BR: tl.constexpr, CAREFUL: tl.constexpr, SHUFFLE: tl.constexpr
):  # fmt: skip
    """Stores sums of rows from `start` on, over the columns of each warp.

    Args:
        sums: four of each row, `[NT]`.
        to: where warps `[NT]` keep the sums of row 0.
    """
    if SHUFFLE and BR == 4:
        total, which = tl.inline_asm_elementwise(
            SIXTEEN_SUMS, SIXTEEN_OPERANDS, sums, (tl.float64, tl.int32), is_pure=False, pack=1
        )
        row = start + which // 4
        address = to + row.to(tl.int64) * 4 + which % 4
        if CAREFUL:
            tl.store(address, total, mask=row < end)
        else:
            tl.store(address, total)
    else:
        first = tl.max(tl.reshape(to.to(tl.int64), (NT // 32, 32)), axis=1).to(to.dtype)
        rows = start + tl.zeros((NT // 32,), tl.int64)
        first += 4 * rows
        for u in tl.static_range(BR):
            for k in tl.static_range(4):
                total = tl.sum(tl.reshape(sums[4 * u + k], (NT // 32, 32)), axis=1)
                tl.store(first + (4 * u + k), total, mask=rows + u < end)
