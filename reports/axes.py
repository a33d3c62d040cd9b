"""What a bin of a profile stands for."""

from __future__ import annotations

import math

from divergence.result import SiteResult

BINS = 64
"""Most entries of a profile (`divergence.result.Profile`); longer axes are binned."""


def axis_size(site: SiteResult, axis: str) -> int:
    """How many tokens, heads or channels the profile of `site` by `axis` covers.

    The profile's own length where the shape does not say it: a reference may keep its axes in
    another order than `[batch, heads..., token, channel]`.
    """
    entries, shape = len(getattr(site.profile, axis)), site.shape
    if len(shape) < 2:
        return entries
    size = {"channel": shape[-1], "token": shape[-2], "head": math.prod(shape[1:-2])}[axis]
    return size if min(size, BINS) == entries else entries
