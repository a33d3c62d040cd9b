"""Heat maps: the error of every layer by head or by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.ticker import MaxNLocator

from divergence.reports.axes import axis_size
from divergence.reports.chart import Scale
from divergence.reports.drawing.style import Plot, blank, layer_axis
from divergence.reports.layers import Row
from divergence.result import SiteResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Transparent at the low end, so that it reads on a light and on a dark page.
HEAT = LinearSegmentedColormap.from_list(
    "heat",
    [(0.25, 0.52, 0.90, 0.05), (0.25, 0.52, 0.90, 0.6), (0.58, 0.33, 0.80, 0.85), (0.84, 0.19, 0.26, 1)],
).with_extremes(bad=(0, 0, 0, 0), over=(0.5, 0.52, 0.57, 1))
"""Above the scale is what has no error because the candidate holds NaN or Inf there."""
_DECADES = 8


def heat_scale(sites: Iterable[SiteResult]) -> Scale:
    """The decades that all heat maps of a comparison share, so that their colours mean the same; at
    most `_DECADES`, from the top."""
    sites = list(sites)
    scale = Scale.over(v for s in sites for v in (*s.profile.head, *s.profile.token)) or Scale(-8, 0)
    return Scale(max(scale.low, scale.high - _DECADES), scale.high)


def heat_map(
    rows: Sequence[Row], tensor: str, axis: Literal["head", "token"], scale: Scale, *, standalone: bool
) -> Iterator[Plot]:
    """Relative L2 error of `tensor`, layers to the right, heads or tokens down; nothing where no
    layer's error is known by that axis."""
    profiles = [_profile(row, tensor, axis) for row in rows]
    bins = max(map(len, profiles), default=0)
    if bins < 1:
        return
    values = np.full((bins, len(rows)), np.nan)
    broken = np.zeros_like(values, dtype=bool)
    for i, profile in enumerate(profiles):
        values[: len(profile), i] = profile
        broken[: len(profile) or bins, i] = _nonfinite(rows[i], tensor)
    low, high = 10.0**scale.low, 10.0**scale.high
    title = f"Error of {tensor} by layer and {axis}"
    figure, axes = blank(title if standalone else "", legend=True)
    # Zero is drawn as the lowest decade, an error that overflowed as the highest; neither is left blank.
    shown = np.clip(values, low, high)
    shown[np.isnan(values) & broken] = 10 * high
    # Not interpolated: a picture of a pixel a value, which the viewer enlarges.
    image = axes.imshow(
        shown, cmap=HEAT, norm=LogNorm(low, high), aspect="auto", interpolation="none", origin="upper"
    )
    axes.grid(visible=False)
    _vertical(axes, rows, tensor, axis, bins)
    layer_axis(axes, rows)
    if standalone:
        bar = figure.add_axes((0.55, 1 - 34 / (72 * figure.get_size_inches()[1]), 0.4, 0.02))
        figure.colorbar(image, cax=bar, orientation="horizontal").ax.tick_params(labelsize=7, length=0, pad=1)
        bar.minorticks_off()
        bar.set_xticks([low, high], [f"1e{scale.low}", f"1e{scale.high}"])
    yield Plot(f"{axis}s-{tensor}", axis, tensor, title, figure, len(rows), bins)


def _nonfinite(row: Row, tensor: str) -> bool:
    site = row.sites.get(tensor)
    return site is not None and site.cand_nonfinite > site.ref_nonfinite


def _profile(row: Row, tensor: str, axis: str) -> list[float]:
    site = row.sites.get(tensor)
    profile = getattr(site.profile, axis) if site is not None else ()
    return [np.nan if value is None else value for value in profile]


def _vertical(axes: Axes, rows: Sequence[Row], tensor: str, axis: str, bins: int) -> None:
    """The y axis in heads or, bins being several tokens each, in tokens."""
    sizes = {axis_size(site, axis) for row in rows if (site := row.sites.get(tensor)) is not None}
    size = max(sizes) if len(sizes - {0}) == 1 else bins
    ticks = [t for t in MaxNLocator(5, integer=True).tick_values(0, size - 1) if 0 <= t < size]
    axes.set_yticks([t * bins / size for t in ticks], [str(int(t)) for t in ticks])
