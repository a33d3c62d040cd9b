"""Puts together where the sites of a graph lie, and what is worth a remark about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from divergence.captures import Capture
from divergence.errors import ConfigurationError, nearest
from divergence.probes.onnx.calls import reads_of_weights
from divergence.probes.onnx.found import Found
from divergence.probes.onnx.graph import Graph
from divergence.probes.onnx.layers import sites_of_layers
from divergence.probes.onnx.names import declared_sites
from divergence.probes.onnx.scopes import find_layers
from divergence.probes.onnx.walk import depends_on_inputs
from divergence.sites import DETAIL_TENSORS, Site, in_execution_order

CACHED = ("key", "value", "cross_key", "cross_value")


@dataclass(frozen=True)
class SiteMap:
    """Where the sites of a graph lie.

    Attributes:
        found: the sites of layers, in execution order.
        stacks: names of the stacks in execution order.
        outputs: the graph's outputs that are no site of a layer.
        notes: remarks.
    """

    found: Mapping[Site, Found]
    stacks: tuple[str, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...]

    def with_found(self, more: Iterable[Found], notes: Iterable[str] = ()) -> SiteMap:
        """This mapping with `more` sites, which do not replace those it has."""
        found = dict(self.found)
        for item in more:
            found.setdefault(item.site, item)
        stacks = tuple(dict.fromkeys((*self.stacks, *(site.stack for site in found))))
        return _assembled(found, stacks, (*self.outputs,), (*self.notes, *notes))

    def with_instead(self, others: Iterable[Found]) -> SiteMap:
        """This mapping with `others` in place of what it has for their sites."""
        return replace(self, found={**self.found, **{item.site: item for item in others}})

    def selected(self, *, detail: bool) -> list[Found]:
        """The sites of a run, in execution order."""
        return [f for site, f in self.found.items() if detail or site.tensor not in DETAIL_TENSORS]


def map_graph(graph: Graph, overrides: Mapping[str, str], reference: Capture | None, path: str) -> SiteMap:
    """Finds the sites that names, scopes and the data flow of the graph show.

    Raises:
        ConfigurationError: an override is no site, or names a value that the graph does not have.
    """
    fixed = [not depends for depends in depends_on_inputs(graph)]
    times = partial(reads_of_weights, graph, fixed=fixed)
    layers = find_layers(graph.scopes, [n.op_type for n in graph.nodes], _counts(reference), fixed, times)
    stacks = list(dict.fromkeys(layer.stack for layer in layers))
    untold = [layer for layer in layers if times(layer.nodes) > 1]
    layers = [layer for layer in layers if layer not in untold]
    by_scope = list(sites_of_layers(graph, layers))
    cached = [f.site.stack for f in by_scope if f.site.tensor == "key"]
    if reference is not None and not stacks:
        cached = [site.stack for site in reference.sites if site.tensor == "key"]
    found: dict[Site, Found] = {}
    for item in _overridden(graph, overrides, path):
        found[item.site] = item
    for item in declared_sites(graph, layers, list(dict.fromkeys(cached))):
        found.setdefault(item.site, item)
    notes = [
        f"The graph runs {layer.path} more than once and does not tell its calls apart: sites of this layer "
        "are not taken from its nodes."
        for layer in untold
    ]
    for item in by_scope:
        had = found.setdefault(item.site, item)
        if had.method == "name" and had.value != item.value and _declared_elsewhere(had, by_scope):
            notes.append(
                f"Output {had.value} is what {_declared_elsewhere(had, by_scope)} holds according to the "
                f"graph's scopes, though its name says {had.site}."
            )
    stacks = list(dict.fromkeys((*stacks, *(site.stack for site in found))))
    return _assembled(found, tuple(stacks or [""]), tuple(graph.outputs), tuple(notes))


def _assembled(
    found: Mapping[Site, Found], stacks: tuple[str, ...], outputs: tuple[str, ...], notes: tuple[str, ...]
) -> SiteMap:
    ordered = {site: found[site] for site in in_execution_order(found, stacks)}
    taken = {f.value for f in ordered.values() if f.site.tensor in CACHED or f.method == "name"}
    return SiteMap(ordered, stacks, tuple(name for name in outputs if name not in taken), notes)


def _declared_elsewhere(item: Found, by_scope: Iterable[Found]) -> Site | None:
    return next((f.site for f in by_scope if f.value == item.value and f.site != item.site), None)


def _overridden(graph: Graph, overrides: Mapping[str, str], path: str) -> Iterable[Found]:
    for text, value in overrides.items():
        site = Site.parse(text)
        if not graph.has(value):
            raise ConfigurationError(
                f"site {text}: {path} has no value '{value}'{nearest(value, graph.values())}; "
                "see its values with a graph viewer such as Netron"
            )
        axes = site.axes if graph.rank(value) in (len(site.axes), None) else ()
        yield Found(site, value, axes, f"configuration, value {value}", "override")


def _counts(reference: Capture | None) -> dict[str, int]:
    """How many layers each stack of the reference has."""
    counts: dict[str, set[int]] = {}
    for site in reference.sites if reference is not None else ():
        if site.layer is not None:
            counts.setdefault(site.stack, set()).add(site.layer)
    return {stack: len(layers) for stack, layers in counts.items()}
