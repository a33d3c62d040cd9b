"""In which precision an ONNX node ran inside a layer of an engine, and what tells so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from divergence.probes.onnx.nodes import NodeInfo
from divergence.probes.onnx.walk import MOVEMENT, PRODUCTS
from divergence.probes.tensorrt.inspector import INTEGRAL, EngineLayer, GemmTypes

MIXED = "mixed"
UNKNOWN = "unknown"

# Operations by which a kernel's name shows where in it a node ran.
_WITNESSES = {
    "Sin": "Sin", "Cos": "Cos", "ReduceMean": "Mea", "Sqrt": "Sqr", "Softmax": "Exp", "Exp": "Exp",
    "Tanh": "Tan", "Erf": "Erf",
}  # fmt: skip
_ROLE_WITNESS = {"norm": "Mea", "softmax": "Exp"}
_CAST = "Cas"
_CUT = "Etc"
# Scale factors of a product, Float whatever it multiplies.
_SCALES = ("_alpha", "_beta")


@dataclass(frozen=True)
class Ran:
    """What became of a node; see `divergence.probes.tensorrt.contract.NodeRun`."""

    layer: EngineLayer | None = None
    precision: str = ""
    accumulator: str = ""
    basis: str = ""


def ran_in(node: NodeInfo, layers: Sequence[EngineLayer], bindings: Sequence[str], asked: str) -> Ran:
    """In what `node` ran.

    Args:
        node: the node.
        layers: the engine's layers that name it; at least one.
        bindings: names of the engine's inputs and outputs.
        asked: type that binds it, in a strongly typed network; empty otherwise.
    """
    # Of a product, generated kernels hold only what lays out its operands.
    layer = min(layers, key=lambda found: 0 if found.is_attention else 1 if found.gemm else 2)
    multiplies = is_product(node)
    if layer.is_attention:
        precision = _only(_floats(layer, bindings))
        if asked and precision not in (asked, UNKNOWN):
            # The types of the graph bind, yet no tensor of the kernel shows this one.
            return Ran(layer, UNKNOWN, UNKNOWN if multiplies else "")
        return Ran(layer, precision, UNKNOWN if multiplies else "", _basis(precision))
    if layer.gemm is not None:
        return _in_gemm(layer, layer.gemm, multiplies=multiplies, asked=asked)
    return _in_kernel(node, layer, bindings, asked)


def is_product(node: NodeInfo) -> bool:
    """Whether `node` multiplies matrices."""
    return node.op in PRODUCTS or node.op.endswith("Attention")


def _in_gemm(layer: EngineLayer, gemm: GemmTypes, *, multiplies: bool, asked: str) -> Ran:
    if multiplies:
        return Ran(layer, gemm.precision, gemm.accumulator, "tactic")
    if asked:
        return Ran(layer, asked, basis="asked")
    # Bias, activation or sum behind the product: applied in the epilogue, rounded to the output.
    same = gemm.epilogue == gemm.output
    return Ran(layer, gemm.output if same else MIXED, basis="tactic")


def _in_kernel(node: NodeInfo, layer: EngineLayer, bindings: Sequence[str], asked: str) -> Ran:
    types = _floats(layer, bindings)
    accumulator = UNKNOWN if is_product(node) else ""
    if not types:
        seen = {tensor.dtype for tensor in (*layer.inputs, *layer.outputs)}
        return Ran(layer, "" if seen and seen <= INTEGRAL else UNKNOWN, accumulator)
    hidden = _hidden_casts(layer, bindings)
    if asked:
        possible = asked in types or hidden or _CUT in layer.operations
        return Ran(layer, asked, accumulator, "asked") if possible else Ran(layer, UNKNOWN, accumulator)
    if len(types) == 1 and not hidden:
        return Ran(layer, types[0], accumulator, "tensors")
    told = _between_casts(node, layer, types)
    return Ran(layer, told or MIXED, accumulator, "cast" if told else "tensors")


def _basis(precision: str) -> str:
    return "" if precision == UNKNOWN else "tensors"


def _only(types: Sequence[str]) -> str:
    return types[0] if len(types) == 1 else MIXED if types else UNKNOWN


def _floats(layer: EngineLayer, bindings: Sequence[str]) -> list[str]:
    """The floating types of a kernel's tensors, but for scale factors and for inputs and outputs of
    the engine whose type a cast at the edge of the kernel explains."""
    own: list[str] = []
    edge: list[str] = []
    for tensor in (*layer.inputs, *layer.outputs):
        if tensor.floating and not tensor.name.endswith(_SCALES):
            (edge if tensor.name in bindings else own).append(tensor.dtype)
    found = list(dict.fromkeys(own))
    casts = _CAST in layer.operations or _CUT in layer.operations
    further = [] if casts and found else [dtype for dtype in edge if dtype not in found]
    return list(dict.fromkeys([*found, *further]))


def _hidden_casts(layer: EngineLayer, bindings: Sequence[str]) -> bool:
    """Whether a kernel casts more often than its tensors explain: integers that it reads, inputs and
    outputs of the engine in another type."""
    own = set(_floats(layer, bindings))
    tensors = (*layer.inputs, *layer.outputs)
    explained = {t.name for t in tensors if t.dtype and t.dtype not in own and not t.name.endswith(_SCALES)}
    return layer.operations.count(_CAST) > len(explained)


def _between_casts(node: NodeInfo, layer: EngineLayer, types: Sequence[str]) -> str:
    """The type of `node` by the casts around its operation in the kernel's name, or nothing.

    With two types in all, and every output of one of them, what is cast right after it has been
    computed was of the other.
    """
    outputs = {tensor.dtype for tensor in layer.outputs if tensor.floating}
    operations = layer.operations
    witness = _WITNESSES.get(node.op, "")
    if not witness and operations[-1:] == (_CAST,):
        # All of a norm or softmax is where its mean or exponential is, unless more follows the last cast.
        witness = _ROLE_WITNESS.get(node.role, "")
    if node.op in MOVEMENT or len(types) != 2 or len(outputs) != 1 or witness not in operations:
        return ""
    other = next((dtype for dtype in types if dtype not in outputs), "")
    at = operations.index(witness)
    before, after = _CAST in operations[:at], operations[at + 1 :]
    return other if before and _CAST in after else ""
