"""A mask that makes NaN: minus infinity over a whole row, or 0 times minus infinity."""

from __future__ import annotations

import math
from collections.abc import Iterator

from divergence.diagnosis import masks, parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "mask_nan"

_FIX = (
    "hide with a large finite number that the scores' dtype holds ({low}), not with -inf or a product with "
    "it: "
    "torch.where(seen, 0, torch.finfo(dtype).min)"
)


def trials(case: Case) -> Iterator[Trial]:
    """Minus infinity where the reference hides, and where a token sees itself; NaN where it does not hide."""
    if not case.nonfinite:
        return
    fix = _FIX.format(low="-65504 in fp16, -3.39e38 in bf16")
    for number, attention in enumerate(parts.attentions(case.trace)):
        if not attention.masks:
            continue
        yield Trial(
            key=f"attention {number} minus infinity",
            title="the attention mask is -inf over whole rows, whose softmax is NaN",
            fault=masks.with_mask(attention, masks.same, -math.inf),
            parameters={"mask": "-inf"},
            evidence=lambda case, _: _rows(case),
            fix=fix,
        )
        yield from _strict(case, number, attention)
        yield Trial(
            key=f"attention {number} product",
            title="the attention mask is NaN where nothing is hidden: 0 times -inf, a mask value that the "
            "dtype cannot hold",
            fault=masks.with_mask(attention, masks.same, seen=math.nan),
            parameters={"mask": "0 * -inf"},
            fix=fix,
        )


def _strict(case: Case, number: int, attention: parts.Attention) -> Iterator[Trial]:
    reference = masks.of_reference(case, attention)
    if reference is not None:
        yield Trial(
            key=f"attention {number} strict",
            title="a token does not see itself, so that the first sees nothing: the softmax of -inf alone "
            "is NaN",
            fault=masks.with_mask(attention, masks.hiding(reference, reference.back == 0), -math.inf),
            parameters={"mask": "strict"},
            evidence=lambda case, _: _rows(case),
            fix="have every token see itself (tril(diagonal=0)), and hide with a large finite number",
        )


def _rows(case: Case) -> Iterator[str]:
    tensor = case.candidate[case.tensor]
    if tensor.dim() == 3:
        rows = ~tensor.isfinite().all(-1)
        whole = (~tensor.isfinite()).all(-1)
        yield (
            f"{int(rows.sum())} tokens of {case.at} are not finite, {int(whole.sum())} of them in "
            "every channel"
        )
