"""What becomes of the reference's NaN and Inf, which enter no other figure of a comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from divergence.comparison.boxes import boxes_of
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
    for box in boxes_of(given, PIECE):
        r, c = box.ref.double(), box.cand.to(box.ref.device).double()
        found = [r.isinf() & (c != r), r.isnan() & ~c.isnan()]
        if given.mask is not None:
            batches, _, tokens, _ = (slice(at, at + n) for at, n in zip(box.start, r.shape, strict=True))
            valid = given.mask[batches, tokens].to(r.device)[:, None, :, None]
            found = [part & valid for part in found]
        counts += (part.sum() for part in found)
        release(box.ref)
        release(box.cand)
    infinite, not_a_number = torch.stack(counts).view(-1, 2).sum(0).tolist()
    return replace(metrics, unlike_inf=infinite, unlike_nan=not_a_number)
