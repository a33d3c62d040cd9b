"""Finds the outputs of layers by where the graph is narrow, when the keys of the layers are known.

Whatever a layer's key has an effect on passes the layer's output: there is no way around it. The
values that all paths from a key to the model's output pass are its post-dominators; the last of
them that the next layer's key depends on is the output of the layer. (The next layer's norm is
none of them: its residual connection leads around it.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from divergence.probes.onnx.found import Found
from divergence.probes.onnx.graph import Graph
from divergence.sites import HIDDEN_AXES, Site


def match_cuts(
    graph: Graph, sites: Iterable[Site], known: Sequence[Found], sizes: Mapping[Site, int]
) -> list[Found]:
    """Finds those of `sites` that are outputs of layers, between keys that are known.

    Args:
        graph: the graph.
        sites: sites still missing.
        known: sites found before.
        sizes: numbers of elements of the sites.
    """
    by_site = {found.site: found for found in known}
    wanted = [site for site in sites if site.tensor == "hidden" and site.with_tensor("key") in by_site]
    if not wanted:
        return []
    cuts = _Cuts(graph, by_site)
    found = []
    for site in sorted(wanted, key=lambda site: site.layer or 0):
        key, following = site.with_tensor("key"), _next(site).with_tensor("key")
        if following in by_site:
            value, how = cuts.between(key, following), f"all paths from {key} to {following} pass it"
        else:
            value, how = cuts.like_before(site)
        if value and graph.is_float(value) and graph.size(value) in (None, sizes.get(site)):
            axes = HIDDEN_AXES if graph.rank(value) == 3 else ()
            by_site[site] = Found(site, value, axes, f"{how}, value {value}", "pattern")
            found.append(by_site[site])
    return found


def _next(site: Site, by: int = 1) -> Site:
    return Site((site.layer or 0) + by, site.tensor, site.stack, site.call)


class _Cuts:
    """The narrow places of a graph after the keys that are known."""

    def __init__(self, graph: Graph, by_site: Mapping[Site, Found]) -> None:
        self._graph = graph
        self._by_site = by_site
        self._main, self._immediate = _post_dominators(graph)

    def between(self, key: Site, following: Site) -> str:
        """The last value that all paths from `key` to the output pass and `following` depends on;
        empty if there is none."""
        end = self._graph.producer(self._by_site[following].value)
        upstream = _ancestors(self._graph, end) if end is not None else set()
        passed = [node for node in self._after(key) if node in upstream]
        return self._output(passed[-1]) if passed else ""

    def like_before(self, site: Site) -> tuple[str, str]:
        """The output of the last layer: as many narrow places after its key as in the layer
        before it, if the operators there are the same; empty if they are not."""
        before = _next(site, -1)
        if before not in self._by_site or before.with_tensor("key") not in self._by_site:
            return "", ""
        end = self._graph.producer(self._by_site[before].value)
        model = list(self._after(before.with_tensor("key")))
        if end not in model:
            return "", ""
        length = model.index(end) + 1
        own = list(self._after(site.with_tensor("key")))[:length]
        if self._kinds(own) != self._kinds(model[:length]):
            return "", ""
        return self._output(own[-1]), f"as narrow a place of the graph as {before}, with the same operators"

    def _after(self, key: Site) -> Iterator[int]:
        start = self._graph.producer(self._by_site[key].value)
        if start is not None and start in self._main:
            yield from _chain(self._immediate, start)

    def _kinds(self, nodes: Sequence[int]) -> list[str]:
        return [self._graph.nodes[node].op_type for node in nodes]

    def _output(self, node: int) -> str:
        return next((name for name in self._graph.nodes[node].output if name), "")


def _ancestors(graph: Graph, node: int) -> set[int]:
    """`node` and all nodes that it depends on."""
    seen, stack = {node}, [node]
    while stack:
        for name in graph.nodes[stack.pop()].input:
            index = graph.producer(name)
            if index is not None and index not in seen:
                seen.add(index)
                stack.append(index)
    return seen


def _post_dominators(graph: Graph) -> tuple[set[int], dict[int, int]]:
    """The nodes that the model's main output depends on, and the immediate post-dominator of each
    with respect to it. The main output is the one that most nodes lead to."""
    producers = [index for index in map(graph.producer, graph.outputs) if index is not None]
    main, exit_node = max(((_ancestors(graph, p), p) for p in producers), key=lambda item: len(item[0]))
    immediate: dict[int, int] = {}
    for node in sorted(main - {exit_node}, reverse=True):
        common: int | None = None
        for name in graph.nodes[node].output:
            for reader in graph.consumers(name):
                if reader in main and graph.nodes[reader].op_type not in ("Shape", "Size"):
                    common = reader if common is None else _meet(immediate, common, reader)
        if common is not None:
            immediate[node] = common
    return main, immediate


def _meet(immediate: dict[int, int], first: int, second: int) -> int:
    # Nodes stand in topological order, so the earlier of two is never beyond where they meet.
    while first != second:
        if first < second:
            first = immediate.get(first, second)
        else:
            second = immediate.get(second, first)
    return first


def _chain(immediate: dict[int, int], node: int) -> Iterator[int]:
    while node in immediate:
        node = immediate[node]
        yield node
