"""Counts errors by exponent where a strip's span more powers of two than a word has bits: one pass for each
`BITS` of them."""

from __future__ import annotations

import triton
import triton.language as tl

from divergence.comparison.triton_parts import (
    apart,
    carry_over,
    columns_at,
    count,
    errors_of,
    is_valid,
    own,
    tally,
    upper_half,
    words_of,
    zeros,
)


@triton.jit(
    do_not_specialize=[
        "ref_batch", "ref_head", "ref_token", "ref_channel", "cand_batch", "cand_head", "cand_token", "cand_channel",
        "heads", "tokens", "channels", "row0", "row_end", "first_column", "column_end", "depth", "top",
    ],
    do_not_specialize_on_alignment=["mask"],
)  # fmt: skip
def recount(
    ref, ref_batch, ref_head, ref_token, ref_channel, ref_table,
    cand, cand_batch, cand_head, cand_token, cand_channel, cand_table,
    mask, heads, tokens, channels, row0, row_end, first_column, column_end, depth, top, histogram,
    REF: tl.constexpr, CAND: tl.constexpr, WIDE: tl.constexpr, FLAT: tl.constexpr, MASKED: tl.constexpr,
    NT: tl.constexpr, V: tl.constexpr, LOG: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Counts a part; a program goes down one strip.

    Args:
        top: the exponent of the largest error, biased.
        histogram: `[2048]`, added to.
        Others: as `triton_kernel.compare`; sizes and steps in elements.
    """
    number = tl.program_id(0)
    column0 = first_column * 32
    strips = tl.cdiv(column_end - column0, NT * V)
    first = row0 + number // strips * depth
    last = tl.minimum(first + depth, row_end)
    columns = column0 + number % strips * (NT * V) + tl.arange(0, NT * V)
    one = (ref, ref_batch, ref_head, ref_token, ref_channel, ref_table)
    other = (cand, cand_batch, cand_head, cand_token, cand_channel, cand_table)
    sizes = (heads, tokens, channels)
    at = columns_at(one, columns, sizes, FLAT & 4), columns_at(other, columns, sizes, FLAT & 8)
    while top > 0:
        planes = zeros(NT, BITS)
        below = tl.zeros((NT,), tl.int32)
        for row in range(first, last):
            used = columns < tl.where(is_valid(mask, row, last, MASKED), column_end, 0)
            errors = errors_of(one, other, at, row, used, sizes, REF, CAND, WIDE, FLAT)
            _, exponents = upper_half(own(tl.maximum(errors, 0.0), NT, V), False)
            within = (exponents <= top) & (exponents > top - BITS)
            words = words_of(tl.where(within, exponents, 0), BITS, False)
            planes, carry = count(planes, apart(words, LOG), 0, LOG, BITS)
            planes = carry_over(planes, carry, LOG, BITS)
            below = tl.maximum(below, tl.max(tl.where(exponents <= top - BITS, exponents, 0), axis=1))
        tally(planes, top, histogram, BITS)
        top = tl.max(below)
