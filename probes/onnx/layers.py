"""The sites of a layer, from the scopes of its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from divergence.probes.onnx.attention import Operand, Product, find_products
from divergence.probes.onnx.found import Found
from divergence.probes.onnx.graph import Graph
from divergence.probes.onnx.scopes import Layer, origin
from divergence.sites import HIDDEN_AXES, Site

_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec|multihead_attn", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln", re.IGNORECASE)
_SKIP = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
_SIZES = frozenset({"Shape", "Size"})


def sites_of_layers(graph: Graph, layers: list[Layer]) -> Iterator[Found]:
    """Every site of `layers` that scopes and the data flow show, those of detail included."""
    source = origin(graph.nodes)
    for layer in layers:
        products = list(find_products(graph, layer.nodes))
        yield from _of_attention(graph, layer, products, source)
        yield from _of_children(graph, layer, products, source)
        hidden = leaving(graph, layer.nodes)
        if hidden is not None:
            hidden = _with_residual(graph, layer, hidden)
            yield _found(graph, layer, "hidden", Operand(hidden, _axes(graph, hidden), ""), source)


def leaving(graph: Graph, nodes: tuple[int, ...]) -> str | None:
    """The output of the module that `nodes` make up: of the floating values that are read outside
    of it, or by nobody, the last. (Not the last of the module's own nodes: the last operator may
    belong to a module inside it, as in a layer that ends with its norm.)."""
    found = _leaving(graph, nodes)
    return found[-1] if found else None


def _leaving(graph: Graph, nodes: tuple[int, ...]) -> list[str]:
    inside = set(nodes)
    found, unread = [], []
    for index in nodes:
        if graph.nodes[index].op_type == "QuantizeLinear":
            continue  # fp8 codes are floating values as well, but none of the model's
        for name in graph.nodes[index].output:
            if not name or not graph.is_float(name) or graph.rank(name) == 0:
                continue
            readers = [i for i in graph.consumers(name) if graph.nodes[i].op_type not in _SIZES]
            if name in graph.outputs or any(i not in inside for i in readers):
                found.append(name)
            elif not readers and name == graph.nodes[index].output[0]:
                unread.append(name)
    return found or unread


def _with_residual(graph: Graph, layer: Layer, hidden: str) -> str:
    """Where the layer's last addition was fused into the norm that follows it, outside the layer:
    the sum that this operator hands out beside the norm."""
    left = set(_leaving(graph, layer.nodes))
    for index in graph.consumers(hidden):
        node = graph.nodes[index]
        fused = node.op_type in _SKIP and index not in layer.nodes and left.issuperset(node.input[:2])
        if fused and len(node.output) > 3 and node.output[3]:
            return str(node.output[3])
    return hidden


def _of_attention(graph: Graph, layer: Layer, products: list[Product], source: str) -> Iterator[Found]:
    seen: set[str] = set()
    for product in products:
        inner = layer.inner(graph.scopes[product.node])
        cross = bool(_CROSS.search(inner)) or "key" in seen
        tensors = (("query", product.query), ("key", product.key), ("value", product.value))
        for tensor, operand in tensors:
            name = f"cross_{tensor}" if cross else tensor
            if operand is None or name in seen or name == "cross_query":
                continue
            seen.add(name)
            what = f"operand of {graph.nodes[product.node].op_type} in {inner or 'the layer'}"
            yield _found(graph, layer, name, operand, source, what)


def _of_children(graph: Graph, layer: Layer, products: list[Product], source: str) -> Iterator[Found]:
    """The outputs of the layer's norms, attentions and MLP, by where they stand relative to the
    attention and by name."""
    children: dict[str, list[int]] = {}
    composite: set[str] = set()
    for index in layer.nodes:
        inner = layer.inner(graph.scopes[index])
        if not inner:
            continue
        child = ".".join(inner.split(".")[: 3 if inner.startswith("layer.") else 1])
        children.setdefault(child, []).append(index)
        if inner != child:
            composite.add(child)
    hearts = {product.node for product in products}
    roles: dict[str, str] = {}
    for child, nodes in sorted(children.items(), key=lambda item: item[1][-1]):
        if hearts & set(nodes):
            roles.setdefault("cross_attention" if "attention" in roles else "attention", child)
        elif _NORM.search(child.rsplit(".", 1)[-1]):
            roles.setdefault("post_norm" if "attention" in roles else "input_norm", child)
        elif "attention" in roles and child in composite:
            roles["mlp"] = child
    for tensor, child in roles.items():
        value = leaving(graph, tuple(children[child]))
        if value is not None:
            operand = Operand(value, _axes(graph, value), f"output of {child}")
            yield _found(graph, layer, tensor, operand, source)


def _axes(graph: Graph, value: str) -> tuple[str, ...]:
    rank = graph.rank(value)
    return HIDDEN_AXES if rank in (3, None) else HIDDEN_AXES[1:] if rank == 2 else ()


def _found(graph: Graph, layer: Layer, tensor: str, operand: Operand, source: str, what: str = "") -> Found:
    index = graph.producer(operand.value)
    node = (
        f"node {graph.nodes[index].name or operand.value}" if index is not None else f"value {operand.value}"
    )
    how = ", ".join(part for part in (source, what, operand.how, node) if part)
    before = operand.before if tensor != "query" else None
    return Found(
        Site(layer.index, tensor, layer.stack, layer.call),
        operand.value,
        operand.axes,
        how,
        "scope",
        operand.index,
        operand.heads,
        _found(graph, layer, tensor, before, source, what) if before is not None else None,
    )
