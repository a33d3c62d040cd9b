"""What becomes of the reference's NaN and Inf, which enter no other figure of a comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from divergence.shards import release

if TYPE_CHECKING:
    import torch

    from divergence.comparison.metrics import Metrics
    from divergence.comparison.views import Operands

PIECE = 1 << 19
"""Most elements looked through at a time: 8 MiB in float64 for both sides."""


def with_unlike(metrics: Metrics, given: Operands) -> Metrics:
    """`metrics` of `given` with `unlike_inf` and `unlike_nan`. Only tensors whose reference holds NaN or Inf
    are looked through once more for them, a piece at a time."""
    if not metrics.ref_nonfinite or metrics.bit_equal:
        return metrics
    import torch

    counts: list[torch.Tensor] = []
    for ref, cand, valid in _pieces(given):
        r, c = ref.double(), cand.to(ref.device).double()
        found = (r.isinf() & (c != r), r.isnan() & ~c.isnan())
        counts += (part.sum() if valid is None else (part & valid).sum() for part in found)
        release(ref)
        release(cand)
    infinite, not_a_number = torch.stack(counts).view(-1, 2).sum(0).tolist()
    return replace(metrics, unlike_inf=infinite, unlike_nan=not_a_number)


def _pieces(given: Operands) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Both tensors `[token, channel]`, and which tokens are valid `[token, 1]`, in pieces."""
    form = given.form
    views = [form.view(side) for side in (given.ref, given.cand)]
    rows = max(1, PIECE // max(1, form.sizes[-1]))
    for place in np.ndindex(*form.sizes[:-2]):
        parts = [view[place].split(rows) for view in views]
        masks = itertools.repeat(None) if given.mask is None else given.mask[place[0]].split(rows)
        for ref, cand, mask in zip(*parts, masks, strict=False):
            valid = None if mask is None else mask.to(ref.device)[:, None]
            for r, c in zip(ref.split(PIECE, 1), cand.split(PIECE, 1), strict=True):
                yield r, c, valid
