"""The GPU kernel: both tensors as matrices `[row, column]`, read once.

A row is a token (batch and token, flattened), a column a channel of a head (head and channel, flattened).
A program goes down a strip of `BC` columns, `BR` rows at a time: sums of columns stay in registers, those of
rows are stored. It assumes that all values are finite; where they turn out not to be, or the strip is cut off
by an edge or has padded rows, it goes over the strip in the careful way.

The histogram of errors is counted in bits. Bit k mod `BITS` of a word stands for exponent k; words are added
up position by position, as binary numbers whose digits are spread over planes: plane p holds the digits of
weight 2^p of all counters. Which k a bit meant is known if the exponents of a strip span less than `BITS`
powers of two, as nearly always; else the strip is gone over once for each `BITS` of them.

Nothing depends on the order in which programs run: partial sums have places of their own, and only integers
are added atomically.
"""

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
def _plus(a, b, LONG: tl.constexpr, SHORT: tl.constexpr):
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
def _digits(words, LOG: tl.constexpr):
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
def _any_bit(words, LOG: tl.constexpr):
    """Whatever bit is set anywhere in the last axis of `[m, 2^LOG]`: `[m]`."""
    for level in tl.static_range(LOG):
        even, odd = _halve(words, 1 << (LOG - level))
        words = even | odd
    return tl.reshape(words, (words.shape[0],))


@triton.jit
def _zeros(M: tl.constexpr, BITS: tl.constexpr):
    planes = ()
    for _ in tl.static_range(PLANES):
        planes = planes + (tl.zeros((M,), tl.int64 if BITS == 64 else tl.int32),)
    return planes


@triton.jit
def _own(x, NT: tl.constexpr, P: tl.constexpr, V: tl.constexpr):
    """A row of a strip as `[NT, P V]`: what one thread has read is one row."""
    return tl.reshape(tl.permute(tl.reshape(x, (P, NT, V)), (1, 0, 2)), (NT, P * V))


@triton.jit
def _sum_rows(digits, BR: tl.constexpr, N: tl.constexpr):
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
def _values(raw, table, KIND: tl.constexpr, WIDE: tl.constexpr):
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
def _finite(values):
    return tl.abs(values) < float("inf")


@triton.jit
def _offsets(members, inner, outer_step, inner_step, FLAT: tl.constexpr):
    """Where members of an axis start that is two flattened into one, `inner` members of the inner one to each of
    the outer; `FLAT`: these follow each other in memory in equal steps."""
    if FLAT:
        return tl.cast(members, tl.int64) * inner_step
    return tl.cast(members // inner, tl.int64) * outer_step + tl.cast(members % inner, tl.int64) * inner_step


@triton.jit
def _columns(side, columns, sizes, FLAT: tl.constexpr):
    """Addresses of columns in row 0; `side` is (address, steps of batch, head, token and channel, table)."""
    return side[0] + _offsets(columns, sizes[2], side[2], side[4], FLAT)


@triton.jit
def _load(side, at, row, inside, sizes, FLAT: tl.constexpr, WHOLE: tl.constexpr):
    """What is stored in a row of one side, zero bits where not `inside`; `at`: addresses of columns."""
    addresses = at + _offsets(row, sizes[1], side[1], side[3], FLAT)
    if WHOLE:
        raw = tl.load(addresses, eviction_policy="evict_first")
    else:
        raw = tl.load(addresses, mask=inside, other=0, eviction_policy="evict_first")
    return raw


@triton.jit
def _errors(
    ref, cand, at, row, inside, sizes,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """|c - r| of a row; -1 where a side is not finite or not `inside`."""
    r = _values(_load(ref, at[0], row, inside, sizes, FLAT & 1, False), ref[5], REF, WIDE)
    c = _values(_load(cand, at[1], row, inside, sizes, FLAT & 2, False), cand[5], CAND, WIDE)
    used = inside & _finite(r) & _finite(c)
    return tl.where(used, tl.abs(c.to(tl.float64) - r.to(tl.float64)), -1.0)


@triton.jit
def _valid(mask, row, end, MASKED: tl.constexpr):
    """Whether a row is one that counts."""
    if MASKED:
        return (row < end) & (tl.load(mask + row, mask=row < end, other=0) != 0)
    return row < end


@triton.jit
def _exponents(errors):
    """The exponents of float64 numbers that are not negative."""
    return (errors.to(tl.int64, bitcast=True) >> 32).to(tl.int32) >> 20


@triton.jit
def _words(exponents, BITS: tl.constexpr):
    """One bit for each exponent; none for 0."""
    one = ((0 - exponents).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    if BITS == 64:
        words = one.to(tl.int64) << (exponents & 63).to(tl.int64)
    else:
        words = one << (exponents & 31)
    return words


@triton.jit
def _tally(planes, top, histogram, BITS: tl.constexpr):
    """Adds the counters of all threads to the histogram, for exponents from `top - BITS + 1` to `top`."""
    bits = tl.arange(0, BITS)
    counts = tl.zeros((BITS,), tl.int32)
    for p in tl.static_range(PLANES):
        digits = (planes[p][:, None] >> bits[None, :].to(planes[p].dtype)) & 1
        counts += tl.sum(digits.to(tl.int32), axis=0) << p
    exponents = top - ((top - bits) & (BITS - 1))
    tl.atomic_add(histogram + exponents, counts.to(tl.int64), mask=(exponents > 0) & (counts > 0), sem="relaxed")



@triton.jit
def _store_rows(
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


@triton.jit
def _windows(
    ref, cand, strip, sizes, mask, top, histogram,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, MASKED: tl.constexpr,
    NT: tl.constexpr, P: tl.constexpr, V: tl.constexpr, LOG: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Counts the exponents of a strip's errors from `top` down, `BITS` of them at a time."""
    columns = strip[2] + tl.arange(0, NT * P * V)
    at = _columns(ref, columns, sizes, FLAT & 4), _columns(cand, columns, sizes, FLAT & 8)
    while top > 0:
        planes = _zeros(NT, BITS)
        below = tl.zeros((NT,), tl.int32)
        for row in range(strip[0], strip[1]):
            used = columns < tl.where(_valid(mask, row, strip[1], MASKED), strip[3], 0)
            errors = _errors(ref, cand, at, row, used, sizes, REF, CAND, WIDE, FLAT)
            exponents = _own(_exponents(tl.maximum(errors, 0.0)), NT, P, V)
            within = (exponents <= top) & (exponents > top - BITS)
            words = _words(tl.where(within, exponents, 0), BITS)
            planes = _plus(planes, _digits(words, LOG), PLANES, LOG + 1)
            below = tl.maximum(below, tl.max(tl.where(exponents <= top - BITS, exponents, 0), axis=1))
        _tally(planes, top, histogram, BITS)
        top = tl.max(below)


@triton.jit
def _finish(
    ref, cand, strip, sizes, mask, out, absolute, moments, extremes, counts, largest, exponents,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, MASKED: tl.constexpr,
    CAREFUL: tl.constexpr, NT: tl.constexpr, P: tl.constexpr, V: tl.constexpr, LOG: tl.constexpr,
    BR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Stores what was found in a strip."""
    histogram, dropped, groups, row_sums, column_sums, floats, integers = out
    worst, worst_at, again, low_bits = largest
    planes, least = exponents
    high_bits = tl.max(worst)
    tl.store(floats, absolute)
    tl.store(floats + 2, tl.min(extremes[0]).to(tl.float64))
    tl.store(floats + 3, tl.max(extremes[1]).to(tl.float64))
    tl.store(floats + 4, tl.min(extremes[2]).to(tl.float64))
    tl.store(floats + 5, tl.max(extremes[3]).to(tl.float64))
    tl.store(floats + 6, tl.max(extremes[4]))
    # `worst` is the upper half of the largest error's bits. Its first tile has the largest error, unless later ones
    # have the same upper half and lower halves that matter: then all rows are looked at.
    chosen = worst == high_bits
    first, count = worst_at, BR
    if (tl.max(tl.where(chosen, again, 0)) > 0) & (tl.max((low_bits != 0).to(tl.int32)) > 0):
        first, count = tl.zeros((NT,), tl.int32) + strip[0], strip[1] - strip[0]
        chosen = worst >= 0
    # In a column rows are in canonical order.
    columns = _own(strip[2] + tl.arange(0, NT * P * V), NT, P, V)
    here = columns < strip[3]
    place = tl.full((NT, P * V), NOWHERE, tl.int64)
    error = tl.full((NT, P * V), -1.0, tl.float64)
    head, channel = columns // sizes[2], columns % sizes[2]
    at = _columns(ref, columns, sizes, FLAT & 4), _columns(cand, columns, sizes, FLAT & 8)
    for u in range(count):
        row = (first + u)[:, None]
        used = here & chosen[:, None] & _valid(mask, row, strip[1], MASKED)
        now = _errors(ref, cand, at, row, used, sizes, REF, CAND, WIDE, FLAT)
        batch, token = row // sizes[1], row % sizes[1]
        number = ((batch.to(tl.int64) * sizes[0] + head) * sizes[1] + token) * sizes[2] + channel
        place = tl.where(now > error, number, place)
        error = tl.maximum(error, now)
    top = tl.max(tl.max(error, axis=1), axis=0)
    tl.store(floats + 1, top)
    tl.store(integers, tl.min(tl.min(tl.where(error == top, place, NOWHERE), axis=1), axis=0))
    tl.store(integers + 1, tl.sum(counts[0]).to(tl.int64))
    tl.store(integers + 2, tl.sum(counts[1]).to(tl.int64))
    tl.store(integers + 3, tl.max((counts[2] != 0).to(tl.int32), axis=0).to(tl.int64))
    tl.store(column_sums + 4 * columns.to(tl.int64) + 0, moments[0], mask=here)
    tl.store(column_sums + 4 * columns.to(tl.int64) + 1, moments[1], mask=here)
    tl.store(column_sums + 4 * columns.to(tl.int64) + 2, moments[2], mask=here)
    tl.store(column_sums + 4 * columns.to(tl.int64) + 3, moments[3], mask=here)
    if CAREFUL:
        lost = here & (counts[3] > 0)
        lost_here = counts[3].to(tl.int64)
        tl.atomic_add(dropped[1] + columns // groups[1], lost_here, mask=lost, sem="relaxed")
        tl.atomic_add(dropped[2] + head // groups[2], lost_here, mask=lost, sem="relaxed")
    highest = high_bits >> 20
    lowest = tl.min(least).to(tl.int64) + 1
    if highest > 0:
        if highest - lowest < BITS:
            _tally(planes, highest, histogram, BITS)
        else:
            _windows(
                ref, cand, strip, sizes, mask, highest, histogram,
                REF, CAND, WIDE, FLAT, MASKED, NT, P, V, LOG, BITS,
            )  # fmt: skip


@triton.jit
def _scan(
    ref, cand, strip, sizes, mask, out,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, SHUFFLE: tl.constexpr, NT: tl.constexpr, P: tl.constexpr,
    V: tl.constexpr, LOG: tl.constexpr, BR: tl.constexpr, LOG_BR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Goes over one strip.

    Args:
        ref, cand: as `side` in `_columns`.
        strip: first row, end of rows, first column, end of columns.
        sizes: numbers of heads, tokens and channels.
        mask: a byte for each row.
        out: see `compare`.

    Returns:
        1 where a value was not finite and it was not careful; what it has stored is then void.
    """
    histogram, dropped, groups, row_sums, column_sums, floats, integers = out
    columns = strip[2] + tl.arange(0, NT * P * V)
    at = _columns(ref, columns, sizes, FLAT & 4), _columns(cand, columns, sizes, FLAT & 8)
    kind = tl.float64 if WIDE else tl.float32
    err2, ref2, cand2, dot = (tl.zeros((NT, P * V), tl.float64),) * 4
    total = tl.zeros((NT,), tl.float64)
    worst = tl.full((NT,), -1, tl.int32)
    worst_at = tl.zeros((NT,), tl.int32)
    again = tl.zeros((NT,), tl.int32)
    low_bits = tl.zeros((NT,), tl.int32)
    ref_low = tl.full((NT,), float("inf"), kind)
    ref_high = tl.full((NT,), float("-inf"), kind)
    cand_low = ref_low
    cand_high = ref_high
    different = tl.zeros((NT,), tl.int32)
    least = tl.full((NT,), 0xFFFFFFFF, tl.uint32)
    planes = _zeros(NT, BITS)
    padded = tl.full((NT,), -1.0, tl.float64)
    ref_bad = tl.zeros((NT,), tl.int32)
    cand_bad = tl.zeros((NT,), tl.int32)
    column_dropped = tl.zeros((NT, P * V), tl.int32)
    for start in range(strip[0], strip[1], BR):
        raw, digits, sums = (), (), ()
        largest = tl.full((NT,), -1, tl.int32)
        for u in tl.static_range(BR):
            row = start + u
            inside = columns < tl.where(row < strip[1], strip[3], 0)
            one = _load(ref, at[0], row, inside, sizes, FLAT & 1, not CAREFUL)
            other = _load(cand, at[1], row, inside, sizes, FLAT & 2, not CAREFUL)
            raw = raw + (one, other)
        for u in tl.static_range(BR):
            row = start + u
            r = _own(_values(raw[2 * u], ref[5], REF, WIDE), NT, P, V)
            c = _own(_values(raw[2 * u + 1], cand[5], CAND, WIDE), NT, P, V)
            if SAME:
                bits = _any_bit(_own(raw[2 * u] ^ raw[2 * u + 1], NT, P, V), LOG)
                different |= (bits != 0).to(tl.int32) if bits.dtype == tl.int64 else bits.to(tl.int32)
            low, high, other_low, other_high = r, r, c, c
            if CAREFUL:
                mine = _own(columns, NT, P, V)
                inside = mine < tl.where(row < strip[1], strip[3], 0)
                valid = mine < tl.where(_valid(mask, row, strip[1], MASKED), strip[3], 0)
                ref_ok, cand_ok = _finite(r), _finite(c)
                used = valid & ref_ok & cand_ok
                if MASKED:
                    off = tl.abs(c.to(tl.float64) - r.to(tl.float64))
                    off = tl.where(inside & ~valid & ref_ok & cand_ok, off, -1.0)
                    padded = tl.maximum(padded, tl.max(off, axis=1))
                ref_bad += tl.sum((valid & ~ref_ok).to(tl.int32), axis=1)
                cand_bad += tl.sum((valid & ~cand_ok).to(tl.int32), axis=1)
                missing = (inside & ~used).to(tl.int32)
                column_dropped += missing
                row_dropped = tl.sum(tl.sum(missing, axis=1), axis=0).to(tl.int64)
                tl.atomic_add(dropped[0] + row // groups[0], row_dropped, mask=row_dropped > 0, sem="relaxed")
                ref_ok, cand_ok = valid & ref_ok, valid & cand_ok
                low, high = tl.where(ref_ok, r, float("inf")), tl.where(ref_ok, r, float("-inf"))
                other_low, other_high = tl.where(cand_ok, c, float("inf")), tl.where(cand_ok, c, float("-inf"))
                r, c = tl.where(used, r, 0.0), tl.where(used, c, 0.0)
            ref_low = tl.minimum(ref_low, tl.min(low, axis=1))
            ref_high = tl.maximum(ref_high, tl.max(high, axis=1))
            cand_low = tl.minimum(cand_low, tl.min(other_low, axis=1))
            cand_high = tl.maximum(cand_high, tl.max(other_high, axis=1))
            r, c = r.to(tl.float64), c.to(tl.float64)
            d = c - r
            errors = tl.abs(d)
            bits = errors.to(tl.int64, bitcast=True)
            high_bits = (bits >> 32).to(tl.int32)
            low_bits |= _any_bit(bits.to(tl.int32), LOG)
            exponents = high_bits >> 20
            least = tl.minimum(least, tl.min((exponents - 1).to(tl.uint32, bitcast=True), axis=1))
            digits = digits + (_digits(_words(exponents, BITS), LOG),)
            total += tl.sum(errors, axis=1)
            sums = sums + (tl.sum(d * d, axis=1), tl.sum(r * r, axis=1), tl.sum(c * c, axis=1), tl.sum(r * c, axis=1))
            err2 = tl.fma(d, d, err2)
            ref2 = tl.fma(r, r, ref2)
            cand2 = tl.fma(c, c, cand2)
            dot = tl.fma(r, c, dot)
            if CAREFUL:
                high_bits = tl.where(used, high_bits, -1)
            largest = tl.maximum(largest, tl.max(high_bits, axis=1))
        planes = _plus(planes, _sum_rows(digits, BR, LOG + 1), PLANES, LOG + LOG_BR + 1)
        _store_rows(sums, row_sums, start, strip[1], NT, BR, CAREFUL, SHUFFLE)
        again = tl.where(largest > worst, 0, again | (largest == worst).to(tl.int32))
        worst_at = tl.where(largest > worst, start, worst_at)
        worst = tl.maximum(worst, largest)
    absolute = tl.sum(total)
    redo = 0
    if not CAREFUL:
        if absolute < float("inf"):
            redo = 0
        else:
            redo = 1
    if redo == 0:
        moments = (err2, ref2, cand2, dot)
        extremes = (ref_low, ref_high, cand_low, cand_high, padded)
        counts = (ref_bad, cand_bad, different, column_dropped)
        _finish(
            ref, cand, strip, sizes, mask, out, absolute, moments, extremes, counts, (worst, worst_at, again, low_bits), (planes, least),
            REF, CAND, WIDE, FLAT, MASKED, CAREFUL, NT, P, V, LOG, BR, BITS,
        )  # fmt: skip
    return redo


@triton.jit(
    do_not_specialize=[
        "ref_batch", "ref_head", "ref_token", "ref_channel", "cand_batch", "cand_head", "cand_token", "cand_channel",
        "heads", "tokens", "channels", "row0", "row_end", "first_column", "column_end", "depth",
        "token_group", "channel_group", "head_group", "number0",
    ],
    do_not_specialize_on_alignment=["mask", "plain"],
)  # fmt: skip
def compare(
    ref, ref_batch, ref_head, ref_token, ref_channel, ref_table,
    cand, cand_batch, cand_head, cand_token, cand_channel, cand_table,
    mask, plain, heads, tokens, channels,
    row0, row_end, first_column, column_end, depth,
    histogram, token_dropped, token_group, channel_dropped, channel_group, head_dropped, head_group,
    row_sums, column_sums, floats, integers, number0,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, SHUFFLE: tl.constexpr, NT: tl.constexpr, P: tl.constexpr,
    V: tl.constexpr, LOG: tl.constexpr, BR: tl.constexpr, LOG_BR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """TODO"""
    number = tl.program_id(0)
    BC: tl.constexpr = NT * P * V
    column0 = first_column * 32
    strips = tl.cdiv(column_end - column0, BC)
    block = number // strips
    place = number % strips
    first = row0 + block * depth
    last = tl.minimum(first + depth, row_end)
    start = column0 + place * BC
    if ALIGNED:  # given in sixteens, so that the compiler knows
        ref_batch, ref_head, ref_token = ref_batch * 16, ref_head * 16, ref_token * 16
        cand_batch, cand_head, cand_token = cand_batch * 16, cand_head * 16, cand_token * 16
        if FLAT & 12 != 12:
            channels = channels * 16
    one = (ref, ref_batch, ref_head, ref_token, 1 if ALIGNED else ref_channel, ref_table)
    other = (cand, cand_batch, cand_head, cand_token, 1 if ALIGNED else cand_channel, cand_table)
    strip = (first, last, start, column_end)
    sizes = (heads, tokens, channels)
    dropped = (token_dropped, channel_dropped, head_dropped)
    groups = (token_group, channel_group, head_group)
    out = (
        histogram,
        dropped,
        groups,
        row_sums + ((place * (NT // 32) + tl.arange(0, NT) // 32).to(tl.int64) * (row_end - row0) - row0) * 4,
        column_sums + (block * (column_end - column0).to(tl.int64) - column0) * 4,
        floats + (number0 + number).to(tl.int64) * FLOATS,
        integers + (number0 + number).to(tl.int64) * INTEGERS,
    )
    careful = 1
    if ((last - first) % BR == 0) & (start + BC <= column_end):
        careful = 0
        if MASKED:
            careful = 1 - tl.load(plain + block).to(tl.int32)
    if careful == 0:
        careful = _scan(
            one, other, strip, sizes, mask, out,
            REF, CAND, WIDE, SAME, FLAT, False, False, SHUFFLE, NT, P, V, LOG, BR, LOG_BR, BITS,
        )  # fmt: skip
        tl.debug_barrier()
    if careful != 0:
        _scan(
            one, other, strip, sizes, mask, out,
            REF, CAND, WIDE, SAME, FLAT, MASKED, True, SHUFFLE, NT, P, V, LOG, BR, LOG_BR, BITS,
        )  # fmt: skip
