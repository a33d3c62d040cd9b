"""What an ONNX model is: its digest, precision and operators."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

from onnx import TensorProto

from divergence.probes.onnx.graph import FLOATS, Graph, dtype_name
from divergence.probes.onnx.light import LightModel, tensor_bytes

_SAMPLES = 64
_SAMPLE_BYTES = 64
_INT8 = frozenset({"MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "MatMulNBits",
                   "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention", "QGemm"})  # fmt: skip
_WHOLE = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4})
_FP8 = frozenset(e for e, name in FLOATS.items() if name.startswith("float8"))
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})


def digest(model: LightModel) -> str:
    """Identifies structure and weights, wherever the weights lie.

    Of a weight, type, shape and up to 64 evenly spaced pieces of 64 bytes enter.
    """
    found = hashlib.sha256()
    graph = model.proto.graph
    for node in graph.node:
        parts = [node.op_type, node.domain, *node.input, "->", *node.output]
        found.update("\0".join(parts).encode())
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            found.update(attribute.SerializeToString(deterministic=True))
    for info in (*graph.input, *graph.output):
        found.update(info.SerializeToString(deterministic=True))
    with ExitStack() as stack:
        files: dict[Path, FileIO] = {}
        for tensor in graph.initializer:
            found.update(f"{tensor.name}{tuple(tensor.dims)}{tensor.data_type}".encode())
            weight = model.weights.get(tensor.name)
            if weight is None:
                found.update(tensor.SerializeToString(deterministic=True))
                continue
            if weight.file not in files:
                # Unbuffered reads: a mapping would fault in many times what is sampled.
                files[weight.file] = stack.enter_context(FileIO(weight.file))
            step = max(_SAMPLE_BYTES, weight.length // _SAMPLES)
            for start in range(weight.offset, weight.offset + weight.length, step):
                count = min(_SAMPLE_BYTES, weight.offset + weight.length - start)
                files[weight.file].seek(start)
                found.update(files[weight.file].read(count))
    return found.hexdigest()[:16]


def precision(graph: Graph) -> str | None:
    """The precision that the graph shows, or None if it has no products of floats."""
    kinds = Counter(node.op_type for node in graph.nodes)
    quantized = {
        graph.element_type(node.input[2]) if len(node.input) > 2 else TensorProto.UINT8
        for node in graph.nodes
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    if quantized & _FP8 or any(t.data_type in _FP8 for t in graph.initializers.values()):
        return "fp8"
    if quantized & _WHOLE or any(kinds[kind] for kind in _INT8):
        return "int8"
    weights: Counter[str] = Counter()
    for tensor in graph.initializers.values():
        if tensor.data_type in FLOATS:
            weights[FLOATS[tensor.data_type]] += tensor_bytes(tensor)
    products = Counter(
        FLOATS.get(graph.element_type(node.output[0]), "")
        for node in graph.nodes
        if node.op_type in _PRODUCTS
    )
    stored = weights.most_common(1)[0][0] if weights else ""
    run = products.most_common(1)[0][0] if products else stored
    if stored == "bfloat16" and run == "float32":
        return "bf16-weights"
    coarse = {"float16": "fp16", "bfloat16": "bf16"}
    return coarse.get(stored) or coarse.get(run) or ("fp32" if stored or run else None)


def operators(graph: Graph) -> Mapping[str, Mapping[str, int]]:
    """For every operator type, how many make values of which type."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for node in graph.nodes:
        element = graph.element_type(node.output[0]) if node.output else 0
        counts[node.op_type][dtype_name(element) or "unknown"] += 1
    return {kind: dict(sorted(by_type.items())) for kind, by_type in sorted(counts.items())}


def bytes_of(graph: Graph, values: list[str]) -> dict[str, int]:
    """Sizes of `values` in bytes as they are fetched, where they can be inferred."""
    sizes = {}
    for value in values:
        count = graph.size(value)
        if count is not None:
            name = dtype_name(graph.element_type(value))
            sizes[value] = count * {"float16": 2, "int64": 8, "float64": 8, "bool": 1}.get(name, 4)
    return sizes
