"""What is drawn of a comparison, with Matplotlib's figures and never with its global state.

`plots` draws everything there is to draw, for the page or to stand alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from divergence.reports.drawing.accumulation import accumulation, common_scale
from divergence.reports.drawing.heat import heat_map, heat_scale
from divergence.reports.drawing.ranges import ranges
from divergence.reports.drawing.spread import spread
from divergence.reports.drawing.style import Plot, house_style
from divergence.reports.layers import Row, layer_rows
from divergence.result import Comparison
from divergence.sites import LAYER_TENSORS

__all__ = ["Plot", "heat_scale", "house_style", "plots", "tensors_of"]

_HEADS = ("query", "key", "value", "cross_key", "cross_value")


def plots(comparison: Comparison, *, standalone: bool = False) -> Iterator[Plot]:
    """Draws a comparison, a plot at a time, so that only one is held in memory.

    Args:
        comparison: what to draw.
        standalone: with title and legend in the picture, for files; a page has them beside it.

    To be used, and what it gives saved, within `house_style()`.
    """
    rows = layer_rows(comparison.sites)
    tensors = tensors_of(rows)
    if rows:
        scale = common_scale(rows, comparison.policy)
        for tensor in tensors:
            yield accumulation(rows, tensor, comparison.policy, scale, standalone=standalone)
        for tensor in tensors:
            yield ranges(rows, tensor, standalone=standalone)
        heat = heat_scale(site for row in rows for site in row.sites.values())
        for tensor in tensors:
            if tensor in _HEADS:
                yield from heat_map(rows, tensor, "head", heat, standalone=standalone)
        for tensor in tensors:
            yield from heat_map(rows, tensor, "token", heat, standalone=standalone)
    yield from spread(comparison, standalone=standalone)


def tensors_of(rows: Sequence[Row]) -> list[str]:
    """Tensors of the layers, in execution order; unknown ones last."""
    present = dict.fromkeys(tensor for row in rows for tensor in row.sites)
    order = {name: i for i, name in enumerate(LAYER_TENSORS)}
    return sorted(present, key=lambda tensor: order.get(tensor, len(order)))
