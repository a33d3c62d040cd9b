"""What a graph's own outputs are called by the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from divergence.captures import Capture
from divergence.probes.onnx.found import Found
from divergence.sites import Site

if TYPE_CHECKING:
    import torch

Fetch = Callable[[Sequence[str]], "Iterable[Mapping[str, torch.Tensor]]"]


def name_outputs(
    outputs: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    reference: Capture | None,
    fetch: Fetch,
) -> list[Found]:
    """Matches outputs with the reference's: by equal name, else by a shape that only one of each
    has, else by value. An output that matches none keeps its own name.

    Args:
        outputs: names of the outputs in order.
        shapes: their actual shapes, as far as they are known.
        reference: a run of the reference.
        fetch: runs the graph and yields values of these names.
    """
    named = {
        name: Found(Site.output(name), name, (), f"output {name} of the graph", "output") for name in outputs
    }
    if reference is None:
        return list(named.values())
    wanted = [site for site in reference.sites if site.layer is None]
    left = [name for name in outputs if Site.output(name) not in wanted]
    open_sites = [site for site in wanted if site.tensor not in named or site.call != 1]
    for name in list(left):
        same = [site for site in open_sites if reference.entries[site].shape == shapes.get(name)]
        alike = [other for other in left if shapes.get(other) == shapes.get(name)]
        if len(same) == 1 and len(alike) == 1:
            how = f"output {name} of the graph, the only one of its shape"
            named[name] = Found(same[0], name, (), how, "output")
            open_sites.remove(same[0])
            left.remove(name)
    if left and open_sites:
        from divergence.probes.onnx.values import match_values

        for item in match_values(open_sites, reference, fetch(left)):
            if item.value in left:
                how = f"output {item.value} of the graph, {item.how}"
                named[item.value] = Found(item.site, item.value, (), how, "output")
                left.remove(item.value)
    return list(named.values())


def out_of_order(outputs: Sequence[Found], reference: Capture | None) -> list[str]:
    """A remark where outputs that the reference knows under other names come in another order than its."""
    if reference is None:
        return []
    order = {site: place for place, site in enumerate(s for s in reference.sites if s.layer is None)}
    renamed = [found for found in outputs if found.site in order and found.site.tensor != found.value]
    places = [order[found.site] for found in renamed]
    if places == sorted(places):
        return []
    said = ", ".join(f"'{found.value}' is {found.site}" for found in renamed)
    note = f"the graph's outputs come in another order than the reference's ({said})"
    return [f"{note}: whoever takes them by their place gets others"]
