"""The GPU kernel: both tensors as matrices `[row, column]`, read once.

A row is a token (batch and token, flattened), a column a channel of a head (head and channel, flattened).
A program goes down a strip of columns, `BR` rows at a time: sums of its columns stay in registers, those of
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

from divergence.comparison.triton_parts import (
    FLOATS,
    INTEGERS,
    NOWHERE,
    PLANES,
    any_bit,
    columns_at,
    digits_of,
    errors_of,
    exponents_of,
    finite,
    is_valid,
    load,
    own,
    plus,
    store_rows,
    sum_rows,
    tally,
    values_of,
    words_of,
    zeros,
)


@triton.jit
def _windows(
    ref, cand, strip, sizes, mask, top, histogram,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, MASKED: tl.constexpr,
    NT: tl.constexpr, V: tl.constexpr, LOG: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Counts the exponents of a strip's errors from `top` down, `BITS` of them at a time."""
    columns = strip[2] + tl.arange(0, NT * V)
    at = columns_at(ref, columns, sizes, FLAT & 4), columns_at(cand, columns, sizes, FLAT & 8)
    while top > 0:
        planes = zeros(NT, BITS)
        below = tl.zeros((NT,), tl.int32)
        for row in range(strip[0], strip[1]):
            used = columns < tl.where(is_valid(mask, row, strip[1], MASKED), strip[3], 0)
            errors = errors_of(ref, cand, at, row, used, sizes, REF, CAND, WIDE, FLAT)
            exponents = own(exponents_of(tl.maximum(errors, 0.0)), NT, V)
            within = (exponents <= top) & (exponents > top - BITS)
            words = words_of(tl.where(within, exponents, 0), BITS)
            planes = plus(planes, digits_of(words, LOG), PLANES, LOG + 1)
            below = tl.maximum(below, tl.max(tl.where(exponents <= top - BITS, exponents, 0), axis=1))
        tally(planes, top, histogram, BITS)
        top = tl.max(below)


@triton.jit
def _finish(
    ref, cand, strip, sizes, mask, out, absolute, moments, extremes, counts, largest, exponents,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, MASKED: tl.constexpr,
    CAREFUL: tl.constexpr, NT: tl.constexpr, V: tl.constexpr, LOG: tl.constexpr,
    BR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Stores what was found in a strip."""
    histogram, dropped, groups, _, column_sums, floats, integers = out
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
    # In a column rows are in canonical order.
    columns = own(strip[2] + tl.arange(0, NT * V), NT, V)
    here = columns < strip[3]
    place = tl.full((NT, V), NOWHERE, tl.int64)
    error = tl.full((NT, V), -1.0, tl.float64)
    head, channel = columns // sizes[2], columns % sizes[2]
    at = columns_at(ref, columns, sizes, FLAT & 4), columns_at(cand, columns, sizes, FLAT & 8)
    for u in range(count):
        row = (first + u)[:, None]
        used = here & chosen[:, None] & is_valid(mask, row, strip[1], MASKED)
        now = errors_of(ref, cand, at, row, used, sizes, REF, CAND, WIDE, FLAT)
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
            tally(planes, highest, histogram, BITS)
        else:
            _windows(
                ref, cand, strip, sizes, mask, highest, histogram,
                REF, CAND, WIDE, FLAT, MASKED, NT, V, LOG, BITS,
            )  # fmt: skip


@triton.jit
def _scan(
    ref, cand, strip, sizes, mask, out,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, SHUFFLE: tl.constexpr, NT: tl.constexpr,
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
    _, dropped, groups, row_sums, _, _, _ = out
    columns = strip[2] + tl.arange(0, NT * V)
    at = columns_at(ref, columns, sizes, FLAT & 4), columns_at(cand, columns, sizes, FLAT & 8)
    kind = tl.float64 if WIDE else tl.float32
    err2, ref2, cand2, dot = (tl.zeros((NT, V), tl.float64),) * 4
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
    planes = zeros(NT, BITS)
    padded = tl.full((NT,), -1.0, tl.float64)
    ref_bad = tl.zeros((NT,), tl.int32)
    cand_bad = tl.zeros((NT,), tl.int32)
    column_dropped = tl.zeros((NT, V), tl.int32)
    for start in range(strip[0], strip[1], BR):
        raw, digits, sums = (), (), ()
        largest = tl.full((NT,), -1, tl.int32)
        for u in tl.static_range(BR):
            row = start + u
            inside = columns < tl.where(row < strip[1], strip[3], 0)
            one = load(ref, at[0], row, inside, sizes, FLAT & 1, not CAREFUL)
            other = load(cand, at[1], row, inside, sizes, FLAT & 2, not CAREFUL)
            raw = raw + (one, other)
        for u in tl.static_range(BR):
            row = start + u
            r = own(values_of(raw[2 * u], ref[5], REF, WIDE), NT, V)
            c = own(values_of(raw[2 * u + 1], cand[5], CAND, WIDE), NT, V)
            if SAME:
                bits = any_bit(own(raw[2 * u] ^ raw[2 * u + 1], NT, V), LOG)
                different |= (bits != 0).to(tl.int32) if bits.dtype == tl.int64 else bits.to(tl.int32)
            low, high, other_low, other_high = r, r, c, c
            if CAREFUL:
                mine = own(columns, NT, V)
                inside = mine < tl.where(row < strip[1], strip[3], 0)
                valid = mine < tl.where(is_valid(mask, row, strip[1], MASKED), strip[3], 0)
                ref_ok, cand_ok = finite(r), finite(c)
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
                other_low, other_high = (
                    tl.where(cand_ok, c, float("inf")),
                    tl.where(cand_ok, c, float("-inf")),
                )
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
            low_bits |= any_bit(bits.to(tl.int32), LOG)
            exponents = high_bits >> 20
            least = tl.minimum(least, tl.min((exponents - 1).to(tl.uint32, bitcast=True), axis=1))
            digits = digits + (digits_of(words_of(exponents, BITS), LOG),)
            total += tl.sum(errors, axis=1)
            sums = sums + (
                tl.sum(d * d, axis=1),
                tl.sum(r * r, axis=1),
                tl.sum(c * c, axis=1),
                tl.sum(r * c, axis=1),
            )
            err2 = tl.fma(d, d, err2)
            ref2 = tl.fma(r, r, ref2)
            cand2 = tl.fma(c, c, cand2)
            dot = tl.fma(r, c, dot)
            if CAREFUL:
                high_bits = tl.where(used, high_bits, -1)
            largest = tl.maximum(largest, tl.max(high_bits, axis=1))
        planes = plus(planes, sum_rows(digits, BR, LOG + 1), PLANES, LOG + LOG_BR + 1)
        store_rows(sums, row_sums, start, strip[1], NT, BR, CAREFUL, SHUFFLE)
        again = tl.where(largest > worst, 0, again | (largest == worst).to(tl.int32))
        worst_at = tl.where(largest > worst, start, worst_at)
        worst = tl.maximum(worst, largest)
    absolute = tl.sum(total)
    redo = 0
    if not CAREFUL:
        redo = 1 - (absolute < float("inf")).to(tl.int32)
    if redo == 0:
        moments = (err2, ref2, cand2, dot)
        extremes = (ref_low, ref_high, cand_low, cand_high, padded)
        counts = (ref_bad, cand_bad, different, column_dropped)
        _finish(
            ref, cand, strip, sizes, mask, out, absolute, moments, extremes, counts, (worst, worst_at, again, low_bits), (planes, least),
            REF, CAND, WIDE, FLAT, MASKED, CAREFUL, NT, V, LOG, BR, BITS,
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
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, SHUFFLE: tl.constexpr, NT: tl.constexpr,
    V: tl.constexpr, LOG: tl.constexpr, BR: tl.constexpr, LOG_BR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Compares two matrices, part by part; a program goes down one strip.

    Args:
        ref, cand: integers of the size of an element, with their steps in elements (outer ones in units of 16 if
            `ALIGNED`) and the values of all bytes (see `TABLE`).
        mask, plain: a byte for each row, and for each `depth` rows, whether all are valid; only if `MASKED`.
        heads, tokens, channels: sizes; `channels` in units of 16 if `ALIGNED` and heads do not follow each other.
        row0, row_end, first_column, column_end: the part; its first column in units of 32.
        depth: rows of a program.
        histogram: `[2048]`, added to.
        token_dropped, channel_dropped, head_dropped: what was not compared of each entry, added to; an entry has
            `..._group` members.
        row_sums: `[warps of all strips, rows, 4]`: sums of (c - r)^2, r^2, c^2 and r c.
        column_sums: `[blocks of rows, columns, 4]`.
        floats, integers: `[programs, FLOATS]` and `[programs, INTEGERS]`, those of this part from `number0` on.
        REF, CAND: how values are stored.
        WIDE: values need float64.
        SAME: both sides are of one dtype.
        FLAT: four flags: rows, then columns, of either side are in equal steps.
        ALIGNED: both sides can be read 16 bytes at a time.
        SHUFFLE: see `store_rows`.
        NT: threads; V: columns of each, 2^LOG; BR: rows worked on at a time, 2^LOG_BR.
        BITS: of a word that exponents are counted in.
    """
    number = tl.program_id(0)
    BC: tl.constexpr = NT * V
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
            REF, CAND, WIDE, SAME, FLAT, False, False, SHUFFLE, NT, V, LOG, BR, LOG_BR, BITS,
        )  # fmt: skip
        tl.debug_barrier()
    if careful != 0:
        _scan(
            one, other, strip, sizes, mask, out,
            REF, CAND, WIDE, SAME, FLAT, MASKED, True, SHUFFLE, NT, V, LOG, BR, LOG_BR, BITS,
        )  # fmt: skip
