"""Finds sites that a fault makes unequal, by the operators around them.

In a stack every layer looks alike: where some layers' sites are known, the same tensor of another
layer is the value with the same operators above it, between the neighbours that are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from divergence.probes.onnx.found import Found
from divergence.probes.onnx.graph import Graph
from divergence.sites import Site

# How far above and below a value operators must agree, the strictest first.
_DEPTHS = tuple((above, below) for above in (10, 8, 6, 5, 4, 3) for below in (8, 6, 4, 3, 2))
_ABOVE_ONLY = ((10, 0), (8, 0), (6, 0))


class Patterns:
    """The operators above and below each value of a graph, to a given depth."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[tuple[str, int], int] = {}
        self._readers: dict[tuple[str, int], int] = {}

    def above(self, value: str, depth: int) -> int:
        """A number that is equal for values with equal operators above them."""
        key = (value, depth)
        if key not in self._known:
            index = self._graph.producer(value)
            if index is None:
                kind = "initializer" if value in self._graph.initializers else "input"
                self._known[key] = hash((kind, self._graph.shape(value)))
            else:
                node = self._graph.nodes[index]
                inputs = tuple(self.above(n, depth - 1) for n in node.input if n) if depth else ()
                which = list(node.output).index(value)
                self._known[key] = hash((node.op_type, node.domain, which, inputs))
        return self._known[key]

    def below(self, value: str, depth: int) -> int:
        """A number that is equal for values with equal operators below them."""
        key = (value, depth)
        if key not in self._readers:
            readers = []
            for index in self._graph.consumers(value) if depth else ():
                node = self._graph.nodes[index]
                places = tuple(i for i, name in enumerate(node.input) if name == value)
                further = tuple(self.below(name, depth - 1) for name in node.output if name)
                readers.append(hash((node.op_type, node.domain, places, further)))
            self._readers[key] = hash(tuple(sorted(readers)))
        return self._readers[key]

    def like(self, value: str, above: int, below: int) -> list[str]:
        """The values with the same operators around them, in topological order."""
        wanted = (self.above(value, above), self.below(value, below))
        names = (name for name in self._graph.values() if self.above(name, above) == wanted[0])
        return [name for name in names if self.below(name, below) == wanted[1]]


def match_patterns(
    graph: Graph, sites: Iterable[Site], known: Sequence[Found], sizes: Mapping[Site, int]
) -> list[Found]:
    """Finds `sites` by the operators around the same tensor in other layers.

    Args:
        graph: the graph.
        sites: sites still missing.
        known: sites found before.
        sizes: numbers of elements of the sites.
    """
    matcher = _Matcher(graph, known, sizes)
    sites = [site for site in sites if site.layer is not None]
    missing: dict[tuple[str, str, int], list[int]] = {}
    for site in sites:
        missing.setdefault((site.stack, site.tensor, site.call), []).append(site.layer or 0)
    found = []
    for (stack, tensor, call), layers in missing.items():
        siblings = {
            f.site.layer: f
            for f in known
            if (f.site.stack, f.site.tensor, f.site.call) == (stack, tensor, call)
            and f.site.layer is not None
            and graph.producer(f.value) is not None
            # Two attentions in a layer look alike: both must be known, or one is taken for the other.
            and not (tensor != "hidden" and f.site.with_tensor(_OTHER.get(tensor, tensor)) in sites)
        }
        for gap in _gaps(sorted(layers), sorted(siblings)):
            for layer, sibling, value in matcher.fill(Site(gap[0], tensor, stack, call), gap, siblings):
                how = (
                    f"operators around it as at {sibling.site} ({sibling.how}), between the layers known, "
                    f"value {value}"
                )
                site = Site(layer, tensor, stack, call)
                found.append(Found(site, value, sibling.axes, how, "pattern", sibling.index, sibling.heads))
    return found


_OTHER = {"key": "cross_key", "value": "cross_value", "cross_key": "key", "cross_value": "value"}


def _gaps(missing: Sequence[int], known: Sequence[int]) -> list[list[int]]:
    """`missing` layers, grouped by the known layers between which they lie."""
    gaps: dict[int, list[int]] = {}
    for layer in missing:
        gaps.setdefault(sum(k < layer for k in known), []).append(layer)
    return list(gaps.values())


class _Matcher:
    """Fills gaps between known layers with values that look like those in known layers."""

    def __init__(self, graph: Graph, known: Sequence[Found], sizes: Mapping[Site, int]) -> None:
        self._graph = graph
        self._known = known
        self._sizes = sizes
        self._patterns = Patterns(graph)
        self._used = {found.value for found in known}

    def fill(
        self, first: Site, gap: Sequence[int], siblings: Mapping[int, Found]
    ) -> list[tuple[int, Found, str]]:
        """The values of the layers in `gap`, of which `first` is the first site: if as many values
        look like a sibling's as there are layers, at the greatest depth at which that is so."""
        low, high = self._between(first, gap)
        size = self._sizes.get(first)
        nearest = sorted(siblings.items(), key=lambda item: min(abs(item[0] - layer) for layer in gap))
        # The last layer's output is read by other operators than the outputs before it.
        depths = _DEPTHS + _ABOVE_ONLY if first.tensor == "hidden" else _DEPTHS
        for above, below in depths:
            for _, sibling in nearest[:2]:
                alike = [
                    value
                    for value in self._patterns.like(sibling.value, above, below)
                    if low < (self._graph.producer(value) or 0) < high
                    and value not in self._used
                    and self._graph.size(value) in (None, size)
                ]
                if len(alike) == len(gap):
                    self._used.update(alike)
                    return [(layer, sibling, value) for layer, value in zip(gap, alike, strict=True)]
        return []

    def _between(self, first: Site, gap: Sequence[int]) -> tuple[int, int]:
        """The last node known to be before the layers in `gap`, and the first known to be after."""
        low, high = -1, len(self._graph.nodes)
        for found in self._known:
            site, index = found.site, self._graph.producer(found.value)
            if index is None or site.layer is None or (site.stack, site.call) != (first.stack, first.call):
                continue
            if site.tensor.startswith("cross_"):
                continue  # exporters may compute these ahead of their layer
            if site.layer < gap[0]:
                low = max(low, index)
            elif site.layer > gap[-1]:
                high = min(high, index)
        return low, high
