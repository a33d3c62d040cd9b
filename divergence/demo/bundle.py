"""The exports that the package carries: graphs without weights, filled in when written.

The weights come from a seed, so the files need not hold them: an initializer that is a parameter
of the model (or its transpose) carries the parameter's name instead of data. That leaves some
20 kB a graph and spares `divergence demo` the exporter, which takes tens of seconds and a package
that the comparison itself does not need. `make_graphs.py` makes the files.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper

from divergence.demo.export import load
from divergence.errors import SourceError, nearest, one_line

BUNDLED: Mapping[str, torch.dtype | None] = {"clean": None, "rotary-bf16": torch.bfloat16}
"""The bundled exports by name, with the precision of their rotary angles where that is the fault."""

TRANSPOSED = ".T"
# Smaller initializers are constants of the graph, not parameters.
_MIN_ELEMENTS = 64
# Source paths of the machine that exported; nothing reads them.
_DROPPED_METADATA = "pkg.torch.onnx.stack_trace"


def write_bundled(name: str, path: str | os.PathLike[str]) -> None:
    """Writes a bundled fp32 export of the model, for any batch and length; takes no exporter.

    Args:
        name: one of `BUNDLED`.
        path: the ONNX file to write, about 4 MB.

    Raises:
        SourceError: there is no such export, or the file cannot be written.
    """
    if name not in BUNDLED:
        raise SourceError(f"there is no bundled export '{name}'{nearest(name, BUNDLED)}")
    packed = resources.files("divergence.demo").joinpath(f"{name}.onnx.gz").read_bytes()
    content = fill(onnx.load_model_from_string(gzip.decompress(packed))).SerializeToString()
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise SourceError(f"{path}: cannot be written ({one_line(error)})") from error


def fill(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Puts the weights back into a graph that `strip` took them from; changes and returns it."""
    state = load().state_dict()
    for initializer in graph.graph.initializer:
        if name := initializer.doc_string:
            parameter = state[name.removesuffix(TRANSPOSED)]
            if name.endswith(TRANSPOSED):
                parameter = parameter.T
            initializer.CopyFrom(numpy_helper.from_array(parameter.contiguous().numpy(), initializer.name))
    return graph


def strip(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Takes the weights of the bundled model out of its export; changes and returns it.

    Raises:
        SourceError: an initializer of that size is no parameter of the model.
    """
    state = load().state_dict()
    for initializer in graph.graph.initializer:
        values = torch.from_numpy(numpy_helper.to_array(initializer).copy())
        if values.numel() < _MIN_ELEMENTS:
            continue
        initializer.doc_string = _parameter_name(initializer.name, values, state)
        initializer.ClearField("raw_data")
    for node in graph.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != _DROPPED_METADATA]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    return graph


def _parameter_name(initializer: str, values: torch.Tensor, state: Mapping[str, torch.Tensor]) -> str:
    for name, parameter in state.items():
        if torch.equal(parameter, values):
            return name
        if parameter.ndim == 2 and torch.equal(parameter.T, values):
            return name + TRANSPOSED
    raise SourceError(
        f"initializer '{initializer}' {tuple(values.shape)} is no parameter of the bundled model"
    )
