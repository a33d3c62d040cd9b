"""How the error of a tensor accumulates over the layers, against the noise floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from divergence.reports import judged
from divergence.reports.chart import Scale
from divergence.reports.drawing.style import PALETTE, Plot, blank, decades, group_starts, layer_axis, legend
from divergence.reports.layers import Row
from divergence.result import Policy, SiteResult

_EMPTY = Scale(-8, 0)


def common_scale(rows: Sequence[Row], policy: Policy) -> Scale:
    """The decades that all accumulation plots share, so that tensors can be compared by eye."""
    values: list[float | None] = []
    for row in rows:
        for site in row.sites.values():
            values += [site.rel_l2, site.introduced, site.floor, threshold(site, policy)]
    return Scale.over(values) or _EMPTY


def threshold(site: SiteResult, policy: Policy) -> float | None:
    """The relative L2 error from which `site` fails by its floor; None where it has no floor."""
    if policy.policy != "noise-floor":
        return None
    by = judged(site, policy)
    return None if by.floor is None else by.floor * by.limit


def series(values: Sequence[float | None], bottom: float, gaps: Sequence[int]) -> np.ndarray:
    """`values` as a line of a logarithmic plot: not below `bottom`, interrupted before the rows `gaps` and
    where there is none."""
    kept = [math.nan if v is None or not math.isfinite(v) else max(v, bottom) for v in values]
    return np.insert(np.array(kept, dtype=float), gaps, np.nan)


def accumulation(rows: Sequence[Row], tensor: str, policy: Policy, scale: Scale, *, standalone: bool) -> Plot:
    """Cumulative and introduced error of `tensor`, its noise floor as a band, its limit dashed."""
    title = f"Relative error of {tensor} by layer"
    figure, axes = blank(title if standalone else "", legend=True)
    sites = [row.sites.get(tensor) for row in rows]
    # A gap between stacks and calls: no line leads from one into the next.
    gaps = group_starts(rows)[1:]
    x = np.insert(np.arange(len(rows), dtype=float), gaps, np.nan)
    bottom, top = 10.0**scale.low, 10.0**scale.high

    floors = series([None if s is None else s.floor for s in sites], bottom, gaps)
    limits = series([None if s is None else threshold(s, policy) for s in sites], bottom, gaps)
    cumulative = series([None if s is None else s.rel_l2 for s in sites], bottom, gaps)
    introduced = series([None if s is None else s.introduced for s in sites], bottom, gaps)
    axes.fill_between(
        x, bottom, floors, step="mid", color=PALETTE["floor"], alpha=0.55, linewidth=0, label="noise floor"
    )
    style: dict[str, Any] = {"marker": "o", "markersize": 2.6 if len(rows) > 40 else 3.4, "linewidth": 1.3}
    axes.plot(x, limits, color=PALETTE["limit"], linestyle=(0, (3, 2)), linewidth=1, label="limit")
    axes.plot(x, cumulative, color=PALETTE["cumulative"], label="cumulative", **style)
    axes.plot(x, introduced, color=PALETTE["introduced"], label="introduced", **style)
    failing = [s is not None and s.verdict == "fail" for s in sites]
    marks = np.where(np.insert(failing, gaps, values=False), x, np.nan)
    shown = np.where(np.isnan(introduced), cumulative, introduced)
    axes.plot(marks, shown, "o", color=PALETTE["fail"], markersize=4.6, label="fails")
    broken = [i for i, s in enumerate(sites) if s is not None and s.cand_nonfinite > s.ref_nonfinite]
    axes.plot(broken, [top] * len(broken), "x", color=PALETTE["fail"], markersize=6, clip_on=False)
    decades(axes, scale.low, scale.high)
    layer_axis(axes, rows)
    if standalone:
        legend(figure, axes)
    return Plot(f"accumulation-{tensor}", "accumulation", tensor, title, figure, len(rows))
