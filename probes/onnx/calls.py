"""Tells the calls of a layer apart in a graph that runs its layers more than once.

An exporter unrolls a loop over layers (denoising steps, decode steps, layers that share weights).
Every call's nodes then carry the same module path, and only their order tells the calls apart.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from divergence.probes.onnx.graph import Graph, Shape

# Products that read weights, as their first or second input.
PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "MatMulNBits", "Einsum", "Conv"})


def split_calls(
    stack: Mapping[int, list[int]],
    labels: Sequence[str],
    fixed: Sequence[bool] = (),
    times: Callable[[Sequence[int]], int] = lambda _: 1,
) -> dict[int, list[list[int]]]:
    """Splits the nodes of each layer of one stack by call.

    Args:
        stack: indices of nodes in topological order, by layer.
        labels: what each node of the graph is; empty for those that tell nothing (constants).
        fixed: for each node whether it depends on no input. An exporter computes such once, in the
            first call, for all calls.
        times: how often nodes read every weight among them (see `reads_of_weights`).
    """
    changing = [label if not still else "" for label, still in zip(labels, fixed, strict=False)]
    for telling in (changing, labels):
        repeated = {layer: _repeats(nodes, telling) for layer, nodes in stack.items()} if telling else {}
        counts = {len(calls) for calls in repeated.values()}
        if len(counts) == 1 and counts != {1}:
            return repeated
    turns = _by_turns(stack)
    if changing and all(len(calls) == 1 for calls in turns.values()):
        return {layer: _longer_first(nodes, changing, times(nodes)) for layer, nodes in stack.items()}
    return turns


def reads_of_weights(graph: Graph, nodes: Sequence[int], fixed: Sequence[bool]) -> int:
    """How often `nodes` multiply with every weight among them, at the least: with none, once.

    An exporter that transposes a weight may store it anew for each call. So modules count too: how often each
    of several multiplies with a weight of one shape.
    """
    reads: Counter[str] = Counter()
    modules: Counter[tuple[str | None, Shape | None]] = Counter()
    for index in nodes:
        node = graph.nodes[index]
        if node.op_type in PRODUCTS and not fixed[index]:
            weights = [name for name in node.input[:2] if name and _is_weight(graph, name, fixed)]
            reads.update(weights)
            modules.update((graph.scopes[index], graph.shape(name)) for name in weights)
    several = len({module for module, _ in modules}) > 1
    return max(min(reads.values(), default=1), min(modules.values()) if several else 1)


def _is_weight(graph: Graph, name: str, fixed: Sequence[bool]) -> bool:
    made = graph.producer(name)
    return name in graph.initializers if made is None else fixed[made]


def _longer_first(nodes: Sequence[int], labels: Sequence[str], calls: int) -> list[list[int]]:
    """`nodes` in `calls` pieces that are the same but for what the first has beside: an exporter computes
    what is the same in every call (a mask) in the first alone. They all end alike: what stands behind
    the end of the first belongs to a later call."""
    telling = [node for node in nodes if labels[node]]
    kinds = [labels[node] for node in telling]
    common = {kind for kind, count in Counter(kinds).items() if count >= calls}
    for length in range(len(kinds) // calls if calls > 1 else 0, 0, -1):
        first = len(kinds) - (calls - 1) * length
        piece = kinds[-length:]
        rest = iter(kinds[:first])
        alike = kinds[first - 1 :: length] == piece[-1:] * calls and common <= set(piece)
        if alike and kinds[first:] == piece * (calls - 1) and all(kind in rest for kind in piece):
            starts = range(first, len(kinds), length)
            return [telling[:first], *(telling[at : at + length] for at in starts)]
    return [list(nodes)]


def _repeats(nodes: Sequence[int], labels: Sequence[str]) -> list[list[int]]:
    """`nodes` in the shortest pieces that are all the same."""
    telling = [node for node in nodes if labels[node]]
    kinds = [labels[node] for node in telling]
    for length in range(1, len(kinds) // 2 + 1):
        if len(kinds) % length == 0 and kinds[length:] == kinds[:-length]:
            return [telling[at : at + length] for at in range(0, len(telling), length)]
    return [list(nodes)]


def _by_turns(stack: Mapping[int, list[int]]) -> dict[int, list[list[int]]]:
    """Splits by the turns that the layers take, if all take equally many in the same order.

    A few nodes of a layer may stand apart from the rest of it; these make no turn.
    """
    owner = sorted((node, layer) for layer, nodes in stack.items() for node in nodes)
    runs = [
        (layer, [node for node, _ in run]) for layer, run in itertools.groupby(owner, lambda item: item[1])
    ]
    longest = {layer: max(len(nodes) for other, nodes in runs if other == layer) for layer in stack}
    turns = [(layer, nodes[0]) for layer, nodes in runs if 2 * len(nodes) >= longest[layer]]
    turns = [turn for i, turn in enumerate(turns) if i == 0 or turns[i - 1][0] != turn[0]]
    order = list(dict.fromkeys(layer for layer, _ in turns))
    count, rest = divmod(len(turns), len(order))
    if rest or count < 2 or [layer for layer, _ in turns] != order * count:
        return {layer: [list(nodes)] for layer, nodes in stack.items()}
    split: dict[int, list[list[int]]] = {}
    for layer, nodes in stack.items():
        starts = [start for other, start in turns if other == layer]
        split[layer] = [[] for _ in starts]
        for node in nodes:
            split[layer][max(0, bisect_right(starts, node) - 1)].append(node)
    return split
