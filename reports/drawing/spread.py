"""How the error of the first divergence is spread over tokens, heads and channels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from divergence.reports.axes import axis_size
from divergence.reports.drawing.style import PALETTE, Plot, blank, plain_numbers
from divergence.result import Comparison, SiteResult

_AXES = ("token", "head", "channel")
_FEW = 32


def spread(comparison: Comparison, *, standalone: bool) -> Iterator[Plot]:
    """Relative L2 error at the first diverging site by token, head and channel."""
    first = comparison.first_divergence
    site = next((s for s in comparison.sites if first and s.site == first.site), None)
    if site is None:
        return
    for axis in _AXES:
        values = [math.nan if v is None else v for v in getattr(site.profile, axis)]
        if len(values) > 1 and any(map(math.isfinite, values)):
            yield _drawn(site, axis, values, standalone=standalone)


def _drawn(site: SiteResult, axis: str, values: list[float], *, standalone: bool) -> Plot:
    title = f"Error of {site.site} by {axis}"
    figure, axes = blank(title if standalone else "")
    heights = np.array(values, dtype=float)
    heights[~np.isfinite(heights)] = np.nan
    size = axis_size(site, axis)
    x = (np.arange(len(values)) + (0.5 if size > len(values) else 0)) * size / len(values)
    if len(values) <= _FEW:
        axes.bar(x, heights, width=min(0.72, len(values) / 10), color=PALETTE["cumulative"])
        axes.set_xticks(x[:: math.ceil(len(values) / 9)])
    else:
        axes.fill_between(x, 0, heights, color=PALETTE["cumulative"], alpha=0.18, linewidth=0)
        axes.plot(x, heights, color=PALETTE["cumulative"], linewidth=1.4)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(bottom=0)
    plain_numbers(axes)
    return Plot(f"spread-{axis}", "spread", axis, title, figure)
