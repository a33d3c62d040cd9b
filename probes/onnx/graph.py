"""An ONNX graph that can be asked who makes a value, who reads it, and what is known of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from divergence.probes.onnx.scopes import node_scopes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

Shape = tuple[int | str, ...]

# Numbers of element types, which the format fixes: who reads an engine need not wait for onnx.
FLOATS: Mapping[int, str] = {
    1: "float32",
    11: "float64",
    10: "float16",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
}
_OTHERS: Mapping[int, str] = {9: "bool", 8: "string"}
_EXTERNAL = 1

# What only says something about shapes or scales: results of these on such are scalars too.
_SCALAR_OPS = frozenset(
    {"Shape", "Size", "Slice", "Gather", "Cast", "Sqrt", "Div", "Mul", "Squeeze", "Constant"}
)
_DEEP = 12


def dtype_name(element: int) -> str:
    """The name of an ONNX element type, as torch calls it; empty if unknown."""
    if element in FLOATS:
        return FLOATS[element]
    if element in _OTHERS:
        return _OTHERS[element]
    import onnx

    return onnx.helper.tensor_dtype_to_string(element).rsplit(".", 1)[-1].lower() if element else ""


class Graph:
    """The top level of an ONNX graph.

    Args:
        model: the model; its large initializers may be external.
        shapes: actual shapes of inputs by name, which make inferred shapes concrete.

    Attributes:
        nodes: nodes in topological order.
        scopes: path of the innermost module of each node; None where nothing shows it.
        inputs, outputs: names in order; initializers are no inputs.
    """

    def __init__(self, model: ModelProto, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.initializers: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self.inputs = [i.name for i in model.graph.input if i.name not in self.initializers]
        self.outputs = [o.name for o in model.graph.output]
        self._producer: dict[str, int] = {}
        self._consumers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self._producer[name] = index
            for name in dict.fromkeys(_reads(node)):
                self._consumers[name].append(index)
        self._shapes = dict(shapes or {})

    @cached_property
    def scopes(self) -> list[str | None]:
        """Path of the innermost module of each node."""
        return node_scopes(self.nodes, self.producer, self.consumers)

    @cached_property
    def _infos(self) -> dict[str, tuple[int, Shape | None]]:
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for info in model.graph.input:
            if info.name in self._shapes:
                del info.type.tensor_type.shape.dim[:]
                for size in self._shapes[info.name]:
                    info.type.tensor_type.shape.dim.add(dim_value=size)
        if self._shapes:
            for info in model.graph.output:  # declared sizes would stand against the actual ones
                info.type.tensor_type.ClearField("shape")
        try:
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except Exception:  # an aid only: what is unknown stays unknown
            model = self.model
        infos: dict[str, tuple[int, tuple[int | str, ...] | None]]
        infos = {name: (t.data_type, tuple(t.dims)) for name, t in self.initializers.items()}
        for info in (*model.graph.value_info, *model.graph.input, *model.graph.output):
            infos[info.name] = _info(info)
        return infos

    def producer(self, value: str) -> int | None:
        """Index of the node that makes `value`; None for inputs and initializers."""
        return self._producer.get(value)

    def consumers(self, value: str) -> list[int]:
        """Indices of the nodes that read `value`."""
        return self._consumers.get(value, [])

    def has(self, value: str) -> bool:
        """Whether the graph has a value of this name."""
        return value in self._producer or value in self.initializers or value in self.inputs

    def values(self) -> Iterable[str]:
        """Names of all values that nodes make, in topological order."""
        return self._producer

    def shape(self, value: str) -> Shape | None:
        """The shape as far as it can be inferred; None where not even the rank is known."""
        return self._infos.get(value, (0, None))[1]

    def rank(self, value: str) -> int | None:
        """The number of axes, or None if unknown."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def size(self, value: str) -> int | None:
        """The number of elements, or None if it cannot be inferred."""
        shape = self.shape(value)
        if shape is None or not all(isinstance(n, int) for n in shape):
            return None
        return math.prod(n for n in shape if isinstance(n, int))

    def element_type(self, value: str) -> int:
        """The ONNX element type; 0 if unknown."""
        found = self._infos.get(value, (0, None))[0]
        if found:
            return found
        # Operators that inference does not know (com.microsoft) mostly keep the type they are given.
        for _ in range(_DEEP):
            index = self.producer(value)
            if index is None or not self.nodes[index].input:
                break
            value = self.nodes[index].input[0]
            if found := self._infos.get(value, (0, None))[0]:
                return found
        return 0

    def is_float(self, value: str) -> bool:
        """Whether `value` holds floating-point numbers; unknown counts as yes."""
        return self.element_type(value) in FLOATS or self.element_type(value) == 0

    def constant(self, value: str) -> NDArray[np.generic] | None:
        """The contents of a constant, if they are in the graph."""
        import onnx

        tensor = self.initializers.get(value)
        if tensor is None:
            index = self.producer(value)
            if index is None or self.nodes[index].op_type != "Constant":
                return None
            attribute = self.nodes[index].attribute[0]
            if not attribute.HasField("t"):
                return np.asarray(onnx.helper.get_attribute_value(attribute))
            tensor = attribute.t
        if tensor.data_location == _EXTERNAL:
            return None
        return np.asarray(onnx.numpy_helper.to_array(tensor))

    def is_scalar(self, value: str, depth: int = _DEEP) -> bool:
        """Whether `value` is a single number that does not depend on what the inputs hold."""
        if value in self.initializers:
            return bool(math.prod(self.initializers[value].dims) == 1)
        index = self.producer(value)
        if index is None or depth == 0 or self.size(value) not in (1, None):
            return False
        node = self.nodes[index]
        if node.op_type == "Constant":
            constant = self.constant(value)
            return constant is not None and constant.size == 1
        if node.op_type in ("Shape", "Size"):
            return True
        if node.op_type not in _SCALAR_OPS:
            return False
        first = node.op_type in ("Slice", "Gather", "Squeeze")
        return all(self.is_scalar(name, depth - 1) for name in (node.input[:1] if first else node.input))


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of the attribute `name` of `node`."""
    import onnx

    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def integer(node: NodeProto, name: str, default: int = 0) -> int:
    """The value of the integer attribute `name` of `node`."""
    value = attribute(node, name, default)
    return value if isinstance(value, int) else default


def _reads(node: NodeProto) -> Iterable[str]:
    """Names that `node` reads, those read by graphs inside it included."""
    yield from (name for name in node.input if name)
    for item in node.attribute:
        if item.HasField("g"):
            made = {name for inner in item.g.node for name in inner.output}
            for inner in item.g.node:
                yield from (name for name in _reads(inner) if name not in made)
            yield from (o.name for o in item.g.output if o.name not in made)


def _info(info: ValueInfoProto) -> tuple[int, Shape | None]:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim
    )
