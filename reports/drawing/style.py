"""The house style: colours, sizes and the axes that every plot shares.

The colours are those of the light page and of the plots on disk. In the page each of them becomes
the variable of the same name, so that a plot follows the reader's colour scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from divergence.reports import number, plain
from divergence.reports.layers import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = {
    "ink": "#1c2530",
    "muted": "#647181",
    "grid": "#e3e7ec",
    "floor": "#c9d0d9",
    "cumulative": "#2563c9",
    "introduced": "#8a4fd3",
    "limit": "#b7791f",
    "fail": "#cf2f3c",
    "error": "#a16207",
    "reference": "#9fb4d0",
}

WIDTH, HEIGHT = 360, 208
"""Size of a plot in points; in the page a point is a pixel at the width it is meant for."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 6, 16, 24
_HEADING, _LEGEND = 22, 16
_TEXT = 10
_MAX_TICKS = 9


@dataclass(frozen=True)
class Plot:
    """One drawing and what a reader is told of it.

    Attributes:
        name: of the files: `accumulation-key`.
        kind: `accumulation`, `range`, `token`, `head` or `spread`.
        tensor: whose it is.
        title: in words.
        figure: what was drawn.
        columns: number of layer calls along the x axis; 0 where the x axis is another.
        bins: number of rows of a heat map, else 0.
    """

    name: str
    kind: str
    tensor: str
    title: str
    figure: Figure
    columns: int = 0
    bins: int = 0

    @property
    def area(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the axes, in points from the upper left corner."""
        box = self.figure.axes[0].get_position()
        width, height = (72 * inches for inches in self.figure.get_size_inches())
        return box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's settings for drawing and saving: text stays text, ids do not change from run to run."""
    with mpl.rc_context(
        {
            "font.size": _TEXT,
            "font.family": ["DejaVu Sans"],
            "svg.fonttype": "none",
            "svg.hashsalt": "divergence",
            "text.parse_math": False,
            "axes.edgecolor": PALETTE["grid"],
            "text.color": PALETTE["ink"],
            "axes.labelcolor": PALETTE["muted"],
            "xtick.color": PALETTE["muted"],
            "ytick.color": PALETTE["muted"],
            "axes.unicode_minus": False,
        }
    ):
        yield


def blank(title: str = "", *, legend: bool = False) -> tuple[Figure, Axes]:
    """An empty plot; with a `title` (and a `legend`) it stands alone, without it goes into a page."""
    top = _TOP + (_HEADING if title else 0) + (_LEGEND if legend and title else 0)
    height = HEIGHT + top - _TOP
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes(
        (
            _LEFT / WIDTH,
            _BOTTOM / height,
            (WIDTH - _LEFT - _RIGHT) / WIDTH,
            (height - _BOTTOM - top) / height,
        )
    )
    if title:
        said = plain(title, ascii_only=True)
        figure.text(_LEFT / WIDTH, 1 - 8 / height, said, va="top", weight="bold", parse_math=False)
    else:
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
    axes.tick_params(length=0, pad=4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, axis="y", color=PALETTE["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def legend(figure: Figure, axes: Axes) -> None:
    """A legend in one line under the title."""
    height = 72 * figure.get_size_inches()[1]
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=((_LEFT - 4) / WIDTH, 1 - 22 / height),
        ncols=4,
        frameon=False,
        fontsize=8,
        handlelength=1.4,
        columnspacing=1.0,
        borderpad=0,
        handletextpad=0.5,
    )


def layer_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """The x axis: the layer calls in execution order, a line between stacks and calls."""
    axes.set_xlim(-0.5, len(rows) - 0.5)
    starts = group_starts(rows)
    step = max(1, math.ceil(len(rows) / _MAX_TICKS))
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, step) if s >= step)
    ticks = [i for i, row in enumerate(rows) if row.layer % step == 0]
    axes.set_xticks(ticks, [str(rows[i].layer) for i in ticks])
    if len(starts) == 1:
        return
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        if start:
            axes.axvline(start - 0.5, color=PALETTE["muted"], linewidth=0.6)
        words = _in_short(rows[start], room=(end - start) / len(rows))
        axes.text(
            start - 0.3,
            1.02,
            words,
            transform=axes.get_xaxis_transform(),
            fontsize=8,
            color=PALETTE["muted"],
            va="bottom",
            parse_math=False,
        )


def group_starts(rows: Sequence[Row]) -> list[int]:
    """Where a stack or a call begins."""
    return [i for i, row in enumerate(rows) if i == 0 or _group(rows[i - 1]) != _group(row)]


def _group(row: Row) -> tuple[str, int]:
    return row.stack, row.call


def _in_short(row: Row, room: float) -> str:
    stack = plain(row.stack, ascii_only=True)  # what any font has
    words = f"{stack or 'call'} {row.call}" if row.call > 1 or not stack else stack
    letters = int(room * 60)
    return words if len(words) <= letters else words[: max(0, letters - 1)] + "…" if letters > 2 else ""


def decades(axes: Axes, low: int, high: int) -> None:
    """A logarithmic y axis over whole decades, written `1e-6`."""
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0**high)
    step = max(1, math.ceil((high - low) / 6))
    axes.set_yticks([10.0**n for n in range(low, high + 1, step)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{round(math.log10(value))}"))


def plain_numbers(axes: Axes) -> None:
    """A y axis whose ticks are written without a factor set apart."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
