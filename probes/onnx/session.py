"""Runs an ONNX graph with more of its values as outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, TensorProto

from divergence.errors import InputError, SourceError, one_line
from divergence.precision import torch_dtype
from divergence.probes.onnx.graph import FLOATS, Graph
from divergence.probes.onnx.light import LightModel

_FOLDER = "session.model_external_initializers_file_folder_path"
# numpy knows these float types as they are; all others come out through a lossless Cast.
_NATIVE = frozenset({TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16})
_PREFIX = "divergence:"


class Session:
    """An onnxruntime session of `model` that can hand out `values` of its graph.

    Args:
        model: the model.
        graph: its graph.
        values: names of the values that may be asked for.
        provider: execution provider.
        threads: threads of an operator; None leaves it to onnxruntime.

    Raises:
        SourceError: onnxruntime refuses the model.
    """

    def __init__(
        self, model: LightModel, graph: Graph, values: Iterable[str], provider: str, threads: int | None
    ) -> None:
        self._path = model.path
        self._names: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        proto = ModelProto()
        proto.CopyFrom(model.proto)
        for value in dict.fromkeys(values):
            self._expose(proto, graph, value)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(_FOLDER, str(model.root))
        # Its threads would keep cores busy after a run, which what comes next needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=[provider]
            )
        except Exception as error:
            raise SourceError(
                f"{self._path}: onnxruntime refuses the model on {provider} ({one_line(error)}); "
                "export it in a precision or opset that this provider supports"
            ) from error

    def _expose(self, proto: ModelProto, graph: Graph, value: str) -> None:
        element = graph.element_type(value)
        if element in FLOATS and element not in _NATIVE:
            self._dtypes[value] = torch_dtype(FLOATS[element])
            self._names[value] = _PREFIX + value
            proto.graph.node.add(
                op_type="Cast", input=[value], output=[_PREFIX + value], name=_PREFIX + value
            ).attribute.add(name="to", i=TensorProto.FLOAT, type=2)
            proto.graph.output.add(name=_PREFIX + value)
        elif value in graph.outputs:
            self._names[value] = value
        elif graph.producer(value) is None:
            # Inputs and initializers become outputs through a copy of them.
            self._names[value] = _PREFIX + value
            proto.graph.node.add(
                op_type="Identity", input=[value], output=[_PREFIX + value], name=_PREFIX + value
            )
            proto.graph.output.add(name=_PREFIX + value)
        else:
            self._names[value] = value
            proto.graph.output.add(name=value)

    def fetch(self, feeds: Mapping[str, Any], values: Sequence[str]) -> dict[str, torch.Tensor]:
        """Runs once and returns the tensors of `values`, each owning its memory.

        Raises:
            SourceError: the run failed.
        """
        unique = list(dict.fromkeys(values))
        try:
            results = self._session.run_with_ort_values([self._names[value] for value in unique], dict(feeds))
        except Exception as error:
            raise SourceError(
                f"{self._path}: onnxruntime failed to run the model ({one_line(error)}); "
                "check that the inputs suit it"
            ) from error
        tensors = {}
        results.reverse()
        for value in unique:
            result = results.pop()  # so that only one tensor at a time exists twice
            if not result.is_tensor() or result.data_type() == "tensor(string)":
                continue
            tensor = torch.from_numpy(np.require(result.numpy(), requirements="W"))
            tensors[value] = tensor.to(self._dtypes[value]) if value in self._dtypes else tensor
        return tensors

    def in_groups(
        self, feeds: Mapping[str, Any], values: Sequence[str], sizes: Mapping[str, int], memory: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Fetches `values` in order, in as many runs as it takes to hold at most `memory` bytes
        of them at a time.

        Args:
            feeds: the inputs.
            values: names of values.
            sizes: their sizes in bytes, where known.
            memory: limit in bytes; a larger value is fetched alone.

        Raises:
            SourceError: a run failed.
        """
        # A size that inference did not tell is taken to be that of the largest known one.
        unknown = max((sizes[v] for v in values if v in sizes), default=memory)
        group: list[str] = []
        held = 0
        for value in dict.fromkeys(values):
            size = sizes.get(value, unknown)
            if group and held + size > memory:
                yield self.fetch(feeds, group)
                group, held = [], 0
            group.append(value)
            held += size
        if group:
            yield self.fetch(feeds, group)


def check_provider(provider: str) -> None:
    """Checks that onnxruntime has `provider`.

    Raises:
        SourceError: it does not; names those it has.
    """
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise SourceError(
            f"execution provider '{provider}' is not available in onnxruntime "
            f"{onnxruntime.__version__}; use one of {', '.join(available)}, or install a build with it"
        )


def as_feed(tensor: torch.Tensor, element: int) -> Any:
    """`tensor` as onnxruntime takes it for an input of the ONNX type `element`."""
    array = tensor.detach().cpu().contiguous()
    if FLOATS.get(element) == "bfloat16":
        raw = array.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element)
    if element in FLOATS and element not in _NATIVE:
        raise InputError(
            f"inputs of type {FLOATS[element]} cannot be given to onnxruntime; export them as float32"
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(array.numpy())
