"""Parts of the GPU kernel: reading values, counting in bits, sums over the threads of a warp."""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT32, FLOAT64, BFLOAT16, FLOAT16, TABLE, SIGNED, UNSIGNED = (tl.constexpr(i) for i in range(7))
"""How values are stored, in signed integers of their size. `TABLE`: one byte, an index into 256 float32."""

EXPONENTS = tl.constexpr(2048)

PLANES_32, PLANES_64 = tl.constexpr(15), tl.constexpr(14)
"""Digits of a thread's counters, by the bits of the words that errors are counted in. One more of 32 bits saves
launches, one more of 64 costs more registers than that."""

FLOATS, INTEGERS = tl.constexpr(8), tl.constexpr(4)
"""Figures of a program: sum and maximum of |c - r|, range of either side, maximum of |c - r| at padded tokens;
place of the maximum in canonical order, non-finite values of either side, whether bits differ plus `MISCOUNTED`."""

MISCOUNTED = tl.constexpr(2)
"""Of a program whose errors span too many powers of two."""


def most_counted(bits: int) -> int:
    """Elements that a thread may go over."""
    planes = PLANES_64 if bits == 64 else PLANES_32
    return int((1 << planes.value) - 1)


def _sums_over_lanes(values: int) -> str:
    """PTX that sums `values` float64 of each thread over its warp. Where every sum for itself would take five
    exchanges, threads first share the sums out: in each step a thread keeps half of what it has and is given its
    partner's share of that half. Result: the sum of value `lane * values // 32`."""
    lines = [".reg .pred p;", ".reg .b32 lane, bit, lo, hi;", ".reg .f64 keep, send;"]
    lines += [f".reg .f64 x<{values}>;", "mov.u32 lane, %laneid;"]
    lines += [f"mov.f64 x{i}, ${i + 1};" for i in range(values)]
    lane = 16
    while values > 1:
        values //= 2
        lines += [f"and.b32 bit, lane, {lane};", "setp.ne.b32 p, bit, 0;"]
        for i in range(values):
            lines += [
                f"selp.f64 keep, x{i + values}, x{i}, p;",
                f"selp.f64 send, x{i}, x{i + values}, p;",
                *_exchange("send", lane),
                f"add.f64 x{i}, keep, send;",
            ]
        lane //= 2
    while lane > 0:
        lines += ["mov.f64 send, x0;", *_exchange("send", lane), "add.f64 x0, x0, send;"]
        lane //= 2
    return "{" + " ".join(lines) + " mov.f64 $0, x0; }"


def _exchange(name: str, lane: int) -> list[str]:
    swap = [f"shfl.sync.bfly.b32 {word}, {word}, {lane}, 31, -1;" for word in ("lo", "hi")]
    return [f"mov.b64 {{lo, hi}}, {name};", *swap, f"mov.b64 {name}, {{lo, hi}};"]


EIGHT_SUMS, SIXTEEN_SUMS = tl.constexpr(_sums_over_lanes(8)), tl.constexpr(_sums_over_lanes(16))

NOWHERE = tl.constexpr((1 << 63) - 1)


@triton.jit
def _full(a, b, c):
    """Sum and carry of three binary digits."""
    return a ^ b ^ c, (a & b) | (c & (a ^ b))


@triton.jit
def _halve(x, N: tl.constexpr):
    """Both halves of `[..., N]`: even and odd places."""
    return tl.split(tl.reshape(x, (x.shape[0], N // 2, 2)))


@triton.jit
def apart(x, LOG: tl.constexpr):
    """`[m, 2^LOG]` as 2^LOG tensors `[m]`, in the order of their numbers' reversed bits."""
    parts = (x,)
    for level in tl.static_range(LOG):
        halves = ()
        for i in tl.static_range(1 << level):
            even, odd = _halve(parts[i], 1 << (LOG - level))
            halves = halves + (even, odd)
        parts = halves
    columns = ()
    for i in tl.static_range(1 << LOG):
        columns = columns + (tl.reshape(parts[i], (x.shape[0],)),)
    return columns


@triton.jit
def together(parts, LOG: tl.constexpr):
    """What `apart` has taken apart."""
    size: tl.constexpr = parts[0].shape[0]
    halves = ()
    for i in tl.static_range(1 << LOG):
        halves = halves + (tl.reshape(parts[i], (size, 1)),)
    for level in tl.static_range(LOG):
        joined = ()
        for i in tl.static_range(1 << (LOG - level - 1)):
            pair = tl.join(halves[2 * i], halves[2 * i + 1])
            joined = joined + (tl.reshape(pair, (size, 2 << level)),)
        halves = joined
    return halves[0]


@triton.jit
def count(planes, words, FROM: tl.constexpr, LOG: tl.constexpr, BITS: tl.constexpr):
    """Adds 2^LOG words, bits of weight 2^FROM: new planes, and what is carried over, of weight 2^(FROM + LOG)."""
    for level in tl.static_range(LOG):
        digit = planes[FROM + level]
        carries = ()
        for i in tl.static_range(1 << (LOG - level - 1)):
            digit, carry = _full(digit, words[2 * i], words[2 * i + 1])
            carries = carries + (carry,)
        words = carries
        changed = ()
        for p in tl.static_range(PLANES_64 if BITS == 64 else PLANES_32):
            changed = changed + (digit if p == FROM + level else planes[p],)
        planes = changed
    return planes, words[0]


@triton.jit
def carry_over(planes, carry, FROM: tl.constexpr, BITS: tl.constexpr):
    """Adds one word, bits of weight 2^FROM."""
    changed = ()
    for p in tl.static_range(PLANES_64 if BITS == 64 else PLANES_32):
        if p < FROM:
            changed = changed + (planes[p],)
        else:
            changed = changed + (planes[p] ^ carry,)
            carry = planes[p] & carry
    return changed


@triton.jit
def zeros(M: tl.constexpr, BITS: tl.constexpr):
    planes = ()
    for _ in tl.static_range(PLANES_64 if BITS == 64 else PLANES_32):
        planes = planes + (tl.zeros((M,), tl.int64 if BITS == 64 else tl.int32),)
    return planes


@triton.jit
def own(x, NT: tl.constexpr, V: tl.constexpr):
    """A row of a strip as `[NT, V]`: what one thread has read is one row."""
    return tl.reshape(x, (NT, V))


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
def upper_half(values, NATIVE: tl.constexpr):
    """The upper halves of float64 numbers, and their exponents."""
    if NATIVE:  # the compiler makes more of it
        return tl.inline_asm_elementwise(
            "{ .reg .b32 low, high; mov.b64 {low, $0}, $2; shl.b32 high, $0, 1; shr.u32 $1, high, 21; }",
            "=r,=r,d", (values,), (tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    high = (values.to(tl.int64, bitcast=True) >> 32).to(tl.int32)
    return high, (high >> 20) & 0x7FF


@triton.jit
def words_of(exponents, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """One bit for each exponent; none for 0."""
    if NATIVE:  # the compiler makes a comparison and a selection of it
        one = tl.inline_asm_elementwise(
            "min.u32 $0, $1, 1;", "=r,r", (exponents,), tl.int32, is_pure=True, pack=1
        )
    else:
        one = tl.minimum(exponents, 1)
    if BITS == 64 and NATIVE:
        words = tl.inline_asm_elementwise(
            "{ .reg .b32 at, low, high; and.b32 at, $2, 63; shl.b32 low, $1, at; sub.u32 at, at, 32; "
            "shl.b32 high, $1, at; mov.b64 $0, {low, high}; }",
            "=l,r,r", (one, exponents), tl.int64, is_pure=True, pack=1,
        )  # fmt: skip
    elif BITS == 64:
        words = one.to(tl.int64) << (exponents & 63).to(tl.int64)
    elif NATIVE:
        words = tl.inline_asm_elementwise(
            "shf.l.wrap.b32 $0, 0, $1, $2;", "=r,r,r", (one, exponents), tl.int32, is_pure=True, pack=1
        )
    else:
        words = one << (exponents & 31)
    return words


@triton.jit
def tally(planes, top, histogram, BITS: tl.constexpr):
    """Adds the counters of all threads to the histogram, for exponents from `top - BITS + 1` to `top`.

    Returns:
        The sum of all these exponents.
    """
    sum_of_all = tl.full((), 0, tl.int64)
    for start in range(0, BITS, 8):
        bits = start + tl.arange(0, 8)
        counts = tl.zeros((planes[0].shape[0], 8), tl.int32)
        for p in tl.static_range(PLANES_64 if BITS == 64 else PLANES_32):
            digits = (planes[p][:, None] >> bits[None, :].to(planes[p].dtype)) & 1
            counts += digits.to(tl.int32) << p
        total = tl.sum(counts, axis=0).to(tl.int64)
        exponents = top - ((top - bits) & (BITS - 1))
        there = (exponents > 0) & (total > 0)
        tl.atomic_add(histogram + exponents, total, mask=there, sem="relaxed")
        sum_of_all += tl.sum(tl.where(there, total * exponents, 0), axis=0)
    return sum_of_all


@triton.jit
def store_rows(sums, to, start, end, NT: tl.constexpr, BR: tl.constexpr, NATIVE: tl.constexpr):
    """Stores sums of rows from `start` on, over the columns of the program.

    Args:
        sums: four of each row, `[NT]`.
        to: where the sums of row 0 are.
        NATIVE: see `compare`; all rows are there.
    """
    if NATIVE:
        if BR == 4:
            total = tl.inline_asm_elementwise(
                SIXTEEN_SUMS, "=d" + ",d" * 16, sums, tl.float64, is_pure=False, pack=1
            )  # fmt: skip
        else:
            total = tl.inline_asm_elementwise(
                EIGHT_SUMS, "=d" + ",d" * 8, sums, tl.float64, is_pure=False, pack=1
            )  # fmt: skip
        if NT > 32:
            total = tl.sum(tl.reshape(total, (NT // 32, 32)), axis=0)
        lane = tl.arange(0, 32)
        which = lane * BR // 8
        rows = start + which // 4
        tl.store(to + rows.to(tl.int64) * 4 + which % 4, total, mask=lane % (8 // BR) == 0)
    else:
        four = tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :]
        for u in tl.static_range(BR):
            row = start + u
            each = tl.join(tl.join(sums[4 * u], sums[4 * u + 1]), tl.join(sums[4 * u + 2], sums[4 * u + 3]))
            total = tl.sum(each, axis=0)
            tl.store(to + row.to(tl.int64) * 4 + four, total, mask=four < tl.where(row < end, 4, 0))


@triton.jit
def extreme_of(a, b, KIND: tl.constexpr, MOST: tl.constexpr):
    """The greater, if `MOST`, or else the lesser of two values of 16 bits, twice in a word."""
    which: tl.constexpr = "max" if MOST else "min"
    kind: tl.constexpr = "bf16x2" if KIND == BFLOAT16 else "f16x2"
    return tl.inline_asm_elementwise(
        which + "." + kind + " $0, $1, $2;", "=r,r,r", (a, b), tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def extreme_of_both(words, KIND: tl.constexpr, MOST: tl.constexpr):
    """The greater, if `MOST`, or else the lesser of the two values in a word, as float32."""
    low, high = _both(words, KIND)
    return tl.maximum(low, high) if MOST else tl.minimum(low, high)


@triton.jit
def _both(words, KIND: tl.constexpr):
    """Two values of 16 bits in a word, as float32."""
    return values_of(words.to(tl.int16), 0, KIND, False), values_of(
        (words >> 16).to(tl.int16), 0, KIND, False
    )


@triton.jit
def pairs_of(words, LOG: tl.constexpr, KIND: tl.constexpr):
    """The values of 2^(LOG - 1) words, two of 16 bits in each, in the order in which `apart` gives values."""
    even, odd = (), ()
    for i in tl.static_range(1 << (LOG - 1)):
        if KIND == BFLOAT16:
            even = even + ((words[i] << 16).to(tl.float32, bitcast=True),)
            odd = odd + ((words[i] & -65536).to(tl.float32, bitcast=True),)
        else:
            low, high = _both(words[i], KIND)
            even, odd = even + (low,), odd + (high,)
    return even + odd
