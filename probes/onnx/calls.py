"""Tells the calls of a layer apart in a graph that runs its layers more than once.

An exporter unrolls a loop over layers (denoising steps, decode steps, layers that share weights).
Every call's nodes then carry the same module path, and only their order tells the calls apart.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence


def split_calls(stack: Mapping[int, list[int]], labels: Sequence[str]) -> dict[int, list[list[int]]]:
    """Splits the nodes of each layer of one stack by call.

    Args:
        stack: indices of nodes in topological order, by layer.
        labels: what each node of the graph is; empty for those that tell nothing (constants).
    """
    repeated = {layer: _repeats(nodes, labels) for layer, nodes in stack.items()}
    if len({len(calls) for calls in repeated.values()}) == 1:
        calls = len(next(iter(repeated.values())))
        if calls > 1:
            return repeated
    return _by_turns(stack)


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
