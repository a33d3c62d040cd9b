"""What every node of an ONNX graph is for and which type it asks for, in a form that can be kept.

An engine names the ONNX nodes that it runs. The file beside an engine holds these descriptions, so
that its contract can be told without the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from divergence.errors import SourceError
from divergence.probes.onnx.graph import FLOATS, Graph, dtype_name, integer
from divergence.probes.onnx.roles import find_roles
from divergence.probes.onnx.scopes import find_layers
from divergence.probes.onnx.walk import depends_on_inputs

if TYPE_CHECKING:
    from onnx import NodeProto


@dataclass(frozen=True)
class NodeInfo:
    """One node of an ONNX graph.

    Attributes:
        name: its name; that of its first output where it has none.
        op: its operator.
        module: path of the innermost module of the reference that it belongs to; empty if unknown.
        role: one of `divergence.probes.onnx.walk.ROLES`.
        stack: name of the layer stack; empty where there is one only.
        layer: index of the layer that it lies in, or None.
        dtype: element type of its first output, as torch calls it (`float32`); empty if unknown.
        computed_in: floating type that a Cast before it explicitly asks for; empty where there is
            none. A Cast asks for its own target, and so does what follows it within the same role
            and module: a sine of positions cast to float32 asks for float32.
        constant: whether it depends on no input but their shapes: an engine for fixed shapes
            computes it when it is built.
    """

    name: str
    op: str
    module: str = ""
    role: str = "other"
    stack: str = ""
    layer: int | None = None
    dtype: str = ""
    computed_in: str = ""
    constant: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields that say something, as JSON values."""
        told = {k: v for k, v in asdict(self).items() if v is not None and v is not False and v != ""}
        return {"name": self.name, "op": self.op, **told}

    @classmethod
    def from_json(cls, value: Any) -> NodeInfo:
        """Reads back what `to_json` gave; unknown keys are left out.

        Raises:
            SourceError: it is something else.
        """
        if not isinstance(value, Mapping) or not all(isinstance(value.get(k), str) for k in ("name", "op")):
            raise SourceError(f"{value!r:.80} describes no ONNX node (name and op are needed); build anew")
        known: dict[str, Any] = {}
        for field in fields(cls):
            found = value.get(field.name, field.default)
            integral = isinstance(found, int) and not isinstance(found, bool)
            wanted = {"layer": found is None or integral, "constant": isinstance(found, bool)}
            if not wanted.get(field.name, isinstance(found, str)):
                raise SourceError(
                    f"ONNX node {value['name']!r}: {field.name} cannot be {found!r:.40}; build anew"
                )
            known[field.name] = found
        return cls(**known)


def describe_nodes(graph: Graph) -> tuple[NodeInfo, ...]:
    """Describes every node of `graph` in topological order."""
    kinds = [node.op_type for node in graph.nodes]
    layers = find_layers(graph.scopes, kinds) if any(graph.scopes) else []
    place = {index: (layer.stack, layer.index) for layer in layers for index in layer.nodes}
    roles = find_roles(graph, place)
    dynamic = depends_on_inputs(graph)
    asked = _explicit(graph, roles)
    return tuple(
        NodeInfo(
            name=node.name or next((name for name in node.output if name), ""),
            op=node.op_type,
            module=graph.scopes[i] or "",
            role=roles[i],
            stack=place.get(i, ("", None))[0],
            layer=place.get(i, ("", None))[1],
            dtype=_dtype(graph, node),
            computed_in=asked[i],
            constant=not dynamic[i],
        )
        for i, node in enumerate(graph.nodes)
    )


def nodes_to_json(nodes: Iterable[NodeInfo]) -> list[dict[str, Any]]:
    """`nodes` as JSON values."""
    return [node.to_json() for node in nodes]


def nodes_from_json(value: Any) -> tuple[NodeInfo, ...]:
    """Reads back what `nodes_to_json` gave.

    Raises:
        SourceError: it is something else.
    """
    if not isinstance(value, list):
        raise SourceError(f"{value!r:.80} is no list of ONNX nodes; build the engine anew")
    return tuple(NodeInfo.from_json(item) for item in value)


def _dtype(graph: Graph, node: NodeProto) -> str:
    return dtype_name(graph.element_type(node.output[0])) if node.output and node.output[0] else ""


def _explicit(graph: Graph, roles: Sequence[str]) -> list[str]:
    """The floating type that Casts ask for at each node; empty where they ask for none."""
    asked: list[str] = []
    for index, node in enumerate(graph.nodes):
        if node.op_type == "Cast":
            asked.append(FLOATS.get(integer(node, "to"), ""))
            continue
        own = _dtype(graph, node)
        found = ""
        for name in node.input:
            at = graph.producer(name) if name else None
            if at is None or not own or asked[at] != own:
                continue
            same = (roles[at], graph.scopes[at]) == (roles[index], graph.scopes[index])
            if same or graph.nodes[at].op_type == "Cast":
                found = own
        asked.append(found)
    return asked
