"""The GPU kernel: both tensors as matrices `[row, column]`, read once.

A row is a token (batch and token, flattened), a column a channel of a head (head and channel, flattened).
A program goes down a strip of columns, `BR` rows at a time: sums of its columns stay in registers, those of
rows are stored. It assumes that all values are finite; where they turn out not to be, or the strip is cut off
by an edge or has padded rows, it goes over the strip in the careful way.

The histogram of errors is counted in bits. Bit k mod `BITS` of a word stands for exponent k; words are added
up position by position, as binary numbers whose digits are spread over planes: plane p holds the digits of
weight 2^p of all counters. Which k a bit meant is known if the exponents of a strip span less than `BITS`
powers of two, as nearly always; a program that finds that they do not says so (`MISCOUNTED`), and the errors
of the whole tensor are counted again by `triton_recount`.

Nothing depends on the order in which programs run: partial sums have places of their own, and only integers
are added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from divergence.comparison.triton_parts import (
    BFLOAT16,
    FLOAT16,
    FLOATS,
    INTEGERS,
    MISCOUNTED,
    NOWHERE,
    apart,
    carry_over,
    columns_at,
    count,
    errors_of,
    extreme_of,
    extreme_of_both,
    finite,
    is_valid,
    load,
    own,
    pairs_of,
    store_rows,
    tally,
    together,
    upper_half,
    values_of,
    words_of,
    zeros,
)


@triton.jit
def _finish(
    ref, cand, strip, sizes, mask, out, absolute, moments, extremes, counts, largest, exponents,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, MASKED: tl.constexpr,
    CAREFUL: tl.constexpr, NT: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Stores what was found in a strip."""
    histogram, dropped, groups, _, column_sums, floats, integers, peak = out
    worst, worst_at, again, low_bits = largest
    planes, ranks = exponents
    # None at all where no value was compared; only the careful way knows.
    most = tl.max(worst)
    high_bits = (most >> 1).to(tl.int32)
    if CAREFUL:
        high_bits = tl.where(most > 0, high_bits, -1)
    tl.store(floats, absolute)
    tl.store(floats + 2, tl.min(extremes[0]).to(tl.float64))
    tl.store(floats + 3, tl.max(extremes[1]).to(tl.float64))
    tl.store(floats + 4, tl.min(extremes[2]).to(tl.float64))
    tl.store(floats + 5, tl.max(extremes[3]).to(tl.float64))
    tl.store(floats + 6, tl.max(extremes[4]))
    columns = own(strip[2] + tl.arange(0, NT * V), NT, V)
    here = columns < strip[3]
    head, channel = columns // sizes[2], columns % sizes[2]
    # `worst` is the upper half of the largest error's bits. A program that has a lesser one than another has
    # not the largest error, and need not look for it.
    top = tl.full((), -1.0, tl.float64)
    found = tl.full((), NOWHERE, tl.int64)
    if tl.atomic_max(peak, high_bits.to(tl.int64), sem="relaxed") <= high_bits:
        # The first tile with this upper half has the largest error, unless later ones have the same and lower
        # halves that matter: then all rows are looked at.
        chosen = worst == most
        first, count = worst_at, BR
        if tl.max(tl.where(chosen & (low_bits != 0), again, 0)) > 0:
            first, count = tl.zeros((NT,), tl.int32) + strip[0], strip[1] - strip[0]
        # In a column rows are in canonical order.
        place = tl.full((NT, V), NOWHERE, tl.int64)
        error = tl.full((NT, V), -1.0, tl.float64)
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
        found = tl.min(tl.min(tl.where(error == top, place, NOWHERE), axis=1), axis=0)
    tl.store(floats + 1, top)
    tl.store(integers, found)
    tl.store(integers + 1, tl.sum(counts[0]).to(tl.int64))
    tl.store(integers + 2, tl.sum(counts[1]).to(tl.int64))
    tl.store(column_sums + 4 * columns.to(tl.int64) + 0, moments[0], mask=here)
    tl.store(column_sums + 4 * columns.to(tl.int64) + 1, moments[1], mask=here)
    tl.store(column_sums + 4 * columns.to(tl.int64) + 2, moments[2], mask=here)
    tl.store(column_sums + 4 * columns.to(tl.int64) + 3, moments[3], mask=here)
    if CAREFUL:
        lost = here & (counts[3] > 0)
        lost_here = counts[3].to(tl.int64)
        tl.atomic_add(dropped[1] + columns // groups[1], lost_here, mask=lost, sem="relaxed")
        tl.atomic_add(dropped[2] + head // groups[2], lost_here, mask=lost, sem="relaxed")
    unlike = tl.max((counts[2] != 0).to(tl.int32), axis=0).to(tl.int64)
    highest = high_bits >> 20
    if highest > 0:
        # Counters are right if their exponents add up to what the exponents themselves do: one that is `BITS`
        # or more below the highest is taken for a higher one.
        counted = tally(planes, highest, histogram, BITS)
        unlike += (counted != tl.sum(ranks.to(tl.int64))).to(tl.int64) * MISCOUNTED
    tl.store(integers + 3, unlike)


@triton.jit
def _read(
    ref, cand, at, row, end, columns, column_end, sizes, FLAT: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """What is stored in a row of either side, `[NT * V]`."""
    inside = columns < tl.where(row < end, column_end, 0)
    one = load(ref, at[0], row, inside, sizes, FLAT & 1, not CAREFUL)
    other = load(cand, at[1], row, inside, sizes, FLAT & 2, not CAREFUL)
    return one, other


@triton.jit
def _scan(
    ref, cand, packed, strip, sizes, mask, out,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, NT: tl.constexpr,
    V: tl.constexpr, LOG: tl.constexpr, BR: tl.constexpr, LOG_BR: tl.constexpr, BITS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Goes over one strip. All is `[NT]`: each thread computes with its own columns, one after another.

    Args:
        ref, cand: as `side` in `columns_at`.
        packed: if `PACKED`, both sides and the sizes in words of two values.
        strip: first row, end of rows, first column, end of columns.
        sizes: numbers of heads, tokens and channels.
        mask: a byte for each row.
        out: see `compare`.

    Returns:
        1 where a value was not finite and it was not careful; what it has stored is then void.
    """
    _, dropped, groups, by_row, _, _, _, _ = out
    # Upper halves of float64 compare as float32 do, but those beyond 2^1016.
    AS_FLOAT: tl.constexpr = NATIVE and not WIDE and not CAREFUL
    columns = strip[2] + tl.arange(0, NT * V)
    mine = apart(own(columns, NT, V), LOG)
    kind = tl.float64 if WIDE else tl.float32
    nothing = tl.zeros((NT,), tl.float64)
    integer = tl.zeros((NT,), tl.int32)
    err2, ref2, cand2, dot, column_dropped = (), (), (), (), ()
    for _ in tl.static_range(V):
        err2, ref2, cand2, dot = err2 + (nothing,), ref2 + (nothing,), cand2 + (nothing,), dot + (nothing,)
        column_dropped = column_dropped + (integer,)
    total = nothing
    nowhere = tl.zeros((NT,), tl.uint32)
    worst = nowhere
    worst_at = integer
    again = integer
    low_bits = integer
    if PACKED:
        # Infinities, twice in a word.
        ref_low = integer + (0x7F807F80 if REF == BFLOAT16 else 0x7C007C00)
        ref_high = integer - (0x007F0080 if REF == BFLOAT16 else 0x03FF0400)
    else:
        ref_low = tl.full((NT,), float("inf"), kind)
        ref_high = tl.full((NT,), float("-inf"), kind)
    cand_low = ref_low
    cand_high = ref_high
    different = integer
    ranks = integer
    planes = zeros(NT, BITS)
    padded = nothing - 1.0
    ref_bad = integer
    cand_bad = integer
    one, other, size, read = ref, cand, sizes, columns
    if PACKED:
        one, other, size = packed
        read = strip[2] // 2 + tl.arange(0, NT * V // 2)
    at = columns_at(one, read, size, FLAT & 4), columns_at(other, read, size, FLAT & 8)
    for start in tl.range(strip[0], strip[1], BR, num_stages=1 if CAREFUL else STAGES):
        rows = ()
        for u in tl.static_range(BR):
            rows = rows + (_read(one, other, at, start + u, strip[1], read, strip[3], size, FLAT, CAREFUL),)
        carries, sums = (), ()
        largest = tl.zeros((NT,), tl.float32) if AS_FLOAT else nowhere
        low = integer
        for u in tl.static_range(BR):
            row = start + u
            raw = rows[u]
            if PACKED:
                r_words = apart(own(raw[0], NT, V // 2), LOG - 1)
                c_words = apart(own(raw[1], NT, V // 2), LOG - 1)
                r_all, c_all = pairs_of(r_words, LOG, REF), pairs_of(c_words, LOG, REF)
                for i in tl.static_range(V // 2):
                    different |= r_words[i] ^ c_words[i]
                    ref_low = extreme_of(ref_low, r_words[i], REF, False)
                    ref_high = extreme_of(ref_high, r_words[i], REF, True)
                    cand_low = extreme_of(cand_low, c_words[i], REF, False)
                    cand_high = extreme_of(cand_high, c_words[i], REF, True)
            else:
                r_raw, c_raw = apart(own(raw[0], NT, V), LOG), apart(own(raw[1], NT, V), LOG)
                r_all, c_all = (), ()
                for v in tl.static_range(V):
                    r_all = r_all + (values_of(r_raw[v], ref[5], REF, WIDE),)
                    c_all = c_all + (values_of(c_raw[v], cand[5], CAND, WIDE),)
            if SAME and not PACKED:
                for v in tl.static_range(V):
                    bits = r_raw[v] ^ c_raw[v]
                    different |= (bits != 0).to(tl.int32) if bits.dtype == tl.int64 else bits.to(tl.int32)
            words = ()
            new_err2, new_ref2, new_cand2, new_dot, new_dropped = (), (), (), (), ()
            row_dropped = integer
            for v in tl.static_range(V):
                r, c = r_all[v], c_all[v]
                if CAREFUL:
                    inside = mine[v] < tl.where(row < strip[1], strip[3], 0)
                    valid = mine[v] < tl.where(is_valid(mask, row, strip[1], MASKED), strip[3], 0)
                    ref_ok, cand_ok = finite(r), finite(c)
                    used = valid & ref_ok & cand_ok
                    if MASKED:
                        off = tl.abs(c.to(tl.float64) - r.to(tl.float64))
                        padded = tl.maximum(padded, tl.where(inside & ~valid & ref_ok & cand_ok, off, -1.0))
                    ref_bad += (valid & ~ref_ok).to(tl.int32)
                    cand_bad += (valid & ~cand_ok).to(tl.int32)
                    missing = (inside & ~used).to(tl.int32)
                    new_dropped = new_dropped + (column_dropped[v] + missing,)
                    row_dropped += missing
                    ref_ok, cand_ok = valid & ref_ok, valid & cand_ok
                    ref_low = tl.minimum(ref_low, tl.where(ref_ok, r, float("inf")))
                    ref_high = tl.maximum(ref_high, tl.where(ref_ok, r, float("-inf")))
                    cand_low = tl.minimum(cand_low, tl.where(cand_ok, c, float("inf")))
                    cand_high = tl.maximum(cand_high, tl.where(cand_ok, c, float("-inf")))
                    r, c = tl.where(used, r, 0.0), tl.where(used, c, 0.0)
                elif not PACKED:
                    ref_low, ref_high = tl.minimum(ref_low, r), tl.maximum(ref_high, r)
                    cand_low, cand_high = tl.minimum(cand_low, c), tl.maximum(cand_high, c)
                r, c = r.to(tl.float64), c.to(tl.float64)
                d = c - r
                total += tl.abs(d)
                new_err2 = new_err2 + (tl.fma(d, d, err2[v]),)
                new_ref2 = new_ref2 + (tl.fma(r, r, ref2[v]),)
                new_cand2 = new_cand2 + (tl.fma(c, c, cand2[v]),)
                new_dot = new_dot + (tl.fma(r, c, dot[v]),)
                if v == 0:
                    row_err2, row_ref2, row_cand2, row_dot = d * d, r * r, c * c, r * c
                else:
                    row_err2, row_ref2 = tl.fma(d, d, row_err2), tl.fma(r, r, row_ref2)
                    row_cand2, row_dot = tl.fma(c, c, row_cand2), tl.fma(r, c, row_dot)
                bits = d.to(tl.int64, bitcast=True)
                low |= bits.to(tl.int32)
                high, exponents = upper_half(d, NATIVE)
                ranks += exponents
                words = words + (words_of(exponents, BITS, NATIVE and not CAREFUL),)
                if AS_FLOAT:
                    largest = tl.maximum(largest, tl.abs(high.to(tl.float32, bitcast=True)))
                else:
                    # One bit further up, and in order as the errors are; with a bit that says that there is one.
                    high = (high << 1).to(tl.uint32, bitcast=True)
                    if CAREFUL:
                        high = tl.where(used, high | 1, 0)
                    largest = tl.maximum(largest, high)
            err2, ref2, cand2, dot = new_err2, new_ref2, new_cand2, new_dot
            sums = sums + (row_err2, row_ref2, row_cand2, row_dot)
            planes, carry = count(planes, words, 0, LOG, BITS)
            carries = carries + (carry,)
            if CAREFUL:
                column_dropped = new_dropped
                lost = tl.sum(row_dropped).to(tl.int64)
                tl.atomic_add(dropped[0] + row // groups[0], lost, mask=lost > 0, sem="relaxed")
        planes, carry = count(planes, carries, LOG, LOG_BR, BITS)
        planes = carry_over(planes, carry, LOG + LOG_BR, BITS)
        store_rows(sums, by_row, start, strip[1], NT, BR, NATIVE and not CAREFUL)
        if AS_FLOAT:
            largest = (largest.to(tl.int32, bitcast=True) << 1).to(tl.uint32, bitcast=True)
        more = largest > worst
        again = tl.where(more, 0, again | (largest == worst).to(tl.int32))
        low_bits = tl.where(more, low, tl.where(largest == worst, low_bits | low, low_bits))
        worst_at = tl.where(more, start, worst_at)
        worst = tl.maximum(worst, largest)
    absolute = tl.sum(total)
    redo = 0
    if not CAREFUL:
        redo = 1 - (absolute < float("inf")).to(tl.int32)
    if redo == 0:
        if PACKED:
            extremes = (
                extreme_of_both(ref_low, REF, False), extreme_of_both(ref_high, REF, True),
                extreme_of_both(cand_low, REF, False), extreme_of_both(cand_high, REF, True), padded,
            )  # fmt: skip
        else:
            extremes = (ref_low, ref_high, cand_low, cand_high, padded)
        moments = (together(err2, LOG), together(ref2, LOG), together(cand2, LOG), together(dot, LOG))
        counts = (ref_bad, cand_bad, different, together(column_dropped, LOG))
        _finish(
            ref, cand, strip, sizes, mask, out, absolute, moments, extremes, counts, (worst, worst_at, again, low_bits), (planes, ranks),
            REF, CAND, WIDE, FLAT, MASKED, CAREFUL, NT, V, BR, BITS,
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
    row_sums, column_sums, floats, integers, peak, number0,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, SAME: tl.constexpr, FLAT: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, NATIVE: tl.constexpr, NT: tl.constexpr,
    V: tl.constexpr, LOG: tl.constexpr, BR: tl.constexpr, LOG_BR: tl.constexpr, BITS: tl.constexpr,
    STAGES: tl.constexpr,
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
        row_sums: `[strips, rows, 4]`: sums of (c - r)^2, r^2, c^2 and r c.
        column_sums: `[blocks of rows, columns, 4]`.
        floats, integers: `[programs, FLOATS]` and `[programs, INTEGERS]`, those of this part from `number0` on.
        peak: the upper half of the largest error so far, raised.
        REF, CAND: how values are stored.
        WIDE: values need float64.
        SAME: both sides are of one dtype.
        FLAT: four flags: rows, then columns, of either side are in equal steps.
        ALIGNED: both sides can be read 16 bytes at a time.
        NATIVE: may use instructions of NVIDIA's devices; both sides aligned, of one size, and BR 2 or 4.
        NT: threads; V: columns of each, 2^LOG; BR: rows worked on at a time, 2^LOG_BR.
        BITS: of a word that exponents are counted in.
        STAGES: steps of BR rows whose values are on their way at a time.
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
    PACKED: tl.constexpr = NATIVE and SAME and V > 1 and ((REF == BFLOAT16) | (REF == FLOAT16))
    packed = (one, other, (heads, tokens, channels))
    if PACKED:
        packed = (
            (ref.to(tl.pointer_type(tl.int32)), ref_batch // 2, ref_head // 2, ref_token // 2, 1, ref_table),
            (
                cand.to(tl.pointer_type(tl.int32)),
                cand_batch // 2,
                cand_head // 2,
                cand_token // 2,
                1,
                cand_table,
            ),
            (heads, tokens, channels // 2),
        )
    strip = (first, last, start, column_end)
    sizes = (heads, tokens, channels)
    dropped = (token_dropped, channel_dropped, head_dropped)
    groups = (token_group, channel_group, head_group)
    out = (
        histogram,
        dropped,
        groups,
        row_sums + (place.to(tl.int64) * (row_end - row0) - row0) * 4,
        column_sums + (block * (column_end - column0).to(tl.int64) - column0) * 4,
        floats + (number0 + number).to(tl.int64) * FLOATS,
        integers + (number0 + number).to(tl.int64) * INTEGERS,
        peak,
    )
    careful = 1
    if ((last - first) % BR == 0) & (start + BC <= column_end):
        careful = 0
        if MASKED:
            careful = 1 - tl.load(plain + block).to(tl.int32)
    if careful == 0:
        careful = _scan(
            one, other, packed, strip, sizes, mask, out,
            REF, CAND, WIDE, SAME, FLAT, False, False, NATIVE, PACKED, NT, V, LOG, BR, LOG_BR, BITS, STAGES,
        )  # fmt: skip
        tl.debug_barrier()
    if careful != 0:
        _scan(
            one, other, packed, strip, sizes, mask, out,
            REF, CAND, WIDE, SAME, FLAT, MASKED, True, NATIVE, False, NT, V, LOG, 1, 0, BITS, STAGES,
        )  # fmt: skip
