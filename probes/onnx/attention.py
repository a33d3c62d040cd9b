"""Finds query, key and value of an attention by following the data in the graph.

From the softmax upwards to the product of query and key, downwards to the product with the value;
from the operands of these products upwards through everything that only moves or scales elements,
to the tensor that a cache would store. The axes are followed by name on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from divergence.probes.onnx.graph import Graph, attribute, integer
from divergence.probes.onnx.scopes import same_call
from divergence.sites import HEAD_AXES

# The two operands of a product, as positions of inputs.
_PRODUCTS = {"MatMul": (0, 1), "FusedMatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3),
             "Einsum": (0, 1)}  # fmt: skip
_FUSED = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
# What may stand between the product of query and key, the softmax, and the product with the value.
_TO_SCORES = frozenset({"Add", "Sub", "Mul", "Div", "Where", "Cast", "Tanh", "Clip", "Min", "Max",
                        "Identity", "Reshape", "Squeeze", "Unsqueeze", "QuantizeLinear",
                        "DequantizeLinear"})  # fmt: skip
_TO_VALUE = frozenset({"Cast", "Where", "Identity", "Dropout", "Mul", "Div", "Reshape", "Squeeze",
                       "Unsqueeze", "QuantizeLinear", "DequantizeLinear"})  # fmt: skip
_KEEPING = frozenset({"Identity", "Dropout"})
_CHANGING = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear"})
_FAR = 24

_BATCH_HEAD = "batch*head"


@dataclass(frozen=True)
class Operand:
    """A value of the graph and what its axes are.

    Attributes:
        value: its name.
        axes: names of its axes; empty where they could not be followed.
        how: a remark on how it was reached.
        index, heads: see `divergence.probes.onnx.found.Found`.
        before: the same before the model's own code scales it.
    """

    value: str
    axes: tuple[str, ...]
    how: str
    index: int | None = None
    heads: int | None = None
    before: Operand | None = None


@dataclass(frozen=True)
class Product:
    """One attention: the node at its heart, and its operands as a cache would store them."""

    node: int
    query: Operand | None
    key: Operand | None
    value: Operand | None


def find_products(graph: Graph, nodes: tuple[int, ...]) -> Iterator[Product]:
    """The attentions among `nodes`, in topological order. Output names that fused operators leave
    out are not invented: only what the graph names can be found."""
    for index in nodes:
        node = graph.nodes[index]
        if node.op_type in _FUSED:
            yield _fused(graph, index)
        elif node.op_type == "Softmax":
            found = _decomposed(graph, index)
            if found is not None:
                yield found


def products_around(graph: Graph, softmax: int) -> tuple[int | None, int | None]:
    """The product of query and key above the node `softmax`, and that with the value below it."""
    scores = _search(graph, softmax, lambda at: _sources(graph, at), _TO_SCORES)
    return scores, _search(graph, softmax, lambda at: _readers(graph, at), _TO_VALUE)


def _decomposed(graph: Graph, softmax: int) -> Product | None:
    scores, weighted = products_around(graph, softmax)
    if scores is None or weighted is None:
        return None
    query, key = (_operand(graph, scores, which, value=False) for which in (0, 1))
    both = all(any(step[2] == _SCALING for step in _steps(graph, *operand)) for operand in (query, key))

    def exported(index: int) -> bool:
        """Whether the scaling at node `index` is what an exporter makes of the attention itself."""
        same = same_call(graph.nodes[scores], graph.nodes[index])
        return both if same is None else same

    return Product(
        softmax,
        _walk(graph, *query, exported),
        _walk(graph, *key, exported),
        _walk(graph, *_operand(graph, weighted, 1, value=True)),
    )


def _search(
    graph: Graph, start: int, neighbours: Callable[[int], list[int]], through: frozenset[str]
) -> int | None:
    """The product nearest to node `start`, reached through nodes of the kinds `through`."""
    seen, level = {start}, [start]
    for _ in range(_FAR):
        reached = []
        for at in level:
            for index in neighbours(at):
                if index in seen:
                    continue
                seen.add(index)
                if graph.nodes[index].op_type in _PRODUCTS:
                    return index
                if graph.nodes[index].op_type in through:
                    reached.append(index)
        level = reached
    return None


def _sources(graph: Graph, index: int) -> list[int]:
    made = (graph.producer(name) for name in graph.nodes[index].input if name)
    return [at for at in made if at is not None]


def _readers(graph: Graph, index: int) -> list[int]:
    return [at for name in graph.nodes[index].output for at in graph.consumers(name)]


def _operand(graph: Graph, product: int, which: int, *, value: bool) -> tuple[str, tuple[str, ...]]:
    """Name and axes of an operand of the product of query and key, or of weights and value."""
    node = graph.nodes[product]
    name = node.input[_PRODUCTS[node.op_type][which]]
    if node.op_type == "Einsum":
        equation = attribute(node, "equation")
        equation = equation.decode() if isinstance(equation, bytes) else ""
        return name, _einsum_axes(equation, which, value=value)
    rank = graph.rank(name) or graph.rank(node.output[0]) or 4
    leading = {4: ("batch", "head"), 3: (_BATCH_HEAD,)}.get(rank)
    if leading is None:
        return name, ()
    last = ("channel", "token") if which == 1 and not value else ("token", "channel")
    if which == 1 and integer(node, "transB"):
        last = last[::-1]
    return name, (*leading, *last)


def _einsum_axes(equation: str, which: int, *, value: bool) -> tuple[str, ...]:
    equation = equation.replace(" ", "")
    left, _, out = equation.partition("->")
    operands = left.split(",")
    if len(operands) != 2 or len(operands[which]) != 4 or "." in equation:
        return ()
    mine, other = operands[which], operands[1 - which]
    names = {}
    for label in mine:
        if label in other and label not in out:
            names[label] = "token" if value else "channel"
        elif label not in other:
            names[label] = "channel" if value else "token"
    free = [label for label in out if label in mine and label not in names]
    names.update(zip(free, ("batch", "head"), strict=False))
    return tuple(names.get(label, "") for label in mine)


def _walk(
    graph: Graph, value: str, axes: tuple[str, ...], exported: Callable[[int], bool] = lambda _: False
) -> Operand:
    """Follows `value` upwards through what only moves elements, or scales them for the exporter.

    Of the values with the same contents, the one nearest to the projection that has the layout of
    a cache is taken, else the one nearest to the projection whose heads are split.

    Args:
        graph: the graph.
        value, axes: where to begin.
        exported: whether the scaling at a node is the exporter's, not the model's own.
    """
    same = [(value, axes)]
    remarks: list[str] = []
    before = None
    for step in _steps(graph, value, axes):
        made = graph.producer(same[-1][0])
        if step[2] == _SCALING and made is not None and not exported(made):
            before = _walk(graph, *step[:2], lambda _: True)
            break
        if step[2]:
            same.clear()
            remarks.append(step[2])
        same.append(step[:2])
    if before is not None and same[-1][1][:1] == (_BATCH_HEAD,):
        return _folded(graph, *same[-1], before, remarks)
    canonical = [found for found in same if found[1] == HEAD_AXES]
    split = [found for found in same if set(found[1]) == set(HEAD_AXES)]
    merged = [found for found in same if found[1][:1] == (_BATCH_HEAD,)]
    heads = _split_into(graph, *same[-1]) if merged and not split else 0
    if heads:
        value, axes = merged[-1]
        axes = ("batch", "head", *axes[1:])
        return Operand(value, axes, ", ".join(dict.fromkeys(remarks)), heads=heads, before=before)
    value, axes = (canonical or split or same[:1])[-1]
    if set(axes) != set(HEAD_AXES):
        axes = ()
    return Operand(value, axes, ", ".join(dict.fromkeys(remarks)), before=before)


def _folded(graph: Graph, value: str, axes: tuple[str, ...], before: Operand, remarks: list[str]) -> Operand:
    """An operand whose heads are folded into the batch, with as many as are told apart above it."""
    heads = 0
    for above, named, _ in _steps(graph, value, axes):
        shape = graph.shape(above)
        if "head" in named and shape is not None:
            counts = [shape[i] for i, axis in enumerate(named) if axis in ("head", "repeat")]
            heads = math.prod(n if isinstance(n, int) else 0 for n in counts)
            break
    axes = ("batch", "head", *axes[1:]) if heads else ()
    return Operand(value, axes, ", ".join(dict.fromkeys(remarks)), heads=heads or None, before=before)


def _split_into(graph: Graph, value: str, axes: tuple[str, ...]) -> int:
    """How many heads a Reshape splits the channels into, where these go to the batch at once without an axis
    of their own, as in PyTorch's multi_head_attention_forward; else 0."""
    made = graph.producer(value)
    if made is None or graph.nodes[made].op_type != "Reshape" or axes[-1:] != ("channel",):
        return 0
    whole, one = (graph.shape(name) for name in (graph.nodes[made].input[0], value))
    if not whole or not one or len(whole) != len(one):
        return 0
    width, channels = whole[-1], one[-1]
    if not isinstance(width, int) or not isinstance(channels, int) or channels < 1:
        return 0
    return width // channels if width % channels == 0 else 0


_SCALING = "before scaling"
_Step = tuple[str, tuple[str, ...], str]


def _steps(graph: Graph, value: str, axes: tuple[str, ...]) -> Iterator[_Step]:
    """Upwards from `value`, node by node."""
    for _ in range(_FAR):
        step = _step(graph, value, axes)
        if step is None:
            return
        yield step
        value, axes, _remark = step


def _step(graph: Graph, value: str, axes: tuple[str, ...]) -> _Step | None:
    """One node upwards: its input, the axes there, and what of the contents it undoes."""
    index = graph.producer(value)
    if index is None:
        return None
    node = graph.nodes[index]
    source = node.input[0] if node.input else ""
    if node.op_type in _KEEPING:
        return source, axes, ""
    if node.op_type == "QuantizeLinear" or (node.op_type in _CHANGING and graph.is_float(value)):
        return source, axes, f"before {node.op_type}"
    if node.op_type in ("Mul", "Div"):
        if graph.is_scalar(node.input[1]):
            return source, axes, _SCALING
        if node.op_type == "Mul" and graph.is_scalar(source):
            return node.input[1], axes, _SCALING
        return None
    if node.op_type == "Transpose" and axes:
        perm = attribute(node, "perm")
        order = list(perm) if isinstance(perm, list | tuple) else list(range(len(axes)))[::-1]
        return source, tuple(axes[order.index(i)] for i in range(len(axes))), ""
    if node.op_type in ("Unsqueeze", "Expand", "Tile", "Reshape") and axes:
        return _reshaped(graph, index, source, axes)
    return None


def _reshaped(graph: Graph, index: int, source: str, axes: tuple[str, ...]) -> _Step | None:
    node = graph.nodes[index]
    rank = graph.rank(source)
    if node.op_type in ("Expand", "Tile"):
        if rank is not None and rank != len(axes):
            return None
        if _same_shape(graph, source, node.output[0]):
            return source, axes, ""
        return source, axes, "before repeating heads" if {"repeat", "head"} & set(axes) else "before Expand"
    if node.op_type == "Unsqueeze":
        where = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes")
        places = {int(i) % len(axes) for i in where} if isinstance(where, list | tuple) else None
        if places is None:
            places = {int(i) % len(axes) for i in where.reshape(-1)} if hasattr(where, "reshape") else set()
        if places and all(axes[i] == "repeat" for i in places):
            return source, tuple(a for i, a in enumerate(axes) if i not in places), ""
        return None
    before = _before_reshape(rank, axes)
    if before is None or (before == axes and not _same_shape(graph, source, node.output[0])):
        return None
    return source, before, ""


def _before_reshape(rank: int | None, axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Axes of what a Reshape to `axes` was given, from its rank; None where they are not plain.

    Heads that are repeated (`repeat`) follow the head that they repeat.
    """
    merged = axes[0] == _BATCH_HEAD
    if rank == len(axes):
        return axes
    if merged and rank in (4, 5):
        return ("batch", "head", *(("repeat",) if rank == 5 else ()), *axes[1:])
    if axes[:2] == ("batch", "head") and rank == 3:
        return (_BATCH_HEAD, *axes[2:])
    if axes[:2] == ("batch", "head") and rank == 5:
        return ("batch", "head", "repeat", *axes[2:])
    return None


def _same_shape(graph: Graph, first: str, second: str) -> bool:
    shape = graph.shape(first)
    return shape is not None and shape == graph.shape(second) and "?" not in shape


def _fused(graph: Graph, index: int) -> Product:
    """Query, key and value of a fused attention operator: the cache that it hands out, else what
    it is given."""
    node = graph.nodes[index]
    inputs, outputs = list(node.input) + [""] * 8, list(node.output) + [""] * 4
    own = node.domain in ("", "ai.onnx")
    if not own and node.op_type == "Attention":
        # Packed projections inside the operator: only its second output, [2, b, h, s, d], shows them.
        present = outputs[1]
        both = [Operand(present, HEAD_AXES, "present", index=i) if present else None for i in (0, 1)]
        return Product(index, None, both[0], both[1])
    heads = integer(node, "q_num_heads" if own else "num_heads")
    kv_heads = integer(node, "kv_num_heads") or heads
    query = _given(graph, inputs[0], heads)
    if outputs[1] and outputs[2]:
        key, value = (Operand(outputs[i], HEAD_AXES, "present") for i in (1, 2))
        return Product(index, query, key, value)
    return Product(index, query, _given(graph, inputs[1], kv_heads), _given(graph, inputs[2], kv_heads))


def _given(graph: Graph, name: str, heads: int) -> Operand | None:
    if not name:
        return None
    if graph.rank(name) == 3 and heads:
        return Operand(name, ("batch", "token", "head", "channel"), "", heads=heads)
    return _walk(graph, name, HEAD_AXES if graph.rank(name) in (4, None) else ())
