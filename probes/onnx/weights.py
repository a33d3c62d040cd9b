"""The weights of an ONNX graph under the names of the modules that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from torch import Tensor

from divergence.probes.onnx.graph import Graph, integer
from divergence.probes.onnx.light import LightModel

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import NodeProto

_QUANTIZED = "_quantized"
"""What onnxruntime's quantisation adds to the name of a weight."""


@dataclass(frozen=True)
class _Place:
    """A value of the graph, and whether it is a weight `[in, out]` that a product multiplies by."""

    value: str
    multiplied: bool = False


class OnnxWeights(Mapping[str, Tensor]):
    """Weights by name, read when they are asked for: initializers under their own names, and the constants
    that products multiply by under the name of the product's module (`layers.0.mlp.up_proj.weight`), for
    exporters fold and transpose them into values without a name. Quantised ones are what they stand for.

    Args:
        model: the model.
        graph: its graph.
    """

    def __init__(self, model: LightModel, graph: Graph) -> None:
        self._root = model.root
        self._graph = graph

    @cached_property
    def _places(self) -> dict[str, _Place]:
        graph = self._graph
        places = {name.removesuffix(_QUANTIZED): _Place(name) for name in graph.initializers}
        for index, node in enumerate(graph.nodes):
            scope = graph.scopes[index]
            if node.op_type == "DequantizeLinear" and node.input[0] in graph.initializers:
                places[node.input[0].removesuffix(_QUANTIZED)] = _Place(node.output[0])
            elif scope and node.op_type in ("MatMul", "Gemm") and self._is_constant(node.input[1]):
                turned = node.op_type == "Gemm" and integer(node, "transB") == 1
                places.setdefault(f"{scope}.weight", _Place(node.input[1], multiplied=not turned))
        return places

    def is_multiplied(self, name: str) -> bool:
        """Whether a weight is `[in, out]`, whatever its module keeps."""
        return self._places[name].multiplied

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        """The weight, in its own type where that is a float.

        Raises:
            KeyError: there is none of this name, or it is not made of constants in a way that is known.
        """
        array = self._value(self._places[name].value)
        if array is None:
            raise KeyError(name)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy() if array.dtype.kind == "f" else array.astype(np.float32))

    def _is_constant(self, value: str) -> bool:
        if value in self._graph.initializers:
            return True
        index = self._graph.producer(value)
        if index is None:
            return False
        node = self._graph.nodes[index]
        return node.op_type in ("DequantizeLinear", "Transpose", "Cast") and self._is_constant(node.input[0])

    def _value(self, value: str) -> NDArray[np.generic] | None:
        """What a value made of constants holds; None where it depends on more."""
        tensor = self._graph.initializers.get(value)
        if tensor is not None:
            return np.asarray(onnx.numpy_helper.to_array(tensor, base_dir=str(self._root)))
        index = self._graph.producer(value)
        if index is None:
            return None
        node = self._graph.nodes[index]
        made = [self._value(name) if name else None for name in node.input]
        if not made or made[0] is None:
            return None
        if node.op_type == "Transpose":
            axes = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            return made[0].transpose(axes)
        if node.op_type == "Cast":
            return made[0]
        if node.op_type == "DequantizeLinear" and made[1] is not None:
            return _dequantized(node, made[0], made[1], made[2] if len(made) > 2 else None)
        return None


def _dequantized(
    node: NodeProto,
    quantized: NDArray[np.generic],
    scale: NDArray[np.generic],
    zero: NDArray[np.generic] | None,
) -> NDArray[np.generic]:
    """As ONNX's DequantizeLinear defines it: one scale, one for every slice of an axis, or one for every
    block along it."""
    axis, block = integer(node, "axis", 1), integer(node, "block_size")

    def fitting(parameter: NDArray[np.generic]) -> NDArray[np.float32]:
        wide = parameter.astype(np.float32)
        if block:
            return wide.repeat(block, axis).take(np.arange(quantized.shape[axis]), axis)
        if wide.ndim == 1 and wide.size > 1:
            return wide.reshape([-1 if i == axis % quantized.ndim else 1 for i in range(quantized.ndim)])
        return wide

    steps = quantized.astype(np.float32) - (0 if zero is None else fitting(zero))
    return np.asarray(steps * fitting(scale), dtype=np.float32)
