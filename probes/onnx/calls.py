"""Tells the calls of a layer apart in a graph that runs its layers more than once.

An exporter unrolls a loop over layers (denoising steps, decode steps, layers that share weights).
Every call's nodes then carry the same module path, and only their order tells the calls apart.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from divergence.probes.onnx.graph import Graph

# Products that read weights, as their first or second input.
PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "MatMulNBits", "Einsum", "Conv"})


def split_calls(
    stack: Mapping[int, list[int]], labels: Sequence[str], fixed: Sequence[bool] = ()
) -> dict[int, list[list[int]]]:
    """Splits the nodes of each layer of one stack by call.

    Args:
        stack: indices of nodes in topological order, by layer.
        labels: what each node of the graph is; empty for those that tell nothing (constants).
        fixed: for each node whether it depends on no input. An exporter computes such once, in the
            first call, for all calls.
    """
    changing = [label if not still else "" for label, still in zip(labels, fixed, strict=False)]
    for telling in (changing, labels):
        repeated = {layer: _repeats(nodes, telling) for layer, nodes in stack.items()} if telling else {}
        counts = {len(calls) for calls in repeated.values()}
        if len(counts) == 1 and counts != {1}:
            return repeated
    return _by_turns(stack)


def reads_weights_again(graph: Graph, nodes: Sequence[int], fixed: Sequence[bool]) -> bool:
    """Whether `nodes`, one call of a layer, multiply with every weight more than once: they are several
    calls, which nothing told apart."""
    reads: Counter[str] = Counter()
    for index in nodes:
        node = graph.nodes[index]
        if node.op_type in PRODUCTS and not fixed[index]:
            reads.update(name for name in node.input[:2] if name and _is_weight(graph, name, fixed))
    return bool(reads) and min(reads.values()) > 1


def _is_weight(graph: Graph, name: str, fixed: Sequence[bool]) -> bool:
    made = graph.producer(name)
    return name in graph.initializers if made is None else fixed[made]


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
