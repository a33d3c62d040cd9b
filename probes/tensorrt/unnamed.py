"""What can be said of an engine's ONNX nodes from their names and kernels alone; names of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from divergence.probes.onnx.nodes import NodeInfo
from divergence.probes.onnx.scopes import find_layers
from divergence.probes.tensorrt.inspector import EngineLayer

_NUMBER = re.compile(r"(_\d+)+$")
# Words in the names of nodes, by operator: `node_linear_3`, `/layers.0/attn/MatMul_1`.
_OPERATORS: tuple[tuple[str, str], ...] = (
    ("scaled_dot_product_attention", "Attention"), ("attention", "Attention"),
    ("layer_norm", "LayerNormalization"), ("layernorm", "LayerNormalization"),
    ("rms_norm", "RMSNormalization"), ("rmsnorm", "RMSNormalization"),
    ("softmax", "Softmax"), ("matmul", "MatMul"), ("linear", "MatMul"), ("gemm", "Gemm"), ("addmm", "Gemm"),
    ("einsum", "Einsum"), ("conv", "Conv"), ("embedding", "Gather"),
    ("gelu", "Gelu"), ("silu", "Swish"), ("sigmoid", "Sigmoid"), ("tanh", "Tanh"), ("relu", "Relu"),
    ("erf", "Erf"), ("sin", "Sin"), ("cos", "Cos"), ("reducemean", "ReduceMean"), ("mean", "ReduceMean"),
    ("rsqrt", "Reciprocal"), ("sqrt", "Sqrt"), ("pow", "Pow"), ("neg", "Neg"), ("_to_copy", "Cast"),
    ("cast", "Cast"), ("cat", "Concat"), ("concat", "Concat"), ("split", "Split"), ("slice", "Slice"),
    ("view", "Reshape"), ("reshape", "Reshape"), ("transpose", "Transpose"), ("expand", "Expand"),
    ("unsqueeze", "Unsqueeze"), ("squeeze", "Squeeze"), ("add", "Add"), ("mul", "Mul"), ("div", "Div"),
    ("sub", "Sub"), ("where", "Where"),
)  # fmt: skip
_ACTIVATIONS = frozenset({"Gelu", "Swish", "Sigmoid", "Tanh", "Relu", "Erf"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "ReduceMean"})
_LINEAR = ("linear", "gemm", "addmm", "conv")


def infer_nodes(layers: Sequence[EngineLayer]) -> tuple[NodeInfo, ...]:
    """The nodes that an engine names, with what names and kernels show of them.

    Operators are read from names; modules from names that are paths, as the TorchScript exporter
    writes them; roles from both, and from what else ran in the same kernel. What nothing shows stays
    empty, its role `other`.
    """
    place: dict[str, EngineLayer] = {}
    for layer in layers:
        for name in layer.onnx_nodes:
            if name not in place or layer.is_attention:
                place[name] = layer
    scopes = [_scope(name) for name in place]
    found = find_layers(scopes) if any(scopes) else []
    inside = {i: (layer.stack, layer.index) for layer in found for i in layer.nodes}
    nodes = []
    for i, (name, layer) in enumerate(place.items()):
        stack, index = inside.get(i, ("", None))
        op = _operator(name)
        nodes.append(
            NodeInfo(name, op, module=scopes[i] or "", role=_role(name, op, layer), stack=stack, layer=index)
        )
    return tuple(nodes)


def layer_pattern(module: str, layer: int | None) -> str:
    """`module` with `*` for the index of its layer: `model.layers.3.mlp` -> `model.layers.*.mlp`."""
    if layer is None:
        return module
    parts = module.split(".")
    for at, part in enumerate(parts):
        stem = part.removesuffix(str(layer))
        if stem != part and not stem[-1:].isdigit():
            return ".".join([*parts[:at], f"{stem}*", *parts[at + 1 :]])
    return module


def ranges(indices: Iterable[int]) -> str:
    """Indices as ranges: 0, 1, 2, 5 -> `0-2,5`."""
    found: list[list[int]] = []
    for index in sorted(set(indices)):
        if found and index == found[-1][1] + 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in found)


def _scope(name: str) -> str | None:
    return ".".join(part for part in name.split("/")[1:-1] if part) if name.startswith("/") else None


def _operator(name: str) -> str:
    last = _NUMBER.sub("", name.rsplit("/", 1)[-1].lower().removeprefix("node_"))
    exact = next((op for word, op in _OPERATORS if last == word), "")
    return exact or next((op for word, op in _OPERATORS if word in last), "")


def _role(name: str, op: str, layer: EngineLayer) -> str:
    own = _own_role(name, op, layer)
    if own:
        return own
    near = {_own_role(other, _operator(other), layer) for other in layer.onnx_nodes} - {"", "mlp"}
    operations = set(layer.operations)
    if "Mea" in operations or near == {"norm"}:
        # A sum that starts such a kernel is a residual: which one of its sums cannot be told.
        return "norm" if op in ("Mul", "Pow", "Div", "Sqrt", "Reciprocal") else "other"
    if operations >= {"Neg", "Con", "Mul", "Add"} or operations & {"Sin", "Cos"}:
        return "rotary" if op in ("Mul", "Add", "Neg", "Concat") else "other"
    if layer.is_attention or near == {"softmax"}:
        return "attention_product" if op in ("Mul", "Div") else "mask" if op in ("Add", "Where") else "other"
    if "activation" in near:
        return "activation" if op in ("Mul", "Add", "Pow", "Div") else "other"
    return "other"


def _own_role(name: str, op: str, layer: EngineLayer) -> str:
    """What the operator alone tells, or nothing."""
    if op in ("Sin", "Cos"):
        return "rotary"
    if op in _NORMS:
        return "norm"
    if op == "Softmax":
        return "softmax"
    if op == "Attention" or (op in ("MatMul", "Einsum") and layer.is_attention):
        return "attention_product"
    if op in ("MatMul", "Gemm", "Conv", "Einsum"):
        last = name.rsplit("/", 1)[-1].lower()
        return "projection" if any(word in last for word in _LINEAR) else _by_path(name)
    if op in _ACTIVATIONS:
        return "activation"
    return ""


def _by_path(name: str) -> str:
    """A product whose name is a path belongs to the module that ends it."""
    parts = name.split("/")
    if len(parts) < 3:
        return "attention_product"
    return "attention_product" if re.search(r"attn|attention$", parts[-2]) else "projection"
