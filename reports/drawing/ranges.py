"""Ranges of values by layer, reference against candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.ticker import NullLocator

from divergence.reports.drawing.style import PALETTE, Plot, blank, layer_axis, legend, plain_numbers
from divergence.reports.layers import Row
from divergence.result import SiteResult

# From this factor between the widest and the narrowest range on, the axis is logarithmic off zero.
_WIDE = 30
# Decades that such an axis shows; less is drawn as zero.
_DECADES = 4


def ranges(rows: Sequence[Row], tensor: str, *, standalone: bool) -> Plot:
    """Smallest to largest value of `tensor`: broad bars the reference, narrow ones the candidate."""
    title = f"Range of {tensor} by layer"
    figure, axes = blank(title if standalone else "", legend=True)
    sites = [row.sites.get(tensor) for row in rows]
    share = (figure.axes[0].get_position().width * 360) / max(1, len(rows))
    broad, narrow = max(1.6, min(9.0, share * 0.75)), max(0.8, min(3.0, share * 0.28))
    reference = [(i, *_ends(s, "ref")) for i, s in enumerate(sites) if s is not None]
    candidate = [(i, *_ends(s, "cand")) for i, s in enumerate(sites) if s is not None]
    for bars, color, width, label in (
        (reference, PALETTE["reference"], broad, "reference"),
        (candidate, PALETTE["cumulative"], narrow, "candidate"),
    ):
        drawn = [(x, low, high) for x, low, high in bars if math.isfinite(low) and math.isfinite(high)]
        x, low, high = zip(*drawn, strict=True) if drawn else ((), (), ())
        axes.vlines(x, low, high, color=color, linewidth=width, label=label)
        # A range of no extent (all zero, constant) would not be seen.
        flat = [(x, low) for x, low, high in drawn if low == high]
        axes.plot(*zip(*flat, strict=True) if flat else ((), ()), "_", color=color, markersize=broad + 2)
    tops = sorted(t for _, low, high in (*reference, *candidate) if (t := max(abs(low), abs(high))) > 0)
    if tops and tops[-1] > _WIDE * tops[0]:
        axes.set_yscale("symlog", linthresh=max(tops[0], tops[-1] / 10**_DECADES), linscale=0.4)
        axes.set_ylim(axes.get_ylim())
        axes.set_yticks(_spaced(axes.get_yticks().tolist()))
        axes.yaxis.set_minor_locator(NullLocator())
    plain_numbers(axes)
    layer_axis(axes, rows)
    if standalone:
        legend(figure, axes)
    return Plot(f"range-{tensor}", "range", tensor, title, figure, len(rows))


def _spaced(ticks: list[float]) -> list[float]:
    """Every other tick, from zero outwards, where there are many."""
    if len(ticks) <= 7:
        return ticks
    zero = ticks.index(0.0) if 0.0 in ticks else 0
    return [tick for i, tick in enumerate(ticks) if (i - zero) % 2 == 0]


def _ends(site: SiteResult, side: str) -> tuple[float, float]:
    low, high = getattr(site, f"{side}_min"), getattr(site, f"{side}_max")
    return (math.nan if low is None else float(low), math.nan if high is None else float(high))
