"""Layer stacks of two runs: which answers which where their names differ, and how large each is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from divergence.alignment import Described
    from divergence.sites import Site


def renamed_stacks(
    ours: Sequence[str],
    theirs: Sequence[str],
    reference: Mapping[Site, Described],
    candidate: Mapping[Site, Described],
) -> dict[str, str]:
    """Stack of the candidate by the reference's, where their names differ and a side has only one: the only
    one of the other side too, or the only one there with as many layers of that shape."""
    if min(len(ours), len(theirs)) != 1 or set(ours) & set(theirs):
        return {}
    if len(ours) == len(theirs):
        return {ours[0]: theirs[0]}
    fitting = [
        (own, other)
        for own in ours
        for other in theirs
        if (shapes := _hidden(reference, own)) and shapes == _hidden(candidate, other)
    ]
    return dict(fitting) if len(fitting) == 1 else {}


def _hidden(sites: Mapping[Site, Described], stack: str) -> dict[tuple[int | None, int], list[int]]:
    """Sizes of the hidden states of `stack` by layer and call, whatever their order."""
    return {
        (site.layer, site.call): sorted(entry.shape)
        for site, entry in sites.items()
        if site.layer is not None and site.tensor == "hidden" and site.stack == stack
    }


def layers_and_width(sites: Mapping[Site, Described], stacks: Sequence[str]) -> tuple[int, int] | None:
    """Number of layers of `stacks` (of all, where there are none) and width of the hidden states, where
    they are known."""
    in_layers = [s for s in sites if s.layer is not None and (s.stack in stacks or not stacks)]
    hidden = [site for site in in_layers if site.tensor == "hidden"]
    if not hidden:
        return None
    layers = {(site.stack, site.layer) for site in in_layers}
    entry = sites[hidden[0]]
    axis = entry.axes.index("channel") if "channel" in entry.axes else -1
    return (len(layers), entry.shape[axis]) if entry.shape else None
