"""Finds sites that a fault makes unequal, by the operators around them.

In a stack every layer looks alike: where some layers' sites are known, the same tensor of another
layer is the value with the same operators above it, between the neighbours that are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from divergence.probes.onnx.found import Found
from divergence.probes.onnx.graph import Graph
from divergence.sites import Site

_DEPTHS = (10, 8, 6, 5, 4, 3)


class Patterns:
    """The operators above each value of a graph, to a given depth."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[tuple[str, int], int] = {}

    def above(self, value: str, depth: int) -> int:
        """A number that is equal for values with equal operators above them."""
        key = (value, depth)
        if key not in self._known:
            index = self._graph.producer(value)
            if index is None:
                kind = "initializer" if value in self._graph.initializers else "input"
                self._known[key] = hash((kind, self._graph.rank(value)))
            else:
                node = self._graph.nodes[index]
                inputs = tuple(self.above(n, depth - 1) for n in node.input if n) if depth else ()
                which = list(node.output).index(value)
                self._known[key] = hash((node.op_type, node.domain, which, inputs))
        return self._known[key]

    def like(self, value: str, depth: int) -> list[str]:
        """The values with the same operators above them, in topological order."""
        wanted = self.above(value, depth)
        return [name for name in self._graph.values() if self.above(name, depth) == wanted]


def match_patterns(graph: Graph, sites: Iterable[Site], known: Sequence[Found]) -> list[Found]:
    """Finds `sites` by the operators around the same tensor in other layers.

    Args:
        graph: the graph.
        sites: sites still missing.
        known: sites found before.
    """
    patterns = Patterns(graph)
    missing: dict[tuple[str, str, int], list[int]] = {}
    for site in sites:
        if site.layer is not None:
            missing.setdefault((site.stack, site.tensor, site.call), []).append(site.layer)
    used = {found.value for found in known}
    found = []
    for (stack, tensor, call), layers in missing.items():
        siblings = {
            f.site.layer: f
            for f in known
            if (f.site.stack, f.site.tensor, f.site.call) == (stack, tensor, call)
            and f.site.layer is not None
            and graph.producer(f.value) is not None
        }
        for gap in _gaps(sorted(layers), sorted(siblings)):
            for layer, sibling, value in _fill(graph, patterns, gap, siblings, used):
                how = (
                    f"operators around it as at {sibling.site} ({sibling.how}), between the layers known, "
                    f"value {value}"
                )
                site = Site(layer, tensor, stack, call)
                found.append(Found(site, value, sibling.axes, how, "pattern", sibling.index, sibling.heads))
    return found


def _gaps(missing: Sequence[int], known: Sequence[int]) -> list[list[int]]:
    """`missing` layers, grouped by the known layers between which they lie."""
    gaps: dict[int, list[int]] = {}
    for layer in missing:
        gaps.setdefault(sum(k < layer for k in known), []).append(layer)
    return list(gaps.values())


def _fill(
    graph: Graph, patterns: Patterns, gap: Sequence[int], siblings: dict[int, Found], used: set[str]
) -> list[tuple[int, Found, str]]:
    """The values of the layers in `gap`, if as many values look like a sibling's as there are
    layers, at the greatest depth at which that is so."""
    before = [graph.producer(f.value) or 0 for layer, f in siblings.items() if layer < gap[0]]
    after = [graph.producer(f.value) or 0 for layer, f in siblings.items() if layer > gap[-1]]
    low, high = max(before, default=-1), min(after, default=len(graph.nodes))
    nearest = sorted(siblings.items(), key=lambda item: min(abs(item[0] - layer) for layer in gap))
    for depth in _DEPTHS:
        for _, sibling in nearest[:2]:
            alike = [
                value
                for value in patterns.like(sibling.value, depth)
                if low < (graph.producer(value) or 0) < high and value not in used
            ]
            if len(alike) == len(gap):
                used.update(alike)
                return [(layer, sibling, value) for layer, value in zip(gap, alike, strict=True)]
    return []
