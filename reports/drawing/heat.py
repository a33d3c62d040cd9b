"""Heat maps: the error of every layer by head or by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm

from divergence.reports.chart import Scale
from divergence.reports.drawing.style import PALETTE, Plot, blank, layer_axis
from divergence.reports.layers import Row

# Transparent at the low end, so that it reads on a light and on a dark page.
HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.16, 0.47, 0.80, 0.06), (0.16, 0.47, 0.80, 0.75), (0.93, 0.62, 0.17, 0.9), (0.82, 0.16, 0.22, 1)]
)
HEAT.set_bad((0, 0, 0, 0))


def heat_map(
    rows: Sequence[Row], tensor: str, axis: Literal["head", "token"], *, standalone: bool
) -> Iterator[Plot]:
    """Relative L2 error of `tensor`, layers to the right, heads or tokens down; nothing where no
    layer's error is known by that axis."""
    profiles = [_profile(row, tensor, axis) for row in rows]
    bins = max(map(len, profiles), default=0)
    if bins < 1:
        return
    values = np.full((bins, len(rows)), np.nan)
    for i, profile in enumerate(profiles):
        values[: len(profile), i] = profile
    scale = Scale.over(values[np.isfinite(values)].tolist()) or Scale(-8, 0)
    low, high = 10.0**scale.low, 10.0**scale.high
    title = f"Error of {tensor} by layer and {axis}"
    figure, axes = blank(title if standalone else "", legend=True)
    # Zero is drawn as the lowest decade, an error that overflowed as the highest; neither is left blank.
    shown = np.clip(np.where(np.isposinf(values), high, values), low, high)
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
    else:
        figure.text(
            0.985, 0.985, f"1e{scale.low} … 1e{scale.high}", ha="right", va="top", fontsize=8,
            color=PALETTE["muted"],
        )  # fmt: skip
    yield Plot(f"{axis}s-{tensor}", axis, tensor, title, figure, len(rows), bins)


def _profile(row: Row, tensor: str, axis: str) -> list[float]:
    site = row.sites.get(tensor)
    profile = getattr(site.profile, axis) if site is not None else ()
    return [np.nan if value is None else value for value in profile]


def _vertical(axes: object, rows: Sequence[Row], tensor: str, axis: str, bins: int) -> None:
    """The y axis in heads or, bins being several tokens each, in tokens."""
    sizes = {
        site.shape[-3 if axis == "head" else -2]
        for row in rows
        if (site := row.sites.get(tensor)) is not None and len(site.shape) >= 3
    }
    size = sizes.pop() if len(sizes) == 1 else bins
    ticks = np.unique(np.linspace(0, bins - 1, min(bins, 5)).round().astype(int))
    axes.set_yticks(ticks, [str(int(tick * size / bins)) for tick in ticks])  # type: ignore[attr-defined]
