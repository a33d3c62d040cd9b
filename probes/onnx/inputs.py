"""Checks inputs against what a graph declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from divergence.errors import InputError
from divergence.inputs import called
from divergence.precision import dtype_name, torch_dtype
from divergence.probes.onnx.graph import Graph
from divergence.probes.onnx.graph import dtype_name as element_name
from divergence.probes.onnx.session import as_feed

if TYPE_CHECKING:
    from onnx import ValueInfoProto


def feeds_of(
    graph: Graph, inputs: Mapping[str, torch.Tensor], path: str
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], list[str]]:
    """Makes onnxruntime's inputs of `inputs`.

    Tensors that the graph does not take are left out, floats and integers of another width are
    converted; both with a remark.

    Returns:
        The feeds, the shapes by name, and the remarks.

    Raises:
        InputError: an input is missing, or does not fit in kind, rank or size.
    """
    declared = {i.name: i for i in graph.model.graph.input if i.name in set(graph.inputs)}
    given, notes = called(list(declared), inputs, path, "graph")
    feeds: dict[str, Any] = {}
    sizes: dict[str, tuple[int, str]] = {}
    for name, info in declared.items():
        tensor = given[name]
        _check_shape(info, tensor, sizes, path)
        converted = _converted(info, tensor, path)
        if converted is not tensor:
            notes.append(
                f"Input {name} was converted from {dtype_name(tensor.dtype)} to "
                f"{dtype_name(converted.dtype)}, as the graph declares it."
            )
        feeds[name] = as_feed(converted, info.type.tensor_type.elem_type)
    return feeds, {name: tuple(given[name].shape) for name in declared}, notes


def _converted(info: ValueInfoProto, tensor: torch.Tensor, path: str) -> torch.Tensor:
    name = element_name(info.type.tensor_type.elem_type)
    wanted = torch_dtype(name)
    if tensor.dtype == wanted:
        return tensor
    integers = not (
        tensor.is_floating_point() or wanted.is_floating_point or torch.bool in (tensor.dtype, wanted)
    )
    if not integers and not (tensor.is_floating_point() and wanted.is_floating_point):
        raise InputError(
            f"{path}: input '{info.name}' is {dtype_name(tensor.dtype)}, the graph takes {name}; "
            f"give it as {name}"
        )
    converted = tensor.to(wanted)
    if integers and not torch.equal(converted.to(tensor.dtype), tensor):
        raise InputError(
            f"{path}: input '{info.name}' holds numbers that {name}, which the graph takes, cannot hold"
        )
    return converted


def _check_shape(
    info: ValueInfoProto, tensor: torch.Tensor, sizes: dict[str, tuple[int, str]], path: str
) -> None:
    if not info.type.tensor_type.HasField("shape"):
        return
    dims = info.type.tensor_type.shape.dim
    wanted = (
        "["
        + ", ".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
        + "]"
    )
    told = f"{path}: input '{info.name}' has shape {list(tensor.shape)}, the graph takes {wanted}"
    if len(dims) != tensor.dim():
        raise InputError(f"{told}; give a tensor of {len(dims)} axes")
    for axis, (dim, size) in enumerate(zip(dims, tensor.shape, strict=True)):
        if dim.HasField("dim_value") and dim.dim_value != size:
            raise InputError(
                f"{told}: axis {axis} is fixed at {dim.dim_value}; "
                "export with dynamic shapes or give that size"
            )
        if dim.dim_param:
            first, owner = sizes.setdefault(dim.dim_param, (size, info.name))
            if first != size:
                raise InputError(f"{told}: '{dim.dim_param}' is {first} in input '{owner}' and {size} here")
