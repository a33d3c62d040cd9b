"""The page of a chain: which step brought an error in, all candidates in one table and one plot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from divergence.chain_result import Chain
from divergence.reports import judged, number
from divergence.reports.chain import chain_rows, latency_of, telling_sites
from divergence.reports.chart import Scale
from divergence.reports.drawing.accumulation import series
from divergence.reports.drawing.style import (
    PALETTE,
    Plot,
    blank,
    decades,
    group_starts,
    house_style,
    layer_axis,
)
from divergence.reports.html.svg import embedded
from divergence.reports.words import error_of
from divergence.result import Comparison, SiteResult
from divergence.working import file_name

_COLORS = {
    "cumulative": "blue",
    "introduced": "violet",
    "limit": "amber",
    "muted": "grey",
    "reference": "light blue",
}
_DASHES: Mapping[str, Any] = {"": "solid", ", dashed": (0, (4, 2)), ", dotted": (0, (1, 1.5))}
_TENSORS = ("key", "value", "hidden")


def chain_view(chain: Chain) -> dict[str, Any]:
    """The variables of the template."""
    shown = {n: c for n, c in zip(chain.names, chain.comparisons, strict=True) if c.sites}
    return {
        "chain": chain,
        "steps": chain.steps,
        "candidates": [
            _candidate(f"{i}-{file_name(name)}", name, comparison)
            for i, (name, comparison) in enumerate(zip(chain.names, chain.comparisons, strict=True), 1)
        ],
        "names": list(shown),
        "sites": [(site, [_cell(c, site) for c in shown.values()]) for site in telling_sites(shown)],
        "figures": list(_figures(shown)),
        "series": [
            {"name": name, "words": f"{_COLORS[color]}{words}"}
            for name, (words, color) in zip(shown, _styles(), strict=False)
        ],
    }


def _candidate(folder: str, name: str, comparison: Comparison) -> dict[str, Any]:
    first = comparison.first_divergence
    site = comparison.site(first.site) if first is not None else None
    return {
        "folder": folder,
        "name": name,
        "verdict": comparison.verdict,
        "precision": comparison.policy.precision,
        "site": first.site if first is not None else "",
        "figure": _figure(site, comparison) if site is not None else comparison.reason,
        "latency": latency_of(comparison, "candidate"),
    }


def _figure(site: SiteResult, comparison: Comparison) -> str:
    by = judged(site, comparison.policy)
    error = error_of(site, comparison.policy)
    ratio = "" if by.ratio is None else f", {number(by.ratio, 3)}x its floor"
    return f"{error}{ratio}"


def _cell(comparison: Comparison, name: str) -> dict[str, str]:
    try:
        site = comparison.site(name)
    except KeyError:
        return {"verdict": "error", "text": "not compared"}
    return {"verdict": site.verdict, "text": _figure(site, comparison)}


def _styles() -> Iterator[tuple[str, str]]:
    """Dash in words and colour, one a candidate."""
    return itertools.cycle(itertools.product(_DASHES, _COLORS))


def _figures(shown: Mapping[str, Comparison]) -> Iterator[dict[str, Any]]:
    present = {s.tensor for c in shown.values() for s in c.sites if s.layer is not None}
    with house_style():
        for tensor in _TENSORS:
            plot = _plot(shown, tensor) if tensor in present else None
            if plot is not None:
                svg = Markup(embedded(plot))  # noqa: S704 (escaped by the XML writer)
                yield {"tensor": tensor, "svg": svg}


def _plot(shown: Mapping[str, Comparison], tensor: str) -> Plot | None:
    """The accumulated error of `tensor` over the layers, a line for every candidate, floors as bands."""
    rows = chain_rows(shown, tensor)
    sites = [site for row in rows for site in row.sites.values()]
    scale = Scale.over(value for site in sites for value in (site.rel_l2, site.floor))
    if scale is None:
        return None
    figure, axes = blank()
    gaps = group_starts(rows)[1:]
    x = np.insert(np.arange(len(rows), dtype=float), gaps, np.nan)
    bottom = 10.0**scale.low

    for name, (dash, color) in zip(shown, _styles(), strict=False):
        found = [row.sites.get(name) for row in rows]
        floors = series([None if s is None else s.floor for s in found], bottom, gaps)
        errors = series([None if s is None else s.rel_l2 for s in found], bottom, gaps)
        axes.fill_between(x, bottom, floors, step="mid", color=PALETTE["floor"], alpha=0.25, linewidth=0)
        axes.plot(
            x, errors, color=PALETTE[color], linestyle=_DASHES[dash], marker="o", markersize=3, linewidth=1.3
        )
    decades(axes, scale.low, scale.high)
    layer_axis(axes, rows)
    title = f"Relative error of {tensor} by layer, every candidate"
    return Plot(f"chain-{tensor}", "accumulation", tensor, title, figure)
